"""The benchmark of engines that others wrote, on the one of them that needs no other package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import engines
from benchmarks.support import SAID


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(engines.EXAMPLES))


def test_faults_are_planted_and_found_at_their_address() -> None:
    found = engines.audited("fixed cache")

    assert found["holds"]
    assert found["text"] == (
        "clean: STRUCTURAL_DRIFT; stale: MISMATCH at layer 1 / v_cache; shifted: MISMATCH at layer 0 / q_rope"
    )


def test_a_fault_that_is_not_planted_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    case = engines.CASES["fixed cache"]
    clean = engines.Case(case.module, (), lambda cache: None, case.shifted)
    monkeypatch.setitem(engines.CASES, "fixed cache", clean)

    assert not engines.audited("fixed cache")["holds"]


def test_every_adapter_of_another_package_is_audited() -> None:
    of_others = {path.stem for path in engines.EXAMPLES.glob("*_engine.py")} - {"numpy_engine"}

    assert {case.module for case in engines.CASES.values()} == of_others
    assert [name for name, case in engines.CASES.items() if any("==" not in each for each in case.packages)] == []


def test_an_engine_that_breaks_off_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    case = engines.CASES["fixed cache"]
    missing = engines.Case("no_such_engine", (), case.stale, case.shifted)
    monkeypatch.setattr(engines, "CASES", {"fixed cache": missing, "other": missing})
    said = len(SAID)

    # The process of its own knows the real table, and no engine named other.
    assert not engines.run(None)  # type: ignore[arg-type]
    assert "KeyError: 'other'" in SAID[-1]
    assert len(SAID) == said + 2


def test_the_process_of_an_engine_says_what_it_found() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.engines", "fixed cache"],
        env={"PYTHONPATH": f"{engines.EXAMPLES}:{':'.join(p for p in sys.path if p)}", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )

    assert json.loads(done.stdout.splitlines()[-1])["holds"]
