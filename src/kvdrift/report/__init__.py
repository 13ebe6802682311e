"""Renderings of a judged run; each one reads the same view."""
