"""Progress on stderr: bars when it is a terminal, nothing when it is not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# Work that ends sooner than this is over before a reader has seen its bar.
_QUIET_S = 1.0


class TerminalProgress:
    """Draws the steps of an audit; `say` tells what is being done before the number of steps is known."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task = bars.add_task("starting", total=None)
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """Show what is being done."""
        self._bars.update(self._task, description=text)
        self._show()

    def start(self, total: int) -> None:
        """Begin a work of `total` steps."""
        self._bars.reset(self._task, total=total)

    def step(self, text: str) -> None:
        """Begin the next step."""
        if self._bars.tasks[0].total is not None:
            self._bars.advance(self._task, 1 if self._bars.tasks[0].description != "starting" else 0)
        self._bars.update(self._task, description=text)
        self._show()

    def _show(self) -> None:
        if not self._bars.live.is_started and time.monotonic() - self._began > _QUIET_S:
            self._bars.start()


@contextmanager
def terminal_progress() -> Iterator[TerminalProgress]:
    """Draw on stderr while the context is open, and leave nothing behind."""
    console = Console(stderr=True)
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    try:
        yield TerminalProgress(bars)
    finally:
        bars.stop()
