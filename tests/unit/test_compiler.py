"""Processes that compile in one folder take turns, and no lock of a dead one is waited for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer

import pytest

from kvdrift.engines.torch.compiler import turn_to_compile

KILLED = """
import os, signal, sys
from pathlib import Path
from kvdrift.engines.torch.compiler import turn_to_compile
folder = Path(sys.argv[1])
with turn_to_compile(folder):
    (folder / "lock").touch()  # as torch does
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    assert (done.returncode, (tmp_path / "lock").exists()) == (-9, True)

    with turn_to_compile(tmp_path):
        assert not (tmp_path / "lock").exists()
        (tmp_path / "lock").touch()
    assert (tmp_path / "lock").exists()  # whoever took the turn came to its end, and its lock is its own


def test_the_lock_of_another_program_is_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    Timer(0.5, lock.unlink).start()
    began = time.monotonic()

    with turn_to_compile(tmp_path):
        assert time.monotonic() - began > 0.4


def test_a_lock_that_nobody_can_hold_any_more_is_removed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    os.utime(lock, (time.time() - 60, time.time() - 60))

    with turn_to_compile(tmp_path, longest=30):
        assert not lock.exists()


def test_a_turn_that_ends_with_an_error_ends(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no compiler"), turn_to_compile(tmp_path):
        raise ValueError("no compiler")
    (tmp_path / "lock").touch()
    Timer(0.5, (tmp_path / "lock").unlink).start()
    began = time.monotonic()
    with turn_to_compile(tmp_path):
        assert time.monotonic() - began > 0.4
