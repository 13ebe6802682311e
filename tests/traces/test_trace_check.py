"""`kvdrift trace check`: one page of what is there, what is missing and what that costs."""

from pathlib import Path

import pytest

from tests.support.command import kvdrift
from tests.support.examples import numpy_engine
from tests.support.written import Values, write_chain


def test_a_complete_recording_lacks_nothing(tmp_path: Path) -> None:
    done = kvdrift("trace", "check", numpy_engine(tmp_path / "t"))
    assert done.code == 0
    assert "Missing" not in done.out
    for text in (
        "replay of attention 2 of 2 layers",
        "second prefill     70 values",
        "layer 0-1: k_cache -> v_cache -> attn_ctx -> attn_out -> resid_attn -> mlp_out -> layer_out",
        "Can be a MISMATCH, or pass as a whole",
    ):
        assert text in done.out
    assert "STRUCTURAL_DRIFT" not in done.out  # nothing was judged


@pytest.mark.parametrize(
    ("sites", "said"),
    [
        ({"attn_ctx"}, ["attn_out (no)", "pass in the scope: up to attn_ctx"]),
        ({"embed_out"}, ["up to nothing", "cannot pass: no chain of sites in every layer"]),
        (None, ["K and V of 0 of 3 layers", "no slot is named", "or pass as a whole"]),
    ],
)
def test_what_is_missing_is_told_with_its_cost(tmp_path: Path, sites: set[str] | None, said: list[str]) -> None:
    def edit(name: str, layer: int | None, site: str, position: int, values: Values) -> Values | None:
        return values if sites is None or site in sites else None

    done = kvdrift("trace", "check", write_chain(tmp_path / "t", edit))
    assert done.code == 0
    for text in (
        "Missing, and what that costs:",
        "precision ladder   float32",
        "mode kv_aligned    not recorded",
        *said,
    ):
        assert text in done.out, done.out


def test_holes_are_told_before_anything_is_judged(tmp_path: Path) -> None:
    def hole(name: str, layer: int | None, site: str, position: int, values: Values) -> Values | None:
        return None if (name, layer, site, position) == ("decode", 1, "attn_ctx", 5) else values

    done = kvdrift("trace", "check", write_chain(tmp_path / "t", hole))
    assert "1 values lack one; first: p / pos 5 / layer 1 / attn_ctx, prefill: no partner" in done.out
    assert "Can be a MISMATCH, and cannot pass: values without a partner." in done.out


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert kvdrift("trace", "check", tmp_path / "empty").code == 5
    assert kvdrift("trace", "check", tmp_path / "none").code == 5
