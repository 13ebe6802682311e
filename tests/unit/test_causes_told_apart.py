"""Causes that were named in the place of others: each is told from its neighbour, from plain arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from kvdrift.diagnosis.diagnose import diagnose
from kvdrift.diagnosis.model import Suspect, Values, removed, share
from kvdrift.trace.model import CacheRead
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.evidence import Diagnosis
from kvdrift.vocabulary.facts import AttentionSpec
from kvdrift.vocabulary.sites import Site

Floats = NDArray[np.float64]
POSITIONS = (11, 12, 13, 14)
SLOTS, HEADS, DIM, WIDTH = 16, 2, 16, 64


def _random(*shape: int, seed: int = 7) -> Floats:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape))


def _told(site: Site, right: Floats, wrong: Floats, beside: dict[Site, Floats] | None = None) -> Diagnosis:
    """What is said of vectors [position, feature] of the passes, where `beside` is what both recorded."""
    sides = []
    for values in (right, wrong):
        rows = {
            (of, p): row for of, known in {site: values, **(beside or {})}.items() for p, row in _by_position(known)
        }
        sides.append(Values(rows, {}, {}))
    return diagnose(Suspect(Address("p", 11, 0, site), "float64", POSITIONS, sides[0], sides[1], None)).diagnosis


def _by_position(rows: Floats) -> zip[tuple[int, Any]]:
    return zip(POSITIONS, rows, strict=True)


# ------------------------------------------------------------------------------------- values that are nearly nothing


def test_what_is_nearer_to_zero_than_to_prefill_is_held_against_itself() -> None:
    prefill = _random(50)
    small = 0.01 * _random(50, seed=8)

    assert removed(prefill, small, np.zeros(50)) > 0.999
    assert share(prefill, small, np.zeros(50)) == pytest.approx(0.0, abs=1e-9)
    assert share(prefill, small, 1.01 * small) == pytest.approx(0.9999)
    assert share(prefill, np.zeros(50), np.zeros(50)) == 1.0


def _misread(rows: Floats, scale: float) -> tuple[Floats, Floats]:
    """Rows as they are kept in one format of eight bits, and as another one reads them."""
    codes = (rows / scale).astype(ml_dtypes.float8_e4m3fn)
    return codes.astype(np.float64) * scale, codes.view(ml_dtypes.float8_e5m2).astype(np.float64) * scale


def _of_cache(right: Floats, wrong: Floats) -> Diagnosis:
    sides = [
        Values({}, {}, {(Site.K_CACHE, 15): CacheRead(0, Site.K_CACHE, (15,), np.arange(SLOTS), rows)})
        for rows in (right, wrong)
    ]
    return diagnose(Suspect(Address("p", 15, 0, Site.K_CACHE), "float64", (15,), sides[0], sides[1], None)).diagnosis


def test_bits_of_another_float8_are_no_scale_that_is_lost() -> None:
    right, misread = _misread(_random(SLOTS, HEADS, DIM), 0.05)
    wrong = right.copy()
    wrong[15] = misread[15]
    told = _of_cache(right, wrong)

    assert (told.cause, told.text) == (
        "kv_bits_reinterpreted",
        "1 key rows are stored as float8_e4m3fn and read as float8_e5m2",
    )


def test_a_scale_that_is_lost_is_still_called_so() -> None:
    right, _ = _misread(_random(SLOTS, HEADS, DIM), 0.05)
    wrong = right.copy()
    wrong[15] *= 0.04

    assert _of_cache(right, wrong).cause == "k_scale_lost"


# ------------------------------------------------------------------------------------------------------------- scores


def _scores(change: Callable[[Floats, int], Floats]) -> Diagnosis:
    """What is said of the scores [head, key] of four heads of a model with large biases by position."""
    sides: list[dict[tuple[Site, int], Floats]] = [{}, {}]
    keys = np.arange(15)
    for position, queries in _by_position(_random(4, 4, 8)):
        right = 0.3 * queries @ _random(15, 8, seed=2)[: position + 1].T
        right = right + _SLOPES[:, None] * keys[: position + 1]
        for side, values in zip(sides, (right, change(right, position)), strict=True):
            side[Site.ATTN_SCORES, position] = values
    slots = {(Site.ATTN_SCORES, p): np.arange(p + 1) for p in POSITIONS}
    passes = [Values(side, dict(slots), {}) for side in sides]
    spec = AttentionSpec(0.3)
    return diagnose(
        Suspect(Address("p", 11, 0, Site.ATTN_SCORES), "float64", POSITIONS, passes[0], passes[1], spec)
    ).diagnosis


_SLOPES = 2.0 ** (-2.0 * np.arange(1, 5))


def test_slopes_of_other_heads_are_no_query_that_stands_still() -> None:
    wrong = _SLOPES[[0, 1, 0, 1]] - _SLOPES
    told = _scores(lambda right, position: right + 3000.0 * wrong[:, None] * np.arange(right.shape[1]))

    assert told.cause == "alibi_wrong"
    told = _scores(lambda right, position: right + wrong[:, None] * np.arange(right.shape[1]))
    assert told.cause == "alibi_slopes"
    assert "of the heads [0, 1, 0, 1]" in told.text


def test_a_query_that_stands_still_is_called_so() -> None:
    frozen = 0.3 * _random(4, 8, seed=5) @ _random(15, 8, seed=2).T + _SLOPES[:, None] * np.arange(15)

    assert _scores(lambda right, position: frozen[:, : position + 1]).cause == "query_frozen"


def _read(keys: Floats, read: Floats) -> Diagnosis:
    """What is said of the scores of a query on keys [slot, head, dim], of which decode scores others."""
    query, spec, place = _random(HEADS, DIM, seed=3), AttentionSpec(0.3), (Site.ATTN_SCORES, 15)
    cached = {(site, 15): CacheRead(0, site, (15,), np.arange(SLOTS), keys) for site in (Site.K_CACHE, Site.V_CACHE)}
    sides = [
        Values(
            {place: 0.3 * np.einsum("hd,shd->hs", query, rows), (Site.Q_ROPE, 15): query.ravel()},
            {place: np.arange(SLOTS)},
            dict(cached),
        )
        for rows in (keys, read)
    ]
    first = Address("p", 15, 0, Site.ATTN_SCORES)
    return diagnose(Suspect(first, "float64", (15,), sides[0], sides[1], spec)).diagnosis


def test_elements_of_keys_that_are_read_from_the_slot_beside_are_told() -> None:
    """A kernel that loads heads of a wider size takes the tail of each from the next row."""
    keys = _random(SLOTS, HEADS, DIM)
    read = keys.copy()
    read[:-1, :, -4:] = keys[1:, :, -4:]
    told = _read(keys, read)

    assert (told.cause, told.text) == (
        "keys_shifted",
        "decode reads the last 4 elements of each key from the slot behind it",
    )
    read[:, :, -4:] = _random(SLOTS, HEADS, 4, seed=9)
    assert _read(keys, read).cause == "unexplained"


# ---------------------------------------------------------------------------------------------- norms and what is added


def _norm(wrong: Callable[[Floats, Floats, Floats], Floats]) -> Diagnosis:
    """What is said of a layer norm, by its normed rows, its weight and its bias."""
    x, weight, bias = _random(4, WIDTH), 1.0 + 0.3 * _random(WIDTH, seed=2), 0.5 * _random(WIDTH, seed=3)
    normed = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    right = normed * weight + bias
    return _told(Site.ATTN_NORM_OUT, right, wrong(normed, weight, bias), {Site.LAYER_IN: x})


def test_a_variance_over_one_element_less_is_no_other_weight() -> None:
    told = _norm(lambda normed, weight, bias: normed * np.sqrt(1.0 - 1.0 / WIDTH) * weight + bias)
    assert told.cause == "norm_over_parts"
    assert "n - 1" in told.text

    told = _norm(lambda normed, weight, bias: 1.3 * normed * weight + bias)
    assert (told.cause, told.text) == ("scaled", "the norm of decode has a factor of 1.3 before its bias")


def test_a_layer_norm_of_another_value_is_told_with_its_bias() -> None:
    """A layer whose attention and feed-forward part share one norm, run as one that norms their sum."""
    stream, out = _random(4, WIDTH), _random(4, WIDTH, seed=8)
    weight, bias = 1.0 + 0.3 * _random(WIDTH, seed=2), 0.5 * _random(WIDTH, seed=3)
    sides = [(x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * weight + bias for x in (stream, stream + out)]
    told = _told(Site.ATTN_NORM_OUT, sides[0], sides[1], {Site.LAYER_IN: stream, Site.ATTN_OUT: out})

    assert told.cause == "norm_input_wrong", told
    assert "is given layer_in + attn_out in the place of layer_in" in told.text


def test_another_weight_and_another_bias_are_called_so() -> None:
    told = _norm(lambda normed, weight, bias: normed * np.roll(weight, 1) + np.roll(bias, 1))

    assert told.cause == "norm_weight_wrong"


@pytest.mark.parametrize(("part", "words"), [(slice(48), "first 48"), (slice(24, None), "last 40")])
def test_a_mean_square_over_some_elements_is_told_with_their_number(part: slice, words: str) -> None:
    x, weight = _random(4, WIDTH), 1.0 + 0.3 * _random(WIDTH, seed=2)
    sides = [x / np.sqrt((x[:, of] ** 2).mean(-1, keepdims=True)) * weight for of in (slice(None), part)]
    told = _told(Site.ATTN_NORM_OUT, sides[0], sides[1], {Site.LAYER_IN: x})

    assert told.cause == "norm_over_parts"
    assert f"the {words} of 64 elements" in told.text


def test_one_factor_of_a_norm_is_no_other_weight() -> None:
    right = _random(4, WIDTH)
    told = _told(Site.K_NORM, right, 2.0**0.5 * right)

    assert (told.cause, told.text) == ("scaled", "decode multiplies this value by 1.41421356 at every position")
    told = _told(Site.K_NORM, right, right * (1.0 + 0.3 * _random(WIDTH, seed=2)))
    assert told.cause == "norm_weight_wrong"


def test_a_single_element_is_no_adapter() -> None:
    right = _random(4, WIDTH)
    wrong = right.copy()
    wrong[:, 5] = _random(4, seed=4)
    assert _told(Site.ATTN_OUT, right, wrong).cause == "unexplained"

    update = np.outer(_random(4, seed=4), _random(WIDTH, seed=5))
    assert _told(Site.ATTN_OUT, right, right + update).cause == "adapter_missing"


def test_a_factor_in_front_of_a_sum_is_called_a_factor() -> None:
    stream, added = _random(4, WIDTH), _random(4, WIDTH, seed=8)
    beside = {Site.RESID_ATTN: stream, Site.MLP_OUT: added}
    told = _told(Site.LAYER_OUT, stream + 0.3 * added, stream + added, beside)

    assert told.cause == "operation_skipped"
    assert "the factor 0.3 that stands between" in told.text
