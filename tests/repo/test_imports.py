"""`import kvdrift` is cheap: it brings in no inference engine."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "llama_cpp", "ray", "httpx"}


def loaded_after(statement: str) -> set[str]:
    """Return the names of all modules that a fresh interpreter holds after `statement`."""
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement", ["import kvdrift", "import kvdrift.cli.app", "import kvdrift.vocabulary.evidence"]
)
def test_importing_kvdrift_imports_no_engine(statement: str) -> None:
    assert not loaded_after(statement) & HEAVY


def test_importing_kvdrift_registers_nothing_outside_itself() -> None:
    assert "kvdrift.engines.hf" not in loaded_after("import kvdrift")


def test_that_the_check_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ray.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    assert loaded_after("import ray") & HEAVY == {"ray"}
