"""The fixtures of tests that run the command, or llama.cpp beside another engine."""

from tests.support.command import here
from tests.support.gguf import one_core

__all__ = ["here", "one_core"]
