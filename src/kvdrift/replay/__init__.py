"""Canonical attention in float64, written independently of any model, and what known causes would do to it."""
