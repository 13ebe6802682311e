"""Every cause that a diagnosis can name comes with what to do about it."""

import ast
import re
from pathlib import Path

import kvdrift.diagnosis
from kvdrift.report.remedies import remedy
from kvdrift.vocabulary.causes import UNEXPLAINED
from kvdrift_bench.planted.torch import corpus_for

PACKAGE = Path(kvdrift.diagnosis.__file__).parent


def named_causes() -> set[str]:
    """Causes written out as the second argument of a candidate, or as the first of a pair, in the package."""
    found: set[str] = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Candidate":
                found |= {arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)}
    return found


def test_every_cause_of_the_corpus_has_a_remedy() -> None:
    causes = {cause for fault in corpus_for(3) for cause in (fault.cause, *fault.also)} - {UNEXPLAINED}

    assert not {cause for cause in causes if remedy(cause) is None}


def test_every_cause_that_a_diagnosis_spells_out_has_a_remedy() -> None:
    causes = named_causes()

    assert len(causes) > 20
    assert not {cause for cause in causes if remedy(cause) is None}


def test_that_check_can_fail() -> None:
    assert remedy("no_such_cause") is None
    assert remedy(UNEXPLAINED) is None


def test_a_remedy_is_a_sentence() -> None:
    for cause in named_causes():
        text = remedy(cause)
        assert text is not None
        assert re.fullmatch(r"[A-Z].*[.]", text), text
