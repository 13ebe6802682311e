"""Which of several explanations is named that remove as much of a difference, or nearly so."""

import ml_dtypes
import numpy as np
import pytest

from kvdrift.diagnosis.diagnose import diagnose
from kvdrift.diagnosis.model import Suspect, Values
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.sites import Site


def norm_suspect(root_of: type, epsilon: float = 1e-5) -> Suspect:
    """A norm of which decode rounds the inverse root to `root_of`, seen at two positions that hold the same token."""
    random = np.random.default_rng(3)
    x, weight = 8.0 * random.standard_normal(64), 1.0 + 0.1 * random.standard_normal(64)
    root = 1.0 / np.sqrt(np.mean(x**2) + epsilon)
    rounded = float(np.float64(root).astype(root_of).astype(np.float64))
    # What both passes hand on is float32.
    right, wrong = ((x * factor * weight).astype(np.float32).astype(np.float64) for factor in (root, rounded))
    right_side, wrong_side = (
        Values({(Site.LAYER_IN, p): x for p in (4, 5)} | {(Site.ATTN_NORM_OUT, p): side for p in (4, 5)}, {}, {})
        for side in (right, wrong)
    )
    return Suspect(Address("p", 4, 0, Site.ATTN_NORM_OUT), "float64", (4, 5), right_side, wrong_side, None)


def test_of_one_cause_too_the_form_counts_that_leaves_the_least_to_be_fitted() -> None:
    """One factor in all rows is explained by another epsilon as well as by a rounded root. The exact root says it
    almost as well as one that is fitted, and is not a coincidence."""
    for dtype in (ml_dtypes.bfloat16, np.float16):
        found = diagnose(norm_suspect(dtype)).diagnosis
        assert found.cause == "norm_dtype", found
        assert "rounds its inverse root to" in found.text


def test_the_cause_that_is_named_is_not_a_runner_up_to_itself() -> None:
    explained = diagnose(norm_suspect(ml_dtypes.bfloat16))
    others = [item.cause for item in explained.runners_up]
    assert others
    assert explained.diagnosis.cause not in others
    assert len(set(others)) == len(others)


@pytest.mark.parametrize(("unit", "noise"), [(2.0**-9, 0.0), (2.0**-24, 1e-7), (2.0**-11, 1e-4)])
def test_one_head_with_another_scale_is_told_from_rounding_in_the_others(unit: float, noise: float) -> None:
    """Whatever the precision: the other heads are off by much less, or not at all."""
    random = np.random.default_rng(5)
    right = random.standard_normal((4, 9))
    wrong = right * (1.0 + noise * random.standard_normal(right.shape))
    wrong[1] = right[1] * (1.0 + 2.0**-6)
    place, slots = (Site.ATTN_SCORES, 8), {(Site.ATTN_SCORES, 8): np.arange(9)}
    prefill, decode = (Values({place: side}, slots, {}) for side in (right, wrong))
    suspect = Suspect(Address("p", 8, 0, Site.ATTN_SCORES), "float64", (8,), prefill, decode, None, unit=unit)
    found = diagnose(suspect).diagnosis
    assert found.cause == "score_scale_head", found
    assert "heads [1]" in found.text
