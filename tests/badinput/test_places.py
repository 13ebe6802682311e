"""An --out that cannot be written: exit code 2 before any work is done, and nothing is left there or beside it."""

import errno
import os
from pathlib import Path

import pytest

from kvdrift.errors import UsageError
from kvdrift.report.run_directory import RunDirectory, check_target
from tests.support.command import kvdrift, names, refused


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """These are refused before the model is loaded, which may take minutes."""

    def load(*args: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("kvdrift.engines.hf.load.load_model", load)


def test_a_file(here: Path) -> None:
    (here / "file").write_text("mine")

    refused(
        kvdrift("audit", "--out", "file"),
        2,
        "--out file exists and is not the directory of an earlier run; name another place or remove it",
    )
    assert (here / "file").read_text() == "mine"


def test_a_directory_of_something_else(here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "thesis.txt").write_text("mine")

    refused(
        kvdrift("audit", "--out", "mine"),
        2,
        "--out mine exists and is not the directory of an earlier run; name another place or remove it",
    )
    assert names(here) == {"mine"}
    assert names(here / "mine") == {"thesis.txt"}


@pytest.mark.parametrize("place", ["file/run", "file/a/run"])
def test_a_place_below_a_file(here: Path, place: str) -> None:
    (here / "file").write_text("mine")

    refused(
        kvdrift("audit", "--out", place),
        2,
        f"cannot write to --out {place}: {here / 'file'} is not a directory; name a directory you may write to "
        "(out=...)",
    )
    assert names(here) == {"file"}


def test_a_file_system_on_which_nobody_writes(here: Path) -> None:
    """Root passes every check of permissions there, and cannot make a directory."""
    folder = next((place for place in ("/proc", "/dev/fd", "/dev") if os.path.isdir(place)), "/")

    done = kvdrift("audit", "--out", f"{folder}/self/nope/run" if folder == "/proc" else f"{folder}/run")

    assert done.err.startswith(f"kvdrift: cannot write to --out {folder}")
    assert done.code == 2


def test_a_name_that_is_too_long(here: Path) -> None:
    done = kvdrift("audit", "--out", "x" * 250)

    assert done.err.endswith("File name too long; name a directory you may write to (out=...)\n")
    assert done.code == 2
    assert names(here) == set()


def test_a_link_to_nothing_is_not_written_through_by_chance(here: Path) -> None:
    os.symlink(here / "file", here / "link")
    (here / "file").write_text("mine")

    with pytest.raises(UsageError, match="exists and is not the directory of an earlier run"):
        check_target(here / "link")


def test_a_mount_point(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda place: Path(place).name == "disk")

    with pytest.raises(UsageError, match="is a mount point, which cannot be renamed; name a directory inside it"):
        check_target(here / "disk")


def test_the_check_leaves_nothing(here: Path) -> None:
    check_target(here / "a" / "b" / "run")

    assert names(here) == set()


def test_a_full_disk_in_the_middle_of_a_run(here: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UsageError, match=r"cannot write to --out .*: No space left on device; name"):  # noqa: SIM117
        with RunDirectory(here / "a" / "run"):
            raise full

    assert names(here) == set()


def test_other_errors_of_a_run_stay_what_they_are(here: Path) -> None:
    with pytest.raises(FileNotFoundError), RunDirectory(here / "a" / "run"):
        raise FileNotFoundError(errno.ENOENT, "a bug")

    assert names(here) == set()
