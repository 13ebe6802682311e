"""Taking turns at a compiler of torch extensions, which waits without end for one that was killed.

torch marks a folder in which it compiles by a file, `lock`, and every other process waits until it is gone. A process
that is killed leaves it there. Knows no torch.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Nothing that is compiled for a cache takes as long: a lock of this age belongs to nobody, in seconds.
_LONGEST = 900.0
_PAUSE = 0.2


@contextmanager
def turn_to_compile(folder: Path, longest: float = _LONGEST) -> Iterator[None]:
    """Wait until no other process compiles in `folder`, and compile there while the context is open.

    Processes of kvdrift take turns by a lock of the system, which ends with its process. Who gets it and finds that the
    one before did not come to its end removes what that one left. Of other programs nothing is known: a lock of theirs
    is waited for until it is `longest` seconds old. Where the system has no such locks, or its folder for temporary
    files cannot be written, nothing is done.
    """
    try:
        import fcntl

        turns = _turns_of(folder).open("a+", encoding="utf-8")
    except (ImportError, OSError):
        yield
        return
    with turns:
        fcntl.flock(turns, fcntl.LOCK_EX)
        lock = folder / "lock"
        if _is_marked(turns.fileno()):
            lock.unlink(missing_ok=True)
        while (age := _age(lock)) is not None:
            if age > longest:
                lock.unlink(missing_ok=True)
            else:
                time.sleep(_PAUSE)
        os.write(turns.fileno(), b"compiling")
        try:
            yield
        finally:
            os.ftruncate(turns.fileno(), 0)


def _turns_of(folder: Path) -> Path:
    """The file of the lock, beside no other user's."""
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"kvdrift-compiles-{os.getuid()}-{name}"


def _is_marked(turns: int) -> bool:
    """Whether the process that had the turn before did not come to its end."""
    return os.fstat(turns).st_size > 0


def _age(lock: Path) -> float | None:
    """How many seconds ago a lock was made, None if there is none."""
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None


__all__ = ["turn_to_compile"]
