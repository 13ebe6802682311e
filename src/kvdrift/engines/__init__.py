"""Adapters: one engine per module, none of which knows another."""
