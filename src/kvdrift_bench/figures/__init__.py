"""Figures of a benchmark, as tables and drawings."""
