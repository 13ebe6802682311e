"""Tiny random models of real architectures, and the prompts that they are given."""
