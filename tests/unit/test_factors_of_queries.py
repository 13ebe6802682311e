"""Factors that decode holds in its queries: the rows that are divided by them prove nothing by their bits, and rows
that no factor of a head leads to are not divided."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.folded import folds_of
from kvdrift.trace.model import PassPair, Trace
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import Site

SLOTS, HEADS, DIM, POSITION = 9, 4, 8, 8
KEYS = np.random.default_rng(1).standard_normal((SLOTS, HEADS, DIM))
QUERY = np.random.default_rng(2).standard_normal((HEADS, DIM))
SCORES = np.einsum("hd,shd->hs", QUERY, KEYS)
FACTORS = np.array([2.0, 0.5, 4.0, 1.0])  # powers of two: to divide by them rounds nothing

Floats = NDArray[np.float64]


def trace_of(name: str, query: Floats) -> Trace:
    trace = Trace("p", "prefill" if name == "prefill" else "decode", name, "float64", tuple(range(SLOTS)))
    slots = np.arange(SLOTS)
    trace.add_rows(0, Site.Q_ROPE, (POSITION,), query.reshape(1, -1))
    trace.add_cache_read(0, Site.K_CACHE, (POSITION,), slots, KEYS)
    trace.add_rows(0, Site.ATTN_SCORES, (POSITION,), SCORES[None], slots)
    return trace


def pair_of(query: Floats) -> PassPair:
    return PassPair(Mode.KV_ALIGNED, trace_of("prefill", QUERY), trace_of("decode", query), (POSITION,))


def test_a_row_that_is_divided_has_no_bits_of_its_own() -> None:
    table = DriftTable()
    table.add(pair_of(QUERY * FACTORS[:, None]), "kv_aligned", with_hashes=False)
    rows = {row.site: row for row in table}

    assert table.folded["kv_aligned"][0].heads == tuple(FACTORS)
    assert rows[Site.Q_ROPE].rel_l2 == 0.0
    assert not rows[Site.Q_ROPE].equal
    assert rows[Site.K_CACHE].equal


def test_rows_that_factors_of_heads_explain_in_part_are_not_divided() -> None:
    """Heads are off by a tenth as by a factor, and by half of that beside, near enough for each of them by itself."""
    noise = np.random.default_rng(3).standard_normal(QUERY.shape)
    noise *= 0.05 * np.linalg.norm(QUERY, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
    factors = np.array([1.1, 0.9, 1.1, 0.9])[:, None]

    def found(query: Floats) -> bool:
        pair = pair_of(query)
        return bool(folds_of(pair.prefill, pair.decode, pair.positions).by_layer)

    assert found(QUERY * factors)
    assert not found(QUERY * factors + noise)
