"""The explanation that a directed test gives: a cause and its size, where rounding hides it in every single value."""

from __future__ import annotations

import math
from collections.abc import Iterable

from kvdrift.instruments.base import Directed
from kvdrift.pairing.rows import Rows
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.evidence import Diagnosis
from kvdrift.vocabulary.precision import Arithmetic
from kvdrift.vocabulary.sites import Site

# Causes inside attention are read off its output.
_ATTENTION = (Site.ATTN_SCORES, Site.ATTN_PROBS, Site.ATTN_CTX)


def explain_directed(
    first: Address,
    causes: Iterable[Directed],
    rows: Rows,
    arithmetic: Arithmetic,
) -> Diagnosis | None:
    """Return what the directed tests found at the layer and site of the first failure, None if it is something else.

    A coefficient is there in many a fault that is not its cause. It is the explanation only if what it leaves over, in
    the drift `rows` of that mode at the native dtype, is no more than rounding.
    """
    found = next((cause for cause in causes if cause.address.place == first.place), None)
    if found is None:
        return None
    site = Site.ATTN_CTX if first.site in _ATTENTION else first.site
    largest = rows.largest_by_place(rows.rel_l2).get(Place(first.layer, site), math.inf)
    left = largest * math.sqrt(1.0 - min(1.0, max(0.0, found.explained)))
    if not left <= arithmetic.bound(site):
        return None
    low, high = found.interval
    text = (
        f"{_what(found)}, {found.size:+.3g} ({low:+.3g} to {high:+.3g}) over all positions; most of the rest of the "
        "difference is rounding"
    )
    return Diagnosis(found.cause, min(1.0, max(0.0, found.explained)), text)


def _what(found: Directed) -> str:
    site = found.address.site
    return {
        Cause.NORM_EPSILON: "decode's norms have an epsilon that is off",
        Cause.ROPE_BASE: f"decode turns {site} by angles of another base; its logarithm is off",
        Cause.ROPE_SCALING: f"decode turns {site} by angles that are all off by a factor, relatively",
        Cause.ROPE_POSITION_OFFSET: f"decode turns {site} as if at another position",
        Cause.SCORE_SCALE: "decode's scores are off by a factor, relatively",
        Cause.V_SCALE: "decode's attention output, or its values, are off by a factor, relatively",
        Cause.LOGIT_SCALE: "decode's logits are off by a factor, relatively",
    }.get(found.cause, f"{found.cause} at {site}: the coefficient of this cause")
