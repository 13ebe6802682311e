"""Causes that are told from plain arrays: each is named where it was planted, and not on what looks like it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from kvdrift.diagnosis.composed import explain_by_results
from kvdrift.diagnosis.diagnose import diagnose
from kvdrift.diagnosis.model import Suspect, Values
from kvdrift.diagnosis.plain import explain_grid
from kvdrift.trace.model import CacheRead
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.evidence import Diagnosis
from kvdrift.vocabulary.sites import Site

Floats = NDArray[np.float64]
POSITIONS = (11, 12, 13, 14)
SLOTS, HEADS, DIM, WIDTH = 16, 2, 16, 64
DOUBLE = 2.0**-53


def _random(*shape: int, seed: int = 7) -> Floats:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape))


def _vectors(
    site: Site, right: Floats, wrong: Floats, beside: dict[Site, Floats] | None = None, wrong_unit: float = DOUBLE
) -> Suspect:
    """Vectors [position, feature] of both passes, and what else both passes recorded."""
    noise = 1.0 + wrong_unit * np.random.default_rng(3).uniform(-1.0, 1.0, wrong.shape)
    sides = []
    for values in (right, wrong * noise):
        rows = {(site, p): row for p, row in zip(POSITIONS, values, strict=True)}
        for other, known in (beside or {}).items():
            rows |= {(other, p): row for p, row in zip(POSITIONS, known, strict=True)}
        sides.append(Values(rows, {}, {}))
    return Suspect(Address("p", POSITIONS[0], 0, site), "float64", POSITIONS, sides[0], sides[1], None, unit=wrong_unit)


def _cached(
    change: Callable[[Floats], Floats | None], site: Site = Site.K_CACHE, sizes: Floats | None = None
) -> Diagnosis:
    """What is said of cached rows [slot, head, dim] after `change`, at the last position; rows have `sizes` [slot]."""
    rows = _random(SLOTS, HEADS, DIM)
    rows = rows if sizes is None else rows * sizes[:, None, None]
    read = rows.copy()
    returned = change(read)
    read = read if returned is None else returned
    last = SLOTS - 1
    sides = [
        Values({}, {}, {(site, last): CacheRead(0, site, (last,), np.arange(SLOTS), values)}) for values in (rows, read)
    ]
    suspect = Suspect(Address("p", last, 0, site), "float64", (last,), sides[0], sides[1], None)
    return diagnose(suspect).diagnosis


# --------------------------------------------------------------------------------------------------- rows of the cache


def _clip(rows: Floats) -> Floats:
    return np.asarray(np.clip(rows, -0.9, 0.9))


def _interleaved(rows: Floats) -> Floats:
    return np.stack([rows[..., : DIM // 2], rows[..., DIM // 2 :]], -1).reshape(rows.shape)


def _dealt_out(rows: Floats) -> Floats:
    return np.asarray(rows[..., np.random.default_rng(2).permutation(DIM)])


def _in_a_basis(rows: Floats) -> Floats:
    matrix, _ = np.linalg.qr(_random(DIM, DIM, seed=3))
    return np.asarray(rows @ matrix)


def _mean_of_two(rows: Floats) -> None:
    rows[3] = rows[4] = (rows[3] + rows[4]) / 2.0


def _summed(rows: Floats) -> None:
    rows[5] = rows[5] + rows[4]


def _paged(rows: Floats) -> Floats:
    pages = rows.reshape(-1, 4, HEADS, DIM)
    return np.asarray(pages.transpose(0, 2, 1, 3).reshape(rows.shape))


def _kivi(rows: Floats) -> None:
    groups = rows[:12].reshape(3, 4, HEADS, DIM)
    least = groups.min(axis=1, keepdims=True)
    step = (groups.max(axis=1, keepdims=True) - least) / 3.0
    rows[:12] = (np.round((groups - least) / step) * step + least).reshape(12, HEADS, DIM)


def _unsigned(rows: Floats) -> Floats:
    step = np.abs(rows).max(axis=2, keepdims=True) / 127.0
    codes = np.round(rows / step)
    return np.asarray(np.where(codes < 0.0, codes + 256.0, codes) * step)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (_clip, "kv_clipped"),
        (_interleaved, "dims_permuted"),
        (_dealt_out, "dims_permuted"),
        (_in_a_basis, "keys_in_other_basis"),
        (_mean_of_two, "slots_merged"),
        (_summed, "rows_added"),
        (_paged, "k_transposed"),
        (_kivi, "kv_rounded_int2"),
        (_unsigned, "kv_codes_unsigned"),
    ],
)
def test_what_was_done_to_rows_is_named(change: Callable[[Floats], Floats | None], cause: str) -> None:
    diagnosis = _cached(change)

    assert diagnosis.cause == cause, diagnosis
    assert diagnosis.explained > 0.999


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda rows: 0.9 * rows, "k_scale_lost"),
        (lambda rows: np.where(np.abs(rows) > 0.9, 0.5 * rows, rows), "unexplained"),
        (lambda rows: np.sort(rows, axis=-1), "unexplained"),
        (lambda rows: rows @ _random(DIM, DIM, seed=3), "unexplained"),
        (lambda rows: rows + _random(*rows.shape, seed=5), "unexplained"),
    ],
)
def test_neighbours_of_such_rows_are_not_called_so(change: Callable[[Floats], Floats], cause: str) -> None:
    """A factor, elements that are halved and not cut off, sorted ones, any matrix, any noise."""
    assert _cached(change).cause == cause


def test_the_row_of_another_slot_is_not_a_sum_with_a_small_one() -> None:
    sizes = np.ones(SLOTS)
    sizes[5] = 0.001

    def alias(rows: Floats) -> None:
        rows[5] = rows[9]

    assert _cached(alias, sizes=sizes).cause == "slot_aliased"
    assert _cached(_summed, sizes=sizes).cause == "rows_added"


# ---------------------------------------------------------------------------------------------------------------- norms


def _normed(x: Floats, weight: Floats, bias: Floats | float = 0.0) -> Floats:
    return np.asarray(x / np.sqrt((x**2).mean(axis=-1, keepdims=True)) * weight + bias)


def _norm_cause(decode: Callable[[Floats, Floats], Floats], *, centred: bool = False) -> Diagnosis:
    x, weight = _random(len(POSITIONS), WIDTH) + 0.3, 1.0 + 0.3 * _random(WIDTH, seed=2)
    given = x - x.mean(axis=-1, keepdims=True) if centred else x
    suspect = _vectors(Site.ATTN_NORM_OUT, _normed(given, weight), decode(x, weight), {Site.LAYER_IN: x})
    return diagnose(suspect).diagnosis


def _by_halves(x: Floats, weight: Floats) -> Floats:
    return np.concatenate([_normed(part, 1.0) for part in np.split(x, 2, axis=-1)], axis=-1) * weight  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("decode", "centred", "cause", "word"),
    [
        (_by_halves, False, "norm_over_parts", "each of 2 parts"),
        (_normed, True, "norm_centred", "does not subtract"),
        (lambda x, w: _normed(x - x.mean(axis=-1, keepdims=True), w), False, "norm_centred", "subtracts the mean"),
        (lambda x, w: _normed(_normed(x, w), w), False, "norm_input_wrong", "twice"),
        (lambda x, w: _normed(x, 0.0 * w + 1.0), False, "norm_weight_wrong", "another weight"),
        (lambda x, w: _normed(x, 1.2 - w) + w, False, "norm_weight_wrong", "another bias"),
        (lambda x, w: _normed(x, w) + _random(*x.shape, seed=5), False, "unexplained", "no cause"),
    ],
)
def test_what_a_norm_does_otherwise_is_named(
    decode: Callable[[Floats, Floats], Floats], centred: bool, cause: str, word: str
) -> None:
    diagnosis = _norm_cause(decode, centred=centred)

    assert diagnosis.cause == cause, diagnosis
    assert word in diagnosis.text


# ------------------------------------------------------------------------------------------------------ residual stream


def test_a_norm_behind_attention_that_is_left_out_is_named() -> None:
    x, out = _random(len(POSITIONS), WIDTH), _random(len(POSITIONS), WIDTH, seed=2)
    weight = 1.0 + 0.3 * _random(WIDTH, seed=4)
    beside = {Site.LAYER_IN: x, Site.ATTN_OUT: out}

    left_out = diagnose(_vectors(Site.RESID_ATTN, x + _normed(out, weight), x + out, beside)).diagnosis
    assert left_out.cause == "operation_skipped", left_out
    # Half of it is something else.
    halved = diagnose(_vectors(Site.RESID_ATTN, x + _normed(out, weight), x + 0.5 * out, beside)).diagnosis
    assert halved.cause == "unexplained", halved


def test_a_sum_that_is_a_little_off_is_not_told_as_one_without_its_norm() -> None:
    x, out = _random(len(POSITIONS), WIDTH), _random(len(POSITIONS), WIDTH, seed=2)
    beside = {Site.LAYER_IN: x, Site.ATTN_OUT: out}
    off = 0.01 * _random(len(POSITIONS), WIDTH, seed=6)

    for sides in ((x + out, x + out + off), (x + out + off, x + out)):
        found = diagnose(_vectors(Site.RESID_ATTN, *sides, beside)).diagnosis
        assert found.cause == "unexplained", found


def test_another_weight_of_a_norm_behind_attention_is_named() -> None:
    x, out = _random(len(POSITIONS), WIDTH), _random(len(POSITIONS), WIDTH, seed=2)
    weight, other = (1.0 + 0.3 * _random(WIDTH, seed=seed) for seed in (4, 5))
    beside = {Site.LAYER_IN: x, Site.ATTN_OUT: out}

    found = diagnose(_vectors(Site.RESID_ATTN, x + _normed(out, weight), x + _normed(out, other), beside)).diagnosis
    assert found.cause == "norm_weight_wrong", found


def test_another_value_in_the_place_of_a_term_is_named() -> None:
    x, normed, out = (_random(len(POSITIONS), WIDTH, seed=seed) for seed in (1, 2, 3))
    beside = {Site.LAYER_IN: x, Site.ATTN_NORM_OUT: normed, Site.ATTN_OUT: out}

    found = diagnose(_vectors(Site.RESID_ATTN, x + out, normed + out, beside)).diagnosis
    assert found.cause == "residual_wrong", found
    assert "-1 times layer_in and +1 times attn_norm_out" in found.text
    other = diagnose(_vectors(Site.RESID_ATTN, x + out, normed**2 + out, beside)).diagnosis
    assert other.cause == "unexplained", other


# ----------------------------------------------------------------------------------------------------- sums of experts


def _experts(prefill: dict[str, float], decode: dict[str, float], unit: float = 2.0**-8, stray: float = 0.0) -> Suspect:
    """A part that adds up results of products with weights by their names, rounded by `unit`."""
    rows = {name: _random(len(POSITIONS), WIDTH, seed=i) for i, name in enumerate({**prefill, **decode})}
    sums = [sum(weight * rows[name] for name, weight in known.items()) for known in (prefill, decode)]
    suspect = _vectors(
        Site.MLP_OUT, np.asarray(sums[0]), np.asarray(sums[1]) + stray * _random(4, WIDTH, seed=99), None, unit
    )
    kept = {(name, p): row for name, values in rows.items() for p, row in zip(POSITIONS, values, strict=True)}
    return replace(
        suspect,
        prefill=replace(suspect.prefill, products=kept),
        decode=replace(suspect.decode, products=kept),
    )


SHARED, ROUTED = "mlp.shared_expert.down_proj", "mlp.experts"
ONE, TWO, THREE = (f"mlp.experts.{number}.down_proj" for number in (0, 1, 2))


@pytest.mark.parametrize(
    ("prefill", "decode", "cause", "word"),
    [
        ({ROUTED: 1, SHARED: 1}, {ROUTED: 1, SHARED: 0}, "shared_expert_missing", "decode leaves out"),
        ({ROUTED: 1, SHARED: 0}, {ROUTED: 1, SHARED: 1}, "shared_expert_missing", "prefill leaves out"),
        ({ROUTED: 1, SHARED: 0.4}, {ROUTED: 1, SHARED: 1}, "shared_expert_weight", "1 times"),
        ({ROUTED: 1, SHARED: 1}, {ROUTED: 0.4, SHARED: 1}, "expert_weights", "0.4"),
        ({ONE: 0.7, TWO: 0.3}, {ONE: 0.7, TWO: 0.0}, "expert_missing", TWO),
        ({ONE: 0.7, TWO: 0.3, THREE: 0.0}, {ONE: 0.7, TWO: 0.0, THREE: 0.3}, "expert_weights", "takes"),
    ],
)
def test_the_term_of_a_sum_that_has_another_weight_is_named(
    prefill: dict[str, float], decode: dict[str, float], cause: str, word: str
) -> None:
    found = explain_by_results(_experts(prefill, decode))

    assert found is not None
    assert found.cause == cause, found
    assert word in found.text


def test_a_sum_with_something_else_in_it_is_not_called_so() -> None:
    assert explain_by_results(_experts({ROUTED: 1, SHARED: 1}, {ROUTED: 1, SHARED: 0}, stray=0.3)) is None
    assert explain_by_results(_experts({"up": 1, "down": 1}, {"up": 1, "down": 0.5})) is None, "no experts"


# ------------------------------------------------------------------------------------------------------------- states


def _window(change: Callable[[Floats], Floats]) -> Diagnosis:
    """What is said of a window [channel, column], recorded flat, after a step that `change`d the one before first."""
    before, new, at = _random(32, 4, seed=1), _random(32, 1, seed=2), POSITIONS[1]
    right, wrong = (np.concatenate([known[:, 1:], new], axis=1) for known in (before, change(before)))
    sides = [
        Values({(Site.CONV_STATE, at - 1): before.ravel(), (Site.CONV_STATE, at): state.ravel()}, {}, {})
        for state in (right, wrong)
    ]
    suspect = Suspect(Address("p", at, 0, Site.CONV_STATE), "float64", POSITIONS, sides[0], sides[1], None)
    return diagnose(suspect).diagnosis


def test_columns_of_a_window_in_another_order_are_named() -> None:
    backwards = _window(lambda window: window[:, ::-1])
    assert backwards.cause == "conv_state_order", backwards
    assert "2, 1, 0, the new one" in backwards.text
    other = _window(lambda window: _random(32, 4, seed=8))
    assert other.cause == "unexplained", other


# ---------------------------------------------------------------------------------------------------- numbers of a grid


def _in_half(values: Floats) -> Floats:
    return values.astype(np.float16).astype(np.float64)


def test_a_value_computed_from_rounded_operands_is_told_by_the_grid_that_it_lies_on() -> None:
    x, matrix = _random(len(POSITIONS), WIDTH), _random(WIDTH, WIDTH, seed=2)
    right, wrong = x @ matrix, _in_half(_in_half(x) @ _in_half(matrix))

    found = explain_grid(_vectors(Site.Q_PROJ, right, wrong, wrong_unit=0.0))
    assert found is not None
    assert found.cause == "rounded_to_float16"
    for other in (x @ _in_half(matrix), _in_half(3.0 * right), 0.0 * right):
        assert explain_grid(_vectors(Site.Q_PROJ, right, other, wrong_unit=0.0)) is None, "no grid, or no rounding"
    assert explain_grid(_vectors(Site.Q_PROJ, _in_half(right), wrong, wrong_unit=0.0)) is None, "both passes lie on it"


def test_a_block_of_two_elements_is_not_told_as_scaled() -> None:
    """One element that is far off is all the difference there is, and some factor always explains it."""
    right = _random(len(POSITIONS), 4)
    wrong = right.copy()
    wrong[:, 0], wrong[:, 1] = -1e9, 1.01 * wrong[:, 1]

    assert diagnose(_vectors(Site.ROUTER, right, wrong)).diagnosis.cause == "unexplained"
