"""Rows that decode keeps by scales of their own: all of them are, or none is taken for it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from kvdrift.pairing.rowscales import row_scales_of
from kvdrift.trace.model import Trace
from kvdrift.vocabulary.sites import Site

SLOTS, HEADS, DIM, POSITION = 9, 2, 8, 8
KEYS = np.random.default_rng(1).standard_normal((SLOTS, HEADS, DIM))
SCORES = np.random.default_rng(2).standard_normal((HEADS, SLOTS))
FACTORS = np.random.default_rng(3).uniform(2.0, 5.0, (SLOTS, HEADS))

Floats = NDArray[np.float64]


def trace_of(name: str, keys: Floats, scores: Floats = SCORES) -> Trace:
    trace = Trace("p", "prefill" if name == "prefill" else "decode", name, "float64", tuple(range(SLOTS)))
    slots = np.arange(SLOTS)
    trace.add_cache_read(0, Site.K_CACHE, (POSITION,), slots, keys)
    trace.add_rows(0, Site.ATTN_SCORES, (POSITION,), scores[None], slots)
    return trace


def scaled(factors: Floats, scores: Floats = SCORES) -> set[tuple[int, Site]]:
    decode = trace_of("decode", KEYS * factors[..., None], scores)
    return set(row_scales_of(trace_of("prefill", KEYS), decode, (POSITION,), ()))


def test_rows_that_all_have_a_factor_are_kept_by_scales_if_scores_are_the_same() -> None:
    assert scaled(FACTORS) == {(0, Site.K_CACHE)}


@pytest.mark.parametrize("slot", range(SLOTS))
def test_one_row_without_a_factor_shows_that_the_others_are_faults(slot: int) -> None:
    factors = FACTORS.copy()
    factors[slot] = 1.0

    assert scaled(factors) == set()


def test_a_factor_in_few_rows_and_one_that_scores_show_are_faults() -> None:
    few = np.ones_like(FACTORS)
    few[0] = 3.0

    assert scaled(few) == set()
    assert scaled(FACTORS, SCORES * 3.0) == set()
    assert scaled(-FACTORS) == set()
