"""Workers that are no processes: pipes that one thread answers, so that a driver sees a thousand of them."""

from __future__ import annotations

import itertools
import os
import selectors
import threading
import time
from collections import deque
from pathlib import Path
from typing import IO

_PIDS = itertools.count(1)


class Slots:
    """Launches simulated workers. Each has two pipes as a process has them; a thread reads every job as it comes and
    answers it `seconds` later. Nothing is started, loaded or computed: what is left is the driver's own work."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._due: deque[tuple[float, Slot, bytes]] = deque()
        self.most_at_once = 0
        self.launched = 0
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def launch(self, log: Path | None) -> Slot:
        """Make one."""
        slot = Slot()
        with self._lock:
            self.launched += 1
            self._selector.register(slot.jobs, selectors.EVENT_READ, slot)
        return slot

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        self._thread.join()
        self._selector.close()

    def _answer(self) -> None:
        while not self._end.is_set():
            while self._due and self._due[0][0] <= time.monotonic():
                _, slot, name = self._due.popleft()
                os.write(slot.answers, b'{"id": "' + name + b'", "value": {}}\n')
            for key, _ in self._selector.select(0.005):
                slot = key.data
                line = os.read(slot.jobs, 1 << 16)
                if not line:  # its driver has ended it
                    with self._lock:
                        self._selector.unregister(slot.jobs)
                    slot.close()
                    continue
                name = line[len(b'{"id": "') :].partition(b'"')[0]
                self._due.append((time.monotonic() + self._seconds, slot, name))
                self.most_at_once = max(self.most_at_once, len(self._due))


class Slot:
    """One simulated worker, with what the local backend needs of a process."""

    def __init__(self) -> None:
        self.jobs, given = os.pipe()
        taken, self.answers = os.pipe()
        self.stdin: IO[bytes] | None = os.fdopen(given, "wb")
        self.stdout: IO[bytes] | None = os.fdopen(taken, "rb")
        self.pid = next(_PIDS)
        self.returncode = 0

    def kill(self) -> None:
        """Nothing to end: the thread lets it go when its pipe is closed."""

    def wait(self) -> int:
        """Return 0."""
        return 0

    def close(self) -> None:
        """Close the thread's ends."""
        os.close(self.jobs)
        os.close(self.answers)
