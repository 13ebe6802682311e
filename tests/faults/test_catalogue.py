"""Each line of the catalogue has its function in each engine that it names, and each function its line."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kvdrift.errors import UsageError
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import Site
from kvdrift_bench.catalogue import Engine, FaultLine, catalogue, read_catalogue
from kvdrift_bench.planted import llamacpp, torch
from kvdrift_bench.planted.registry import Registry

LINE = 'class = "M06", ref = "a/repository#1", cause = "key_lost_middle", sites = "scores"'
TEXT = f"""
[sites]
scores = ["attn_scores", "attn_probs"]
few = ["attn_scores"]

[dtypes]
half = ["bfloat16", "float16"]

[faults]
everywhere = {{ in = "both", {LINE}, dtypes = "half", where = "Here.", llamacpp = {{ sites = "few", where = "So." }} }}
"in_one.5" = {{ in = "torch", {LINE}, layer = "two_thirds", where = "Layer {{layer}} reads layer {{below}}." }}
below = {{ in = "llamacpp", {LINE}, layer = "one_below", where = "Layer {{layer}}." }}

[twins]
same = {{ in = "both", ref = "owner/repository#2", why = "So.", llamacpp.why = "Otherwise." }}
"""


def registry(engine: Engine = "torch") -> Registry[FaultLine, Any, None]:
    return Registry(read_catalogue(TEXT).faults_of(engine))


def test_functions_are_bound_to_their_lines_in_the_order_of_the_catalogue() -> None:
    faults = registry()

    @faults.plant(name="in_one.5", first=lambda host: 3)
    def with_a_dot() -> None: ...

    @faults.plant(lambda host: "it lacks something")
    def everywhere() -> None: ...

    (first, line, planting), (second, _, other) = faults.bound()
    assert (first, second) == ("everywhere", "in_one.5")
    assert line.dtypes == ("bfloat16", "float16")
    assert (planting.what, planting.applies(None), planting.first) == (everywhere, "it lacks something", None)
    assert other.what is with_a_dot
    assert other.applies(None) is None
    assert other.first is not None
    assert other.first(None) == 3


def test_a_family_is_bound_line_by_line() -> None:
    faults = registry()

    @faults.family({"everywhere": 2.0, "in_one.5": 0.5})
    def scaled(factor: float) -> Any:
        return lambda value: value * factor

    assert {name: planting.what(10.0) for name, _, planting in faults.bound()} == {"everywhere": 20.0, "in_one.5": 5.0}


def test_a_line_without_a_function_is_an_error() -> None:
    faults = registry()
    faults.plant(name="everywhere")(len)

    with pytest.raises(LookupError, match=r"in the catalogue, and planted by no function: in_one\.5"):
        list(faults.bound())


@pytest.mark.parametrize("name", ["nowhere", "below"])
def test_a_function_without_a_line_for_its_engine_is_an_error(name: str) -> None:
    with pytest.raises(LookupError, match=f"'{name}' is planted, and the catalogue has no line for it in this engine"):
        registry("torch").plant(name=name)(len)


def test_a_line_with_two_functions_is_an_error() -> None:
    faults = registry()
    faults.plant(name="everywhere")(len)

    with pytest.raises(LookupError, match="'everywhere' is planted twice"):
        faults.plant(name="everywhere")(len)


def test_what_differs_in_llama_cpp_is_read_for_it_alone() -> None:
    read = read_catalogue(TEXT)
    mine, other = read.faults_of("torch")["everywhere"], read.faults_of("llamacpp")["everywhere"]

    assert (mine.sites, mine.where) == ((Site.ATTN_SCORES, Site.ATTN_PROBS), "Here.")
    assert (other.sites, other.where, other.cause) == ((Site.ATTN_SCORES,), "So.", Cause.KEY_LOST_MIDDLE)
    assert [read.twins_of(engine)["same"].facts("same").why for engine in ("torch", "llamacpp")] == [
        "So.",
        "Otherwise.",
    ]


def test_faults_of_one_layer_name_it() -> None:
    facts = read_catalogue(TEXT).faults_of("torch")["in_one.5"].facts("in_one.5", 4)
    below = read_catalogue(TEXT).faults_of("llamacpp")["below"].facts("below", 4)

    assert (facts.layer, facts.where) == (4, "Layer 4 reads layer 3.")
    assert (below.layer, below.where) == (3, "Layer 4.")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('sites = "scores"', 'sites = "score"', "no group of sites named 'score'"),
        ('dtypes = "half"', 'dtypes = "haff"', "no group of dtypes named 'haff'"),
        ('"attn_probs"', '"attn_prob"', "Invalid enum value 'attn_prob'"),
        ('"key_lost_middle"', '"key_lost"', "Invalid enum value 'key_lost'"),
        ('in = "both"', 'in = "vllm"', "Invalid enum value 'vllm'"),
        ('where = "Here."', 'were = "Here."', "unknown field `were`"),
        (', where = "Layer {layer}."', "", "missing required field `where`"),
        ("[sites]", "[sites", "Expected ']'"),
    ],
)
def test_a_mistake_in_the_catalogue_is_said(before: str, after: str, message: str) -> None:
    assert before in TEXT

    with pytest.raises(UsageError, match=re.escape(message)):
        read_catalogue(TEXT.replace(before, after))


def test_the_corpora_are_what_the_catalogue_says() -> None:
    lines = catalogue()
    corpora = {
        "torch": (torch.corpus_for(3), torch.clean_twins()),
        "llamacpp": (llamacpp.corpus_for(3), llamacpp.clean_twins()),
    }

    for engine, (faults, twins) in corpora.items():
        for items, known in ((faults, lines.faults), (twins, lines.twins)):
            expected = [name for name, line in known.items() if line.engines in (engine, "both")]
            assert [item.name for item in items] == expected
            assert len(expected) >= 11
    assert sum(line.engines == "both" for line in lines.faults.values()) >= 80
