"""Tests that share what costs run in one process: two workers of pytest-xdist do not make it twice."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

SHARED = """
import os
import pytest

@pytest.fixture(scope="module")
def shared():
    with open(os.environ["MADE"], "a") as made:
        made.write(__name__ + "\\n")

@pytest.mark.parametrize("n", range(6))
def test_a(shared, n): pass

def test_b(shared): pass
"""
NAMED = """
import os
import pytest

@pytest.mark.xdist_group("named")
@pytest.mark.parametrize("n", range(6))
def test_c(n):
    with open(os.environ["MADE"], "a") as made:
        made.write(f"named {os.environ['PYTEST_XDIST_WORKER']}\\n")
"""


def test_what_a_group_shares_is_made_once(tmp_path: Path, root: Path) -> None:
    shutil.copy(root / "tests" / "conftest.py", tmp_path)
    for name, text in (("one", SHARED), ("two", SHARED), ("three", NAMED)):
        (tmp_path / f"test_{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadgroup"]

    done = subprocess.run(
        [*command, "-c", os.devnull, "--rootdir", str(tmp_path), "--import-mode=importlib", str(tmp_path)],
        env={**os.environ, "MADE": str(tmp_path / "made")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout
    made = (tmp_path / "made").read_text().splitlines()
    assert sorted(line for line in made if not line.startswith("named")) == ["test_one", "test_two"]
    assert len({line for line in made if line.startswith("named")}) == 1
