"""How coarsely a dtype, a rung of the ladder or a kind of operation rounds."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from kvdrift.vocabulary.sites import ATTENTION_ROW_SITES, CACHE_SITES, ROW_WISE, Site

HALF = ("bfloat16", "float16")


# Unit roundoff of round-to-nearest: half the distance from 1 to the next number.
UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}


class Rungs(NamedTuple):
    """The two rungs of a precision ladder whose drifts tell rounding from a fault, the coarse one and the fine one.

    `pinned` is the unit roundoff of an operation in the feed-forward part that the fine rung cannot lift, such as an
    activation that is looked up in a float16 table; 0 if there is none.
    """

    lower: str = "float32"
    upper: str = "float64"
    pinned: float = 0.0


RUNGS = Rungs()
LOWER, UPPER = RUNGS.lower, RUNGS.upper


class Roundoffs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How coarsely each kind of operation rounds at the native precision, where no single dtype says it.

    Attributes:
        row_wise: norms, rotations, residual sums: unit roundoff of the values that are handed on.
        product: what a product with a weight matrix rounds its activations to.
        cache: what a row of K or V is rounded to when it is stored.
        attention: what attention rounds queries, probabilities and partial sums to.
    """

    row_wise: float
    product: float
    cache: float
    attention: float

    @property
    def all(self) -> tuple[float, float, float, float]:
        """Every unit roundoff."""
        return self.row_wise, self.product, self.cache, self.attention


# Float32 roundings by which a row-wise operation may differ between two batch shapes, generously: a sum over a row in
# another order, an exponential or a root by another code path.
ROW_WISE_ROUNDINGS = 16.0
# Products differ by one rounding of the native dtype; kernels that reduce partial sums at it, by a few.
PRODUCT_ROUNDINGS = 4.0
# Attention rounds its probabilities too, and its output is small where values cancel.
ATTENTION_ROUNDINGS = 16.0


def roundoff_at(site: Site, roundoffs: Roundoffs) -> float:
    """Return the unit roundoff of what is computed at a site, that of its inputs included."""
    if site in CACHE_SITES:
        return roundoffs.cache
    return roundoffs.attention if site in ATTENTION_ROW_SITES | {Site.ATTN_CTX} else roundoffs.product


def configured_bound(site: Site, roundoffs: Roundoffs) -> float:
    """Return the relative difference that rounding may make at a site whose inputs are equal, where every kind of
    operation has a roundoff of its own and hands on float32 values."""
    if site in CACHE_SITES:
        return PRODUCT_ROUNDINGS * roundoffs.cache
    if site in ROW_WISE:
        return ROW_WISE_ROUNDINGS * roundoffs.row_wise
    if site is Site.ATTN_SCORES:
        return PRODUCT_ROUNDINGS * roundoffs.attention
    if site is Site.ATTN_PROBS:
        return 4.0 * ATTENTION_ROUNDINGS * roundoffs.attention
    if site is Site.ATTN_CTX:
        return ATTENTION_ROUNDINGS * roundoffs.attention
    return PRODUCT_ROUNDINGS * roundoffs.product
