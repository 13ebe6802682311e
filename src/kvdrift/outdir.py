"""The directory of a run: written under a temporary name beside its place, and renamed into it when it is whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from kvdrift.errors import UsageError

# A directory with one of these was written by kvdrift, and may be replaced by a new run.
_MARKS = ("report.json", "drift.parquet")


class RunDirectory:
    """A place for a report that is either whole or not there. With `target` None nothing is written at all.

    Raises:
        UsageError: the place cannot be written, or holds files that are not an earlier run.
    """

    def __init__(self, target: Path | None) -> None:
        self.target = None if target is None else target.absolute()
        self.work: Path | None = None

    @property
    def traces(self) -> Path | None:
        """Where traces go, None if nothing is written."""
        return None if self.work is None else self.work / "traces"

    def __enter__(self) -> RunDirectory:
        if self.target is None:
            return self
        check_target(self.target)
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.work = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.", suffix=".part", dir=self.target.parent))
            (self.work / "traces").mkdir()
        except OSError as error:
            raise UsageError(
                f"cannot write to --out {self.target}: {error.strerror or error}; name a directory you may write to"
            ) from error
        return self

    def commit(self) -> None:
        """Put the finished directory in its place; an earlier run that stood there is gone only afterwards."""
        assert self.work is not None
        assert self.target is not None
        if not any(self.work.joinpath("traces").iterdir()):
            self.work.joinpath("traces").rmdir()
        self.work.chmod(0o755 & ~_umask())
        if self.target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.", suffix=".old", dir=self.target.parent))
            os.replace(self.target, old / "run")
            os.replace(self.work, self.target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(self.work, self.target)
        self.work = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.work is not None:
            shutil.rmtree(self.work, ignore_errors=True)
            self.work = None


def check_target(target: Path) -> None:
    """Refuse a place that cannot become a run directory, before any work is done for it.

    Raises:
        UsageError: it holds something that is not an earlier run, or it lies where nothing can be written.
    """
    if target.exists() and not _is_replaceable(target):
        raise UsageError(
            f"--out {target} exists and is not the directory of an earlier run; name another place or remove it"
        )
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"cannot write to --out {target}: {parent} is not a directory that you may write to")


def _is_replaceable(target: Path) -> bool:
    if not target.is_dir():
        return False
    names = {item.name for item in target.iterdir()}
    return not names or any(mark in names for mark in _MARKS)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
