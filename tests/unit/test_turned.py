"""Queries and keys that are turned alike stand in another frame; turned by themselves they are wrong."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from kvdrift.pairing.drift import DriftTable
from kvdrift.trace.model import PassPair, Trace
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import Site

TOKENS = tuple(range(40, 52))
AT = len(TOKENS) - 1
HEADS, KV_HEADS, DIM = 4, 2, 8
Floats = NDArray[np.float64]


def turned(rows: Floats, by: float) -> Floats:
    """Rotate rows [.., dim] as `by` positions further on."""
    angles = by * 10000.0 ** -(np.arange(0, DIM, 2) / DIM)
    first, second = rows[..., : DIM // 2], rows[..., DIM // 2 :]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def pair(of_query: float, of_keys: float, *, with_query: bool = True, dtype: str = "float64") -> PassPair:
    """A token whose query and keys decode turns by so many positions more than prefill does."""
    random = np.random.default_rng(5)
    query, keys = random.normal(size=(HEADS, DIM)), random.normal(size=(len(TOKENS), KV_HEADS, DIM))
    traces = []
    for name in ("prefill", "decode"):
        is_decode = name == "decode"
        q, k = (turned(rows, by * is_decode) for rows, by in ((query, of_query), (keys, of_keys)))
        trace = Trace("p", "decode" if is_decode else "prefill", "full", dtype, TOKENS)
        if with_query:
            trace.add_rows(0, Site.Q_ROPE, (AT,), q.reshape(1, -1).astype(dtype))
        trace.add_rows(0, Site.K_ROPE, (AT,), k[-1].reshape(1, -1).astype(dtype))
        scores = np.einsum("hd,shd->hs", q, np.repeat(k, HEADS // KV_HEADS, axis=1))
        slots = np.arange(len(TOKENS))
        trace.add_rows(0, Site.ATTN_SCORES, (AT,), scores[np.newaxis].astype(dtype), slots)
        trace.add_cache_read(0, Site.K_CACHE, (AT,), slots, k.astype(dtype))
        traces.append(trace)
    prefill, decode = traces
    return PassPair(Mode.AS_DESIGNED, prefill, decode, (AT,))


def drift(of: PassPair) -> dict[str, float]:
    table = DriftTable()
    table.add(of, "as_designed", with_hashes=False)
    return {str(row.site): row.rel_l2 for row in table}


@pytest.mark.parametrize("with_query", [True, False], ids=["query", "scores alone"])
def test_what_is_turned_alike_is_turned_back(with_query: bool) -> None:
    found = drift(pair(3, 3, with_query=with_query))

    assert max(found.values()) < 1e-14
    assert len(found) == 3 + with_query


@pytest.mark.parametrize(("of_query", "of_keys"), [(1, 0), (0, 1), (3, 4)], ids=["query", "keys", "by another one"])
def test_what_is_turned_by_itself_stays_as_it_was_recorded(of_query: float, of_keys: float) -> None:
    found = drift(pair(of_query, of_keys))

    assert (found["q_rope"] > 0.1) == (of_query > 0)
    assert (found["k_cache"] > 0.1) == (found["k_rope"] > 0.1) == (of_keys > 0)
    # without its query, keys that are turned change the scores
    assert (drift(pair(of_query, of_keys, with_query=False))["k_cache"] > 0.1) == (of_keys > 0)


def test_a_query_of_another_size_stays_one() -> None:
    item = pair(3, 3)
    record = item.decode.rows[0]
    item.decode.rows[0] = type(record)(record.layer, record.site, record.positions, np.multiply(record.values, 1.5))

    assert drift(item)["q_rope"] > 0.4


def test_a_key_that_is_not_turned_as_the_others_leaves_all_as_they_were_recorded() -> None:
    item = pair(3, 3)
    (record,) = item.decode.cache
    record.rows[1] *= 1.1

    found = drift(item)

    assert found["k_cache"] > 0.1
    assert found["q_rope"] > 0.1


def test_half_precision_leaves_its_own_rounding() -> None:
    assert 0.0 < max(drift(pair(3, 3, dtype="float16")).values()) < 2e-3
