"""Planted faults and clean twins."""
