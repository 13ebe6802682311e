"""Runs an engine along its routes and records them."""
