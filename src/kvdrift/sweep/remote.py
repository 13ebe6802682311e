"""The files of a sweep in a place that fsspec knows: `s3://bucket/prefix`, and what else is installed for it.

An object is there whole or not at all. A run directory is made in a temporary folder of the worker and sent when it is
whole, before the result that leads to it. There are no locks of a kernel: a driver writes an object every few seconds,
and one that has not been written for longer belongs to a driver that was killed.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvdrift.errors import EngineUnavailable, UsageError
from kvdrift.sweep.files import StoreError

DRIVER = "driver.json"
# What keeps a place that does not answer from being waited for by minutes, for the protocols that know it.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 10, "retries": {"max_attempts": 2}}},
}


class RemoteFiles:
    """The files of a place of fsspec; see `kvdrift.sweep.files.Files`. Credentials and endpoints are the environment's.

    Args:
        url: such as "s3://bucket/prefix".
        beat_s: seconds between two signs of a driver.
        stale_s: age of its last sign from which on a driver counts as dead; clocks must agree to within that.
    """

    def __init__(self, url: str, *, beat_s: float = 5.0, stale_s: float = 30.0) -> None:
        self.name = url.rstrip("/")
        self.beat_s, self._stale_s = beat_s, stale_s
        protocol = url.partition("://")[0]
        try:
            from fsspec import get_filesystem_class

            known = get_filesystem_class(protocol)
        except ModuleNotFoundError as error:
            raise EngineUnavailable(f"{url} needs 'fsspec'; pip install 'kvdrift[s3]'") from error
        except ImportError as error:
            raise EngineUnavailable(
                f"{url} needs another package: {_line(error)}; pip install 'kvdrift[s3]'"
            ) from error
        except ValueError as error:
            raise UsageError(
                f"fsspec knows no {protocol}:// ({url}); name a path, or such as s3://bucket/prefix"
            ) from error
        with self._talking():
            self._fs: Any = known(use_listings_cache=False, **_OPTIONS.get(protocol, {}))
            self._root = str(self._fs._strip_protocol(self.name))

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Make one kind of error of what a file system raises."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:  # each file system has exceptions of its own
            raise StoreError(_line(error)) from error

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def begin(self) -> list[str]:
        """Return the names of what lies there; places of this kind need not be made."""
        with self._talking():
            try:
                found = self._fs.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
        return [name.rstrip("/").rpartition("/")[2] for name in found]

    def read(self, name: str) -> bytes:
        """Return the bytes of a file."""
        with self._talking():
            data: bytes = self._fs.cat_file(self._at(name))
        return data

    def read_all(self, folder: str) -> Iterator[bytes]:
        """Yield the bytes of the .json files of a folder, which are fetched together."""
        with self._talking():
            names = [name for name in self._fs.find(self._at(folder)) if name.endswith(".json")]
            found: dict[str, bytes] = self._fs.cat(names, on_error="omit") if names else {}
        yield from found.values()

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        with self._talking():
            try:
                self._fs.pipe_file(self._at(name), data)
            except FileNotFoundError as error:  # a bucket that is not there
                raise StoreError(_line(error)) from error

    @contextmanager
    def filled(self, folder: str) -> Iterator[Path]:
        """Yield a temporary path; what was made there takes the place of what lay in the folder."""
        with tempfile.TemporaryDirectory(prefix="kvdrift-cell-") as space:
            made = Path(space) / Path(folder).name
            yield made
            files = sorted(file for file in made.rglob("*") if file.is_file())
            with self._talking():
                with suppress(FileNotFoundError):
                    self._fs.rm(self._at(folder), recursive=True)
                if files:
                    names = [f"{self._at(folder)}/{file.relative_to(made).as_posix()}" for file in files]
                    self._fs.put([str(file) for file in files], names)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the directory by a sign every few seconds."""
        age = self._age()
        if age is not None and age < self._stale_s:
            raise BlockingIOError(
                0, f", or its driver was killed less than {self._stale_s:.0f} s ago and another may begin soon"
            )
        sign = json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode()
        self.write(DRIVER, sign)
        end = threading.Event()

        def beat() -> None:
            while not end.wait(self.beat_s):
                with suppress(OSError):  # the driver's own writing tells of it
                    self.write(DRIVER, sign)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()
            with suppress(OSError), self._talking():
                self._fs.rm_file(self._at(DRIVER))

    def is_held(self) -> bool:
        """Whether a driver gave a sign lately."""
        age = self._age()
        return age is not None and age < self._stale_s

    def _age(self) -> float | None:
        """Seconds since the last sign of a driver; None if there is none."""
        with self._talking():
            try:
                last: datetime = self._fs.modified(self._at(DRIVER))
            except FileNotFoundError:
                return None
        return time.time() - (last if last.tzinfo else last.replace(tzinfo=UTC)).timestamp()


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


__all__ = ["DRIVER", "RemoteFiles"]
