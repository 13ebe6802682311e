"""Pairs recorded values and measures their drift."""
