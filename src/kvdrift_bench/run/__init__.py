"""Runs the corpus, and keeps what was measured."""
