"""Recorded passes: the value between capture and comparison, in memory and on disk."""
