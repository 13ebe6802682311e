"""The directory of a run: written under a temporary name beside its place, and renamed into it when it is whole.

A temporary directory is locked while its run lives, and the kernel drops the lock of a run that was killed; the next
run to the same place then removes what it left. A live run's directory is never touched.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType

from kvdrift.errors import UsageError

DEFAULT_PARENT = "kvdrift-runs"

# A directory with one of these was written by kvdrift, and may be replaced by a new run.
_MARKS = ("report.json", "drift.parquet")
# A claim keeps two runs of one second apart; nobody asks for the name again after that second.
_CLAIM_S = 60.0
# What goes wrong with a disk in the middle of a run, and lies neither in the model nor in kvdrift.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class RunDirectory:
    """A place for a report that is either whole or not there. With `target` None nothing is written at all.

    Raises:
        UsageError: the place cannot be written, or holds files that are not an earlier run.
    """

    def __init__(self, target: Path | None) -> None:
        self.target = None if target is None else target.absolute()
        self.work: Path | None = None
        self._lock = -1
        self._made: list[Path] = []  # parents that this run has created, the innermost first

    @property
    def traces(self) -> Path | None:
        """Where traces go, None if nothing is written."""
        return None if self.work is None else self.work / "traces"

    def __enter__(self) -> RunDirectory:
        if self.target is None:
            return self
        check_target(self.target)
        place = _place(self.target)
        try:
            self._made = [folder for folder in place.parents if not folder.exists()]
            place.parent.mkdir(parents=True, exist_ok=True)
            _clear_stale(place.parent, _escape(place.name))
            self.work, self._lock = _locked_folder(place, ".part")
            (self.work / "traces").mkdir()
        except OSError as error:
            self._leave()
            raise UsageError(_cannot_write(self.target, error)) from error
        return self

    def commit(self) -> None:
        """Put the finished directory in its place; an earlier run that stood there is gone only afterwards."""
        assert self.work is not None
        assert self.target is not None
        if not any(self.work.joinpath("traces").iterdir()):
            self.work.joinpath("traces").rmdir()
        self.work.chmod(0o777 & ~_umask())
        place = _place(self.target)
        try:
            if not place.exists():
                os.replace(self.work, place)
                self.work = None
            elif not _exchange(self.work, place):
                _replace_in_two_steps(self.work, place)
                self.work = None
        except OSError as error:
            raise UsageError(_cannot_write(self.target, error)) from error
        self._made = []
        self._leave()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS and self.target is not None:
            raise UsageError(_cannot_write(self.target, error)) from error

    def _leave(self) -> None:
        """Remove what is not the finished run: the work directory, or the earlier run that changed places with it."""
        if self.work is not None:
            shutil.rmtree(self.work, ignore_errors=True)
            self.work = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # somebody else has put something there
                break
        self._made = []


def check_target(target: Path) -> None:
    """Refuse a place that cannot become a run directory, before any work is done for it.

    Raises:
        UsageError: it holds something that is not an earlier run, or it lies where nothing can be written.
    """
    place = _place(target)
    try:
        if os.path.lexists(place) and not _is_replaceable(place):
            raise UsageError(
                f"--out {target} exists and is not the directory of an earlier run; name another place or remove it"
            )
        if place.is_mount():
            raise UsageError(f"--out {target} is a mount point, which cannot be renamed; name a directory inside it")
        parent = next(folder for folder in place.parents if folder.exists())
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{parent} is not a directory")
        # Permissions lie: root may do anything, except on file systems that let nobody write. A directory is proof.
        os.rmdir(tempfile.mkdtemp(prefix=".kvdrift-", dir=parent))
        _part_of(place).exists()  # raises if a name is too long
    except OSError as error:
        raise UsageError(_cannot_write(target, error)) from error


@contextmanager
def default_target(parent: Path | None = None) -> Iterator[Path]:
    """Yield a place that no other run has or will take while the context is open: kvdrift-runs/<time>[-n]."""
    folder = Path(DEFAULT_PARENT) if parent is None else parent
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear_stale(folder, "*")
        target, claim = _claim(folder, stamp)
    except OSError as error:
        raise UsageError(_cannot_write(folder / stamp, error)) from error
    try:
        yield target
    finally:
        claim.unlink(missing_ok=True)
        if made:
            with suppress(OSError):  # the ordinary case: the run is in it
                folder.rmdir()


def _claim(folder: Path, stamp: str) -> tuple[Path, Path]:
    """Return the first free name, and the file that keeps others from taking it as well."""
    n = 1
    while True:
        target = folder / (stamp if n == 1 else f"{stamp}-{n}")
        claim = folder / f".{target.name}.claim"
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            n += 1
            continue
        if not target.exists():
            return target, claim
        claim.unlink()
        n += 1


def _place(target: Path) -> Path:
    """Where a target really lies: a link is followed, so that the directory that it names is the one replaced."""
    return Path(os.path.realpath(target))


def _part_of(place: Path) -> Path:
    return place.parent / f".{place.name}.12345678.part"


def _is_replaceable(place: Path) -> bool:
    if not place.is_dir():
        return False
    names = {item.name for item in place.iterdir()}
    return not names or any(mark in names for mark in _MARKS)


def _locked_folder(place: Path, suffix: str) -> tuple[Path, int]:
    """Make a hidden directory beside `place` and lock it; return it and the open file that holds the lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=suffix, dir=place.parent))
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # taken for stale in the moment between its making and its locking
            os.close(lock)
            continue
        except OSError:  # a file system without such locks: nobody can take it for stale either
            return folder, lock
        if folder.exists():
            return folder, lock
        os.close(lock)


def _clear_stale(parent: Path, name: str) -> None:
    """Remove what killed runs to `name` (a pattern) have left; an earlier run that one had moved away goes back."""
    for folder in [*parent.glob(f".{name}.*.old"), *parent.glob(f".{name}.*.part")]:
        place = parent / folder.name[1:].rsplit(".", 2)[0]
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # gone already, or nothing of ours
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.suffix == ".old" and not place.exists() and (folder / "run").is_dir():
                os.replace(folder / "run", place)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # its run is alive, or the file system cannot tell
            continue
        finally:
            os.close(lock)
    for claim in parent.glob(f".{name}.claim"):
        try:
            if claim.stat().st_mtime < time.time() - _CLAIM_S:
                claim.unlink()
        except OSError:  # its run has just ended
            continue


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _exchange(work: Path, place: Path) -> bool:
    """Let two directories change places in one step; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(work), os.fsencode(place)
    if sys.platform == "darwin":
        swap = getattr(libc, "renamex_np", None)
        return swap is not None and swap(first, second, ctypes.c_uint(2)) == 0  # RENAME_SWAP
    swap = getattr(libc, "renameat2", None)
    here = ctypes.c_int(-100)  # AT_FDCWD
    return swap is not None and swap(here, first, here, second, ctypes.c_uint(2)) == 0  # RENAME_EXCHANGE


def _replace_in_two_steps(work: Path, place: Path) -> None:
    """Move the earlier run aside, then the new one in; a run killed in between is put right by the next one."""
    old, lock = _locked_folder(place, ".old")
    try:
        os.replace(place, old / "run")
        try:
            os.replace(work, place)
        except OSError:
            os.replace(old / "run", place)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
        os.close(lock)


def _cannot_write(target: Path, error: OSError) -> str:
    return f"cannot write to --out {target}: {error.strerror or error}; name a directory you may write to (out=...)"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
