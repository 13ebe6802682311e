"""Engines of a caller's own: any model of torch that decodes with a cache, and other frameworks."""
