"""The fixtures of tests that run the command."""

from tests.support.command import here, llama, prompts

__all__ = ["here", "llama", "prompts"]
