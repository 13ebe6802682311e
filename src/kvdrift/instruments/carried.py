"""What differs where the inputs differ already, by rounding: in engines that hand on float32 values.

Such an engine rarely has the same bits in both passes: one token and many are multiplied by other kernels, whose
float32 sums differ in their last bits. An operation hands a difference of its inputs on, larger or smaller, and adds
its own rounding. So at a site

    ||decode - prefill|| <= (own rounding + A * largest relative difference of its inputs) * ||prefill||

with A the most by which the operation may enlarge a relative difference (its condition number; Higham, "Accuracy and
Stability of Numerical Algorithms", 2nd ed., section 1.6). A rotation keeps lengths and a stored row is a copy, so that
2 is generous; products with weights, norms and sums of residuals get a constant that is far beyond what models were
seen to do. What is measured at the inputs is taken as it is, so that a fault is found where it enters and not again
behind it.

Probabilities are left to replay, which computes them from the very operands; a mixture of experts is left out where its
router differs, since a near tie may turn. Rows of a cache that decode did not write are the same bytes,
whatever went into the newest row, and which keys are seen does not depend on rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kvdrift.instruments.walk import Index, Walk, carried_bound
from kvdrift.pairing.rows import Bools, Floats
from kvdrift.vocabulary.precision import Arithmetic
from kvdrift.vocabulary.sites import ATTENTION_ROW_SITES, CACHE_SITES, PARENTS, Site


@dataclass(frozen=True, slots=True)
class Carried:
    """Pairs whose inputs differ, each field an array [pair].

    Attributes:
        is_bounded: whether the difference of the inputs bounds that of the pair.
        excess: the relative difference of the pair over its bound; above 1 is beyond rounding, NaN where not bounded,
            and infinite where the difference cannot be rounding.
        bound: the largest relative difference, in the 2-norm, that rounding may make; NaN where not bounded.
    """

    is_bounded: Bools
    excess: Floats
    bound: Floats


def judge_carried(walk: Walk, at: Index, site: Site, arithmetic: Arithmetic) -> Carried:
    """Judge the pairs `at` [pair] of the rows of `walk`, all of `site`, in kv_aligned, by how much their inputs differ.

    An input whose difference is NaN, infinite or unknown bounds nothing. `arithmetic` must have roundoffs.
    """
    nothing = np.full(len(at), math.nan)
    if (site not in PARENTS and site is not Site.LOGITS) or site is Site.ATTN_PROBS:
        return Carried(np.zeros(len(at), dtype=bool), nothing, nothing)
    rows = walk.rows
    bound = carried_bound(site, walk.difference_of_inputs(at, site, arithmetic), arithmetic)
    if site is Site.LAYER_OUT:  # of a layer that was not recorded the boundaries alone are known
        bound = np.where(walk.has_parent(at, site), bound, math.nan)
    if site is Site.MLP_OUT:
        router = walk.find(at, Site.ROUTER)
        bound = np.where((router >= 0) & ~rows.equal[router], math.nan, bound)
    excess = rows.rel_l2[at] / bound
    # Rows that nobody wrote, keys that one side has or sees: no rounding.
    is_gross = rows.n_bad_past[at] > 0
    if site in CACHE_SITES | ATTENTION_ROW_SITES:
        is_gross |= ~np.isfinite(rows.rel_l2[at])
    excess, bound = np.where(is_gross, math.inf, excess), np.where(is_gross, 0.0, bound)
    return Carried(~np.isnan(bound), excess, bound)
