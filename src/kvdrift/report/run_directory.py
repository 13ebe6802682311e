"""The directory of a run: written in a hidden folder beside its place, and renamed to its place when it is whole.

The hidden folder `.<name>.<random>.part` holds `new`, the run that is being written, and during a commit `old`, what
stood in its place. It is locked while its run lives, and the kernel drops the lock of a killed run. The next run to the
same place removes the folder of a dead run, and puts `old` back if `new` has not taken its place. A live run's folder
is never touched.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType

from kvdrift.errors import UsageError

DEFAULT_PARENT = "kvdrift-runs"

# A directory with one of these was written by kvdrift, and may be replaced by a new run.
_MARKS = ("report.json", "drift.parquet", "drift.csv.gz")
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
        self._undo = ExitStack()

    @property
    def traces(self) -> Path | None:
        """Where traces go, None if nothing is written."""
        return None if self.work is None else self.work / "traces"

    def __enter__(self) -> RunDirectory:
        if self.target is None:
            return self
        check_target(self.target)
        place = _place(self.target)
        with _writing(self.target), ExitStack() as undo:
            undo.callback(_remove_empty, [folder for folder in place.parents if not folder.exists()])
            place.parent.mkdir(parents=True, exist_ok=True)
            _clear_stale(place.parent, glob.escape(place.name))
            self.work = _locked_part(place, undo) / "new"
            (self.work / "traces").mkdir(parents=True)
            self._undo = undo.pop_all()
        return self

    def commit(self) -> None:
        """Put the finished directory in its place; an earlier run that stood there is gone only afterwards."""
        assert self.work is not None
        assert self.target is not None
        _remove_empty([self.work / "traces"])
        with _writing(self.target):
            _put(self.work, _place(self.target))
        self._leave()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS and self.target is not None:
            with _writing(self.target):
                raise error

    def _leave(self) -> None:
        """Remove everything that is not a finished run."""
        self._undo.close()
        self.work = None


def check_target(target: Path) -> None:
    """Refuse a place that cannot become a run directory, before any work is done for it.

    Raises:
        UsageError: it holds something that is not an earlier run, or it lies where nothing can be written.
    """
    place = _place(target)
    with _writing(target):
        if not _is_replaceable(place):
            raise UsageError(
                f"--out {target} exists and is not the directory of an earlier run; name another place or remove it"
            )
        if os.path.ismount(place):
            raise UsageError(f"--out {target} is a mount point, which cannot be renamed; name a directory inside it")
        parent = next(folder for folder in place.parents if folder.exists())
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{parent} is not a directory")
        # Permissions lie: root may do anything, except on file systems that let nobody write. A directory is proof, and
        # one named like the hidden folder also shows that the name is not too long.
        _remove_empty([_new_part(parent, place.name)])


@contextmanager
def default_target(parent: Path | None = None) -> Iterator[Path]:
    """Yield a place that no other run has or will take while the context is open: kvdrift-runs/<time>[-n].

    The empty directory of that name is the claim. A finished run is renamed over it, and a failed one removes it.
    """
    folder = Path(DEFAULT_PARENT) if parent is None else parent
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    made = [] if folder.exists() else [folder]
    with _writing(folder / stamp):
        folder.mkdir(parents=True, exist_ok=True)
        _clear_stale(folder, "*")
        target = next(place for n in itertools.count(1) if _claim(place := folder / _numbered(stamp, n)))
    try:
        yield target
    finally:
        _remove_empty([target, *made])


def _numbered(stamp: str, n: int) -> str:
    return stamp if n == 1 else f"{stamp}-{n}"


def _claim(place: Path) -> bool:
    """Make a directory; False if something stands there already."""
    try:
        place.mkdir()
    except FileExistsError:
        return False
    return True


def _place(target: Path) -> Path:
    """Where a target really lies: a link is followed, so that the directory that it names is the one replaced."""
    return Path(os.path.realpath(target))


def _is_replaceable(place: Path) -> bool:
    """Whether nothing stands at a place, an empty directory, or an earlier run."""
    try:
        names = os.listdir(place)
    except FileNotFoundError:  # or another run replaces it at this moment
        return True
    except NotADirectoryError:
        return not os.path.lexists(place)  # it is the parent that is not a directory
    return not names or any(mark in names for mark in _MARKS)


def _new_part(parent: Path, name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".part", dir=parent))


def _locked_part(place: Path, undo: ExitStack) -> Path:
    """Make and lock the hidden folder of a run to `place`; `undo` will remove it and let the lock go."""
    while True:  # another run may take the folder for a dead run's in the moment between its making and its locking
        part = _new_part(place.parent, place.name)
        try:
            lock = os.open(part, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with suppress(OSError):  # on a file system without locks nobody can take a folder for a dead run's either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if part.exists():
            undo.callback(os.close, lock)
            undo.callback(_dissolve, part, place)
            return part
        os.close(lock)


def _put(work: Path, place: Path) -> None:
    """Rename `work` to `place`. What stands there is moved aside in front of it, unless it is an empty directory."""
    old = work.with_name("old")
    while True:
        try:
            os.replace(work, place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(old, ignore_errors=True)  # another run has taken the place since
            with suppress(FileNotFoundError):  # another run moves it aside at this moment
                os.replace(place, old)
        else:
            return


def _dissolve(part: Path, place: Path) -> None:
    """Remove the hidden folder of a run. What it has moved aside goes back unless the new run has taken its place."""
    if (part / "new").exists() and not place.exists():
        with suppress(OSError):  # nothing was moved aside, or another run takes the place at this moment
            os.replace(part / "old", place)
    shutil.rmtree(part, ignore_errors=True)


def _clear_stale(parent: Path, name: str) -> None:
    """Remove what killed runs to `name` (a pattern) have left."""
    for part in parent.glob(f".{name}.*.part"):
        with suppress(OSError), ExitStack() as undo:  # gone already, not a folder of ours, or its run is alive
            lock = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            undo.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            place = parent / part.name[1:].rsplit(".", 2)[0]
            _remove_empty([place])  # the claim of a default place
            _dissolve(part, place)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove directories, the innermost first, up to one that holds something."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Say of an OSError that the place cannot be written.

    Raises:
        UsageError: in its stead.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write to --out {target}: {error.strerror or error}; name a directory you may write to (out=...)"
        ) from error


def write_file(path: Path, text: str, option: str) -> None:
    """Write a file that is there whole or not at all; `option` is the one that named it.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, 0o666 & ~umask)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; name a file you may write with {option}") from error
