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
whatever went into the newest row, and which keys are seen is no matter of rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvdrift.compare.drift import NO_LAYER, DriftRow
from kvdrift.instruments.ladder import Key
from kvdrift.vocabulary.precision import Roundoffs, configured_bound
from kvdrift.vocabulary.sites import ATTENTION_ROW_SITES, CACHE_SITES, PARENTS, Site

# The most by which an operation enlarges a relative difference of its inputs. A matrix with inputs along its small
# singular directions, or a residual that cancels, enlarges it. The largest that clean runs showed beyond the rounding
# of the operation itself is written in decision 15, by `./run bench growth`.
GROWTH = 32.0
COPIED = 2.0
_COPIES = frozenset({Site.Q_ROPE, Site.K_ROPE}) | CACHE_SITES


@dataclass(frozen=True, slots=True)
class Carried:
    """One address whose inputs differ: its difference over the bound, and that bound."""

    excess: float
    bound: float


def judge_carried(row: DriftRow, rows: dict[Key, DriftRow], lost: set[Key], roundoffs: Roundoffs) -> Carried | None:
    """Judge an address of kv_aligned by what its inputs differ by, None where that does not bound it."""
    site = Site(row.site)
    if (site not in PARENTS and site is not Site.LOGITS) or site is Site.ATTN_PROBS:
        return None
    if row.n_bad_past or (site in CACHE_SITES | ATTENTION_ROW_SITES and not math.isfinite(row.rel_l2)):
        return Carried(math.inf, 0.0)  # rows that nobody wrote, keys that one side has or sees: no rounding
    if site is Site.LAYER_OUT and not any((*row.key[:3], str(parent)) in rows for parent in PARENTS[site]):
        return None  # of a layer that was not recorded the boundaries alone are known
    router = rows.get((*row.key[:3], str(Site.ROUTER)))
    if site is Site.MLP_OUT and router is not None and not router.equal:
        return None
    inputs = difference_of_inputs(row, site, rows, lost, roundoffs)
    if inputs is None:
        return None
    bound = _bound(site, inputs, roundoffs)
    return Carried(row.rel_l2 / bound, bound)


def _bound(site: Site, inputs: float, roundoffs: Roundoffs) -> float:
    return configured_bound(site, roundoffs) + (COPIED if site in _COPIES else GROWTH) * inputs


def difference_of_inputs(
    row: DriftRow, site: Site, rows: dict[Key, DriftRow], lost: set[Key], roundoffs: Roundoffs
) -> float | None:
    """Return the largest relative difference of what `site` is computed from, at the prompt, position and layer of
    `row`; None if one of them cannot be told."""
    parents = (Site.FINAL_NORM_OUT,) if site is Site.LOGITS else PARENTS[site]
    layer = NO_LAYER if site is Site.LOGITS else row.layer
    known = [_difference(row, layer, parent, rows, lost, roundoffs) for parent in parents]
    found = [value for value in known if value is not None]
    return max(found) if len(found) == len(known) else None


def _difference(
    row: DriftRow, layer: int, site: Site, rows: dict[Key, DriftRow], lost: set[Key], roundoffs: Roundoffs
) -> float | None:
    """How far a site may differ: as measured, or, where it was not recorded, as far as its own inputs allow."""
    if site is Site.LAYER_IN:
        return 0.0  # prefill's own value, whatever the layer below handed over
    key = (row.prompt, row.position, layer, str(site))
    if key in lost:
        return None
    found = rows.get(key)
    if found is not None:
        return found.rel_l2 if math.isfinite(found.rel_l2) else None
    if site is Site.ROUTER:
        return 0.0  # no mixture of experts
    if site not in PARENTS:
        return None
    inputs = difference_of_inputs(row, site, rows, lost, roundoffs)
    return None if inputs is None else _bound(site, inputs, roundoffs)
