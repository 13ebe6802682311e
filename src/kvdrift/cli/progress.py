"""Progress on stderr: what is being done and the time left when it is a terminal, nothing when it is not."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

# Work that ends sooner than this is over before a reader has seen its bar.
_QUIET_S = 1.0


# Fewer columns have no room for a bar beside what is being done.
_ROOM_FOR_A_BAR = 60


class TimeLeft(TimeRemainingColumn):
    """About how long it will take, "1:05 left", from the steps so far; nothing before two of them are done."""

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        if task.total is None or task.completed < 2 or left is None:
            return Text("")
        minutes, seconds = divmod(round(left), 60)
        return Text(f"{minutes}:{seconds:02d} left", style="progress.remaining")


class TerminalProgress:
    """Draws the steps of an audit; `say` tells what is being done before the number of steps is known."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task = bars.add_task("starting", total=None)
        self._begun = 0

    def say(self, text: str) -> None:
        """Show what is being done."""
        self._bars.update(self._task, description=text)

    def start(self, total: int) -> None:
        """Begin a work of `total` steps."""
        self._begun = 0
        self._bars.update(self._task, total=total, completed=0)

    def step(self, text: str) -> None:
        """Begin the next step; the one before is done."""
        self._bars.update(self._task, description=text, completed=self._begun)
        self._begun += 1


@contextmanager
def terminal_progress() -> Iterator[TerminalProgress]:
    """Draw on stderr while the context is open, from the second second on, and leave nothing behind."""
    console = Console(stderr=True)
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        *([BarColumn(bar_width=24)] if console.width >= _ROOM_FOR_A_BAR else []),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeLeft(),
        console=console,
        expand=True,
        transient=True,
        # They would swap sys.stdout at a moment that the thread below chooses, and back at another.
        redirect_stdout=False,
        redirect_stderr=False,
        # Not rich's own guess, which FORCE_COLOR and the like would sway: a log file is no place for bars.
        disable=not sys.stderr.isatty(),
    )
    progress = TerminalProgress(bars)
    if bars.disable:
        yield progress
        return
    over = threading.Event()
    # A thread, since the work that takes long is often a single step: loading a model.
    starter = threading.Thread(target=_start_later, args=(bars, over), daemon=True)
    starter.start()
    try:
        yield progress
    finally:
        over.set()
        starter.join()
        bars.stop()


def _start_later(bars: Progress, over: threading.Event) -> None:
    if not over.wait(_QUIET_S):
        bars.start()
