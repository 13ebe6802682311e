"""Audit of a running server: tokens scored as they are decoded, and again as part of a prompt, over HTTP alone."""
