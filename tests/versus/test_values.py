"""Values of a pass: products that are zero, and products that are not finite."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from kvdrift.trace.model import ProductRecord, Trace
from kvdrift.versus.values import values_of
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.sites import Site


def worst(values: list[float], exact: list[float], spread: list[float]) -> float:
    """The largest error of one product of three results, whose spread is kept in bfloat16."""
    trace = Trace("p", "prefill", "", "float32", (1,))
    row, reference = (np.array([each], dtype=np.float32) for each in (values, exact))
    terms = np.array([spread], dtype=ml_dtypes.bfloat16)
    trace.products.append(ProductRecord(0, Site.MLP_OUT, "down", (0,), row, reference, terms))
    return values_of(trace).products[Place(0, Site.MLP_OUT)][1]


def test_results_that_are_zero_hide_no_other() -> None:
    assert worst([0.0, 1.5, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]) == 0.5
    assert worst([0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]) == 0.0


def test_what_is_not_finite_or_comes_of_nothing_is_as_wrong_as_can_be() -> None:
    assert worst([float("nan"), 1.0, 2.0], [0.5, 1.0, 2.0], [1.0, 1.0, 2.0]) == np.inf
    assert worst([0.1, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]) == np.inf
