"""Listeners for the progress of long work; the command line draws it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Hears of the steps of long work."""

    def say(self, text: str) -> None:
        """Hear what is being done, before the number of steps is known."""
        ...

    def start(self, total: int) -> None:
        """Hear that `total` steps begin."""
        ...

    def step(self, text: str) -> None:
        """Hear that the next step begins, and what it does."""
        ...


class Silent:
    """A progress that says nothing."""

    def say(self, text: str) -> None:
        """Ignore what is being done."""

    def start(self, total: int) -> None:
        """Ignore the number of steps."""

    def step(self, text: str) -> None:
        """Ignore the step."""
