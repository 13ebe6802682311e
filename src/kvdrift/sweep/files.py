"""Where the files of a sweep lie: a path of this machine, or a place that fsspec knows."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol


class StoreError(OSError):
    """A place that is not a disk of this machine could not be read or written; the text says why."""


class Files(Protocol):
    """The files of one directory, by names relative to it. Each method raises OSError where it fails.

    Attributes:
        name: the directory, as a message names it and as a worker finds it again.
        beat_s: seconds between two writings of what runs.
    """

    name: str
    beat_s: float

    def begin(self) -> list[str]:
        """Make the directory where there is none; return the names of what lies in it."""
        ...

    def read(self, name: str) -> bytes:
        """Return the bytes of a file."""
        ...

    def read_all(self, folder: str) -> Iterator[bytes]:
        """Yield the bytes of the .json files of a folder; those that cannot be read are left out."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        ...

    def filled(self, folder: str) -> AbstractContextManager[Path]:
        """Yield a path at which a folder can be made; it is in its place when the context ends without an error."""
        ...

    def held(self) -> AbstractContextManager[None]:
        """Hold the directory as its driver; BlockingIOError where another driver does."""
        ...

    def is_held(self) -> bool:
        """Whether a driver holds the directory."""
        ...


class LocalFiles:
    """The files of a path of this machine."""

    beat_s = 1.0

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self.name = str(self._path)

    def begin(self) -> list[str]:
        """Make the directory; see `Files`."""
        self._path.mkdir(parents=True, exist_ok=True)
        return os.listdir(self._path)

    def read(self, name: str) -> bytes:
        """Return the bytes of a file."""
        return (self._path / name).read_bytes()

    def read_all(self, folder: str) -> Iterator[bytes]:
        """Yield the bytes of the .json files of a folder; see `Files`."""
        for file in (self._path / folder).glob("*.json"):
            try:
                yield file.read_bytes()
            except OSError:
                continue

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        path = self._path / name
        if not path.parent.exists():
            path.parent.mkdir(exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise

    @contextmanager
    def filled(self, folder: str) -> Iterator[Path]:
        """Yield the folder's own path: a run directory is renamed to it when it is whole."""
        yield self._path / folder

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the directory; the kernel lets go of a killed driver's hold."""
        handle = os.open(self._path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(handle)

    def is_held(self) -> bool:
        """Whether a driver holds the directory."""
        try:
            with self.held():
                return False
        except BlockingIOError:
            return True


def reason_of(error: OSError) -> str:
    """Return what an error says of a disk or of another place, without number and path."""
    return error.strerror or str(error)


__all__ = ["Files", "LocalFiles", "StoreError", "reason_of"]
