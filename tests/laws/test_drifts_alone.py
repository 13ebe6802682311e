"""Drift by itself, without the other figures: the same numbers to the bit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from kvdrift.pairing.align import Aligner
from kvdrift.pairing.kernels import LONG, count_differing, measure, relative_drifts
from kvdrift.pairing.measure import DRIFTS, compare, compare_drifts
from kvdrift.trace.model import PassPair, Trace
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import Site

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


def both(dtype: Any, n_elements: int = 96) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows that differ, are equal, zero, or zero on one side."""
    rng = np.random.default_rng(1)
    prefill = rng.standard_normal((6, n_elements))
    decode = prefill * (1.0 + 1e-2 * rng.standard_normal(prefill.shape))
    decode[1] = prefill[1]
    prefill[2] = decode[2] = prefill[3] = decode[4] = 0.0
    return prefill.astype(dtype), decode.astype(dtype)


@pytest.mark.parametrize("shift", [None, 24], ids=["values", "scores"])
@pytest.mark.parametrize("value", [None, np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_drift_alone_is_that_of_all_figures(dtype: Any, value: float | None, shift: int | None) -> None:
    prefill, decode = both(dtype)
    if value is not None:
        prefill[0, 3] = decode[0, 3] = decode[5, 7] = value
    figures = measure(prefill, decode, free_shift_of=shift)

    np.testing.assert_array_equal(relative_drifts(prefill, decode, free_shift_of=shift), figures.rel_l2)
    np.testing.assert_array_equal(count_differing(prefill, decode), figures.n_differ)


@pytest.mark.parametrize("scale", [1.0, 1e-170, 1e160])
def test_drift_alone_of_long_rows(scale: float) -> None:
    prefill, decode = (scale * side for side in both(np.float64, LONG + 96))

    np.testing.assert_allclose(relative_drifts(prefill, decode), measure(prefill, decode).rel_l2, rtol=1e-13)


def test_a_block_of_drifts_is_a_part_of_the_whole_block() -> None:
    def trace(pass_name: Any, seed: int) -> Trace:
        rng = np.random.default_rng(seed)
        found = Trace("p", pass_name, "test", "float64", (1, 2, 3, 4))
        for layer in range(3):
            found.add_rows(layer, Site.MLP_OUT, (2, 3), rng.standard_normal((2, 32)))
            scores = rng.standard_normal((2, 4, 4))
            scores[0, :, 3] = -np.inf
            scores[1, :, layer] = -np.inf if pass_name == "decode" and layer == 1 else scores[1, :, layer]
            found.add_rows(layer, Site.ATTN_SCORES, (2, 3), scores, np.arange(4))
            n = 3 if pass_name == "decode" and layer == 2 else 4  # the last slot is lost
            found.add_cache_read(layer, Site.K_CACHE, (3,), np.arange(n), rng.standard_normal((n, 2, 8)))
        return found

    pair = PassPair(Mode.AS_DESIGNED, trace("prefill", 1), trace("decode", 2), (2, 3))
    whole = compare(Aligner(pair), "m", with_hashes=False)
    part = compare_drifts(Aligner(pair), "m")

    assert tuple(part.columns) == DRIFTS
    assert set(whole.columns["n_lost"].tolist()) == {0, 1}
    for name in DRIFTS:
        assert part.columns[name].dtype == whole.columns[name].dtype, name
        np.testing.assert_array_equal(part.columns[name], whole.columns[name])
