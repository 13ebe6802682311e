"""Pairs of passes and their drift."""
