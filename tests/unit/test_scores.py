"""Scores are compared up to what softmax does not see, and no further."""

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.relabel import order_of_keys
from kvdrift.pairing.rows import DriftRow
from kvdrift.trace.model import Array, PassPair, Trace
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import Site

HEADS, KEYS, DIM = 3, 6, 4
TOKENS = tuple(range(KEYS))
LAST = KEYS - 1
Floats = NDArray[np.float64]


def attention(scores: Floats, values: Floats) -> tuple[Floats, Floats]:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probs = weights / weights.sum(axis=-1, keepdims=True)
    return probs, np.einsum("hk,hkd->hd", probs, values).ravel()


@pytest.fixture
def scores() -> Floats:
    return 3.0 * np.random.default_rng(1).standard_normal((HEADS, KEYS))


@pytest.fixture
def values() -> Floats:
    return np.random.default_rng(2).standard_normal((HEADS, KEYS, DIM))


def drift(prefill: tuple[Array, Array, Array], decode: tuple[Array, Array, Array]) -> dict[str, DriftRow]:
    """Rows of the drift table by site, of the scores, probabilities and context of one token."""
    traces = (Trace("p", "prefill", "full", "float64", TOKENS), Trace("p", "decode", "full", "float64", TOKENS))
    for trace, (scores, probs, context) in zip(traces, (prefill, decode), strict=True):
        trace.add_rows(0, Site.ATTN_SCORES, (LAST,), scores[None], np.arange(KEYS))
        trace.add_rows(0, Site.ATTN_PROBS, (LAST,), probs[None], np.arange(KEYS))
        trace.add_rows(0, Site.ATTN_CTX, (LAST,), context[None])
    table = DriftTable()
    table.add(PassPair(Mode.KV_ALIGNED, *traces, (LAST,)), "kv_aligned", with_hashes=True)
    assert table.unpaired == []
    return {row.site: row for row in table}


def test_a_constant_of_each_head_is_no_drift_but_not_the_same_bits(scores: Floats, values: Floats) -> None:
    shifted = scores + np.array([[3.0], [-7.0], [0.5]])
    found = drift((scores, *attention(scores, values)), (shifted, *attention(shifted, values)))
    assert found["attn_scores"].rel_l2 < 1e-15
    assert not found["attn_scores"].equal


def test_a_constant_on_some_of_the_keys_is_drift(scores: Floats, values: Floats) -> None:
    shifted = scores.copy()
    shifted[1, 2:] += 0.5
    found = drift((scores, *attention(scores, values)), (shifted, *attention(shifted, values)))
    assert found["attn_scores"].rel_l2 > 0.05


def test_a_constant_beside_masked_keys_is_that_of_the_others(scores: Floats, values: Floats) -> None:
    scores[:, 0] = -np.inf
    shifted = scores + 2.0
    found = drift((scores, *attention(scores, values)), (shifted, *attention(shifted, values)))
    assert found["attn_scores"].rel_l2 < 1e-15
    assert found["attn_scores"].n_lost == 0


def test_a_constant_does_not_hide_that_a_score_is_no_number(scores: Floats, values: Floats) -> None:
    broken = scores + 1.0
    broken[2, 3] = np.nan
    found = drift((scores, *attention(scores, values)), (broken, *attention(scores, values)))
    assert found["attn_scores"].rel_l2 == np.inf


def test_keys_in_another_order_are_no_drift_if_the_context_agrees(scores: Floats, values: Floats) -> None:
    order = np.random.default_rng(3).permutation(KEYS)
    turned = scores[:, order]
    probs, context = attention(turned, values[:, order])
    found = drift((scores, *attention(scores, values)), (turned, probs, context))
    assert found["attn_scores"].rel_l2 == 0.0
    assert found["attn_probs"].rel_l2 < 1e-15


def test_keys_in_another_order_than_their_values_are_drift(scores: Floats, values: Floats) -> None:
    order = np.random.default_rng(3).permutation(KEYS)
    turned = scores[:, order]
    found = drift((scores, *attention(scores, values)), (turned, *attention(turned, values)))
    assert found["attn_scores"].rel_l2 > 0.1
    assert found["attn_probs"].rel_l2 > 0.1


def test_one_head_in_another_order_is_no_order_of_keys(scores: Floats) -> None:
    turned = scores.copy()
    turned[1] = turned[1, ::-1]
    assert order_of_keys(scores, turned) is None


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_rows_that_are_no_numbers_have_no_order(scores: Floats, broken: float) -> None:
    turned = scores[:, ::-1].copy()
    turned[0, 0] = broken
    assert order_of_keys(scores, turned) is None


def test_scores_kept_more_finely_on_one_side_are_not_the_same_bits(scores: Floats, values: Floats) -> None:
    """What one side keeps in bfloat16 it has rounded: probabilities may differ although the rounded scores agree."""
    rounded = scores.astype(ml_dtypes.bfloat16)
    probs, context = attention(scores, values)
    found = drift((rounded, *attention(rounded.astype(np.float64), values)), (scores, probs, context))
    assert found["attn_scores"].rel_l2 == 0.0
    assert found["attn_scores"].n_differ == 0
    assert not found["attn_scores"].equal


def test_keys_are_put_in_order_whatever_rounding_swaps_in_one_combination_of_heads() -> None:
    random = np.random.default_rng(1)
    for _ in range(200):
        scores = 3.0 * random.standard_normal((4, 17))
        scores[:, 15:] = -np.inf
        prefill, decode = (
            rows.astype(ml_dtypes.bfloat16)
            for rows in (np.roll(scores, 5, axis=1), scores + 0.02 * random.standard_normal(scores.shape))
        )

        order = order_of_keys(prefill, decode)

        assert order is not None
        first, second = prefill.astype(float), decode[:, order].astype(float)
        assert np.array_equal(np.isfinite(first), np.isfinite(second))
        assert np.allclose(first[np.isfinite(first)], second[np.isfinite(first)], atol=0.5)
