"""The catalogue of causes is whole: what a diagnosis returns and what is planted stands in it, and nothing else."""

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import kvdrift.diagnosis
from kvdrift.vocabulary import causes
from kvdrift.vocabulary.causes import FACTOR_OF, NEVER_NAMED, Cause
from kvdrift.vocabulary.sites import Site

PACKAGE = Path(kvdrift.diagnosis.__file__).parents[1]
CORPUS = Path(__file__).parents[1] / "golden" / "corpus.json"


def sources() -> list[str]:
    """The sources of the package, without the catalogue itself and the zoo, which spells keys of configurations."""
    zoo = PACKAGE / "zoo"
    paths = [path for path in PACKAGE.rglob("*.py") if path != Path(causes.__file__) and zoo not in path.parents]
    return [path.read_text(encoding="utf-8") for path in paths]


def referred_to(texts: Iterable[str]) -> set[str]:
    """Names of members that the code refers to, as X in `Cause.X`."""
    nodes = (node for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute))
    return {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "Cause"}


def spelled_out(texts: Iterable[str]) -> set[str]:
    """Causes that the code writes as plain strings."""
    nodes = (node for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
    return {str(node.value) for node in nodes} & set(Cause)


def planted() -> list[dict[str, Any]]:
    """The facts of every fault, of both engines."""
    corpus = json.loads(CORPUS.read_text(encoding="utf-8"))
    return [*corpus["torch"].values(), *corpus["llamacpp"].values()]


def returned() -> set[str]:
    """Names of members that some code of the package returns."""
    return referred_to(sources()) | {cause.name for cause in FACTOR_OF.values()}


def test_every_planted_cause_is_in_the_catalogue() -> None:
    names = {name for fault in planted() for name in (fault["cause"], *fault["also"])}

    assert len(names) > 90
    assert names <= set(Cause)


def test_every_cause_is_returned_or_declared_as_never_named() -> None:
    found, declared = returned(), {cause.name for cause in NEVER_NAMED}

    assert found | declared == set(Cause.__members__)
    assert not found & declared


def test_what_is_never_named_is_planted() -> None:
    assert {fault["cause"] for fault in planted()} >= NEVER_NAMED


def test_no_cause_is_written_as_a_string() -> None:
    assert not spelled_out(sources())


def test_these_checks_can_fail() -> None:
    code = "yield Candidate(1.0, Cause.NO_SUCH_CAUSE, text)\nyield Candidate(1.0, 'rope_base', text)"

    assert referred_to([code]) == {"NO_SUCH_CAUSE"}
    assert spelled_out([code]) == {Cause.ROPE_BASE}
    with pytest.raises(ValueError, match="no_such_cause"):
        Cause("no_such_cause")


def test_a_fault_is_planted_where_its_cause_is_named() -> None:
    elsewhere = []
    for fault in planted():
        named_at = Cause(fault["cause"]).sites
        if named_at and not named_at & {Site(site) for site in fault["sites"]}:
            elsewhere.append((fault["where"], fault["cause"], fault["sites"]))

    assert not elsewhere


def test_every_cause_but_one_has_a_remedy_in_whole_sentences() -> None:
    assert [cause for cause in Cause if cause.remedy is None] == [Cause.UNEXPLAINED]
    for cause in Cause:
        assert re.fullmatch(r"[A-Z].*[.]", cause.remedy or "None."), cause


def test_a_cause_is_written_by_its_name() -> None:
    assert json.dumps({"cause": Cause.ROPE_BASE, Cause.SCALED: 1.0}) == '{"cause": "rope_base", "scaled": 1.0}'
    assert f"{Cause.ROPE_BASE}" == "rope_base"
