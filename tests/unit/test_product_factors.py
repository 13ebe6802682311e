"""Products that are off by one factor, and products that are only rounded in another way."""

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import pytest

from kvdrift.instruments.native import judge_native
from kvdrift.pairing.drift import DriftTable
from kvdrift.trace.model import Array, PassPair, Trace
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.facts import Prompt
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.precision import Arithmetic
from kvdrift.vocabulary.sites import Site
from kvdrift.vocabulary.units import repeated_units

POSITIONS = (3, 4, 5, 6)


def nearest(values: Array) -> Array:
    return values.astype(ml_dtypes.bfloat16)


def truncated(values: Array) -> Array:
    bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(ml_dtypes.bfloat16)


def gain(decoded: Callable[[Array], Array]) -> float | None:
    """The factor that is found at the logits of four positions, None if there is no fault."""
    tokens = tuple(range(8))
    prefill, decode = Trace("p", "prefill", "x", "bfloat16", tokens), Trace("p", "decode", "x", "bfloat16", tokens)
    for position in POSITIONS:
        rng = np.random.default_rng(position)
        given, exact = nearest(rng.normal(size=64)), rng.normal(size=4096)
        for trace, logits in ((prefill, nearest(exact)), (decode, decoded(exact))):
            trace.add_rows(None, Site.FINAL_NORM_OUT, (position,), given[None])
            trace.add_rows(None, Site.LOGITS, (position,), logits[None])
    table = DriftTable()
    table.add(PassPair(Mode.KV_ALIGNED, prefill, decode, POSITIONS), "kv_aligned", with_hashes=False)
    found = judge_native(table, "kv_aligned", Arithmetic("bfloat16"))
    assert (found.excess[Place(None, Site.LOGITS)] > 1.0) == bool(found.gains)
    return next((item.mean for item in found.gains.values()), None)


@pytest.mark.parametrize("factor", [1.01, 0.99, 1.005])
def test_a_factor_of_all_rows_is_found_with_its_size(factor: float) -> None:
    assert gain(lambda exact: nearest(np.multiply(factor, exact))) == pytest.approx(factor - 1.0, rel=0.05)


@pytest.mark.parametrize("kernel", [nearest, truncated, lambda exact: nearest(exact.astype(np.float32))])
def test_a_kernel_that_rounds_otherwise_is_no_factor(kernel: Callable[[Array], Array]) -> None:
    assert gain(kernel) is None


def excess_of_norms(n_units: int, names: Sequence[str] = ("p",)) -> float:
    """The excess at norms that decode rounds otherwise and makes an eighth of a roundoff too large."""
    table, prompts = DriftTable(), [Prompt(name, (0, 1, 2), tuple(range(n_units))) for name in names]
    for prompt in prompts:
        prefill, decode = (Trace(prompt.name, side, "x", "bfloat16", prompt.tokens) for side in ("prefill", "decode"))
        for position in prompt.probed:
            rng = np.random.default_rng(position)
            given, exact = nearest(rng.normal(size=64)), rng.normal(size=4096)
            wrong = exact * (1.0 + 2.0**-11) * (1.0 + 2.0**-9 * rng.normal(size=4096))
            for trace, rows in ((prefill, nearest(exact)), (decode, nearest(wrong))):
                trace.add_rows(0, Site.LAYER_IN, (position,), given[None])
                trace.add_rows(0, Site.ATTN_NORM_OUT, (position,), rows[None])
        table.add(PassPair(Mode.KV_ALIGNED, prefill, decode, prompt.probed), "kv_aligned", with_hashes=False)
    found = judge_native(table, "kv_aligned", Arithmetic("bfloat16"), repeated_units(prompts))
    return found.excess[Place(0, Site.ATTN_NORM_OUT)]


def test_a_factor_of_norms_takes_units_enough_and_names_do_not_make_them() -> None:
    """Two units agree up to a tenth by chance in one of fifteen places."""
    assert excess_of_norms(12) > 1.0
    assert excess_of_norms(2) <= 1.0
    assert excess_of_norms(2, [f"p{i}" for i in range(6)]) <= 1.0


@pytest.mark.parametrize(("factor", "is_fault"), [(1.0 + 2.0**-7, False), (3.0, True)])
def test_one_element_of_a_norm_is_a_flipped_rounding_or_a_fault(factor: float, is_fault: bool) -> None:
    """One flip of 4,096 elements is nothing, and one element that no flip makes is a fault however few they are."""
    table = DriftTable()
    given, exact = nearest(np.ones(64)), np.random.default_rng(1).normal(size=4096)
    wrong = exact.copy()
    wrong[np.abs(exact).argmax()] *= factor
    prefill, decode = (Trace("p", side, "x", "bfloat16", tuple(range(8))) for side in ("prefill", "decode"))
    for trace, row in ((prefill, exact), (decode, wrong)):
        trace.add_rows(0, Site.LAYER_IN, (3,), given[None])
        trace.add_rows(0, Site.ATTN_NORM_OUT, (3,), nearest(row)[None])
    table.add(PassPair(Mode.KV_ALIGNED, prefill, decode, (3,)), "kv_aligned", with_hashes=False)
    found = judge_native(table, "kv_aligned", Arithmetic("bfloat16"))
    assert (found.excess[Place(0, Site.ATTN_NORM_OUT)] > 1.0) == is_fault
