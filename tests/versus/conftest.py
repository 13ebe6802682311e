"""The fixtures of tests that run the command."""

from tests.support.command import here

__all__ = ["here"]
