"""How coarsely a dtype, a rung of the ladder or a kind of operation rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from kvdrift.vocabulary.sites import ATTENTION_ROW_SITES, CACHE_SITES, ROW_WISE, Site

HALF = ("bfloat16", "float16")
# Dtypes at which a product in float64 is a reference of what was computed.
MEASURED_PRODUCTS = (*HALF, "float32")
COARSEST = "bfloat16"  # what an engine is taken to compute in where it does not say


# Unit roundoff of round-to-nearest: half the distance from 1 to the next number.
UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}


class Rungs(NamedTuple):
    """The coarse and the fine rung of a precision ladder. Their drifts separate rounding from a fault.

    `pinned` is the unit roundoff of an operation in the feed-forward part that the fine rung cannot lift, such as an
    activation from a float16 table; 0 if there is none.
    """

    lower: str = "float32"
    upper: str = "float64"
    pinned: float = 0.0


RUNGS = Rungs()
LOWER, UPPER = RUNGS.lower, RUNGS.upper


class Roundoffs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Unit roundoff of each kind of operation at a native precision that is not a single dtype.

    Attributes:
        row_wise: of the results of norms, rotations and residual sums.
        product: of the activations in a product with a weight matrix.
        cache: of a row of K or V as it is stored.
        attention: of queries, probabilities and partial sums inside attention.
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
# Roundings to the native dtype by which two right ways to compute a row-wise result in float32 differ at most.
_ROW_WISE_DIFFERENCE = 2.0
# Products differ by one rounding of the native dtype; kernels that reduce partial sums at it, by a few.
PRODUCT_ROUNDINGS = 4.0
# A product that a model of half precision keeps in float32 (the router of many mixtures, some heads) is added up in no
# more digits than it is kept in. Two orders of its terms then differ by as many roundings as terms add, times what
# cancels: 64 times what a rounded result may differ by is still a 256th of a rounding to bfloat16.
_WIDE_SUMS = 64.0
# Attention rounds its probabilities too, and its output is small where values cancel.
_ATTENTION_ROUNDINGS = 16.0
_PROBABILITY_ROUNDINGS = 4.0 * _ATTENTION_ROUNDINGS

# Sites whose values have the native dtype, whatever their kernels compute in.
_OF_NATIVE_DTYPE = ROW_WISE | CACHE_SITES | {Site.ATTN_CTX}
_ATTENTION = ATTENTION_ROW_SITES | {Site.ATTN_CTX}


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How one rung rounds: as its dtype does, or, where no dtype says it, each kind of operation in its own way.

    Attributes:
        dtype: name of the rung: a dtype of `UNIT_ROUNDOFF`, or, with `roundoffs`, any name.
        roundoffs: unit roundoffs by kind of operation, of an engine that hands on float32 values and rounds inside its
            operations; None where the dtype says it all.
    """

    dtype: str
    roundoffs: Roundoffs | None = None

    @property
    def is_configured(self) -> bool:
        """Whether every kind of operation has a roundoff of its own."""
        return self.roundoffs is not None

    @property
    def can_judge(self) -> bool:
        """Whether what rounding can do is known without a ladder: sums are accumulated more finely than rounded."""
        return self.dtype in HALF or self.is_configured

    @property
    def unit(self) -> float:
        """The unit roundoff of the dtype, that of attention where each kind of operation has its own.

        Raises:
            KeyError: if the dtype is not known and there are no roundoffs.
        """
        return UNIT_ROUNDOFF[self.dtype] if self.roundoffs is None else self.roundoffs.attention

    def at(self, rung: str) -> Arithmetic:
        """Return the arithmetic of another rung of the same engine, whose name is a dtype."""
        return self if rung == self.dtype else Arithmetic(rung)

    def roundoff_at(self, site: Site) -> float:
        """Return the unit roundoff of what is computed at a site, that of its inputs included.

        An unknown dtype counts as float64, so that no difference passes for rounding.
        """
        if self.roundoffs is None:
            return UNIT_ROUNDOFF.get(self.dtype, UNIT_ROUNDOFF["float64"])
        if site in CACHE_SITES:
            return self.roundoffs.cache
        return self.roundoffs.attention if site in _ATTENTION else self.roundoffs.product

    def bound(self, site: Site, stored: str | None = None) -> float:
        """Return the relative difference, in the 2-norm, that rounding may make at a site whose inputs are equal.

        It is also the smallest relative change of all elements of the site that is seen there.

        Args:
            site: where the values are computed.
            stored: the dtype of the values, where it may be other than the native one, as of scores kept in float32.
                With `roundoffs` it says nothing.

        Raises:
            KeyError: if the dtype is not known and there are no roundoffs.
        """
        if self.roundoffs is None:
            row_wise = _ROW_WISE_DIFFERENCE
            unit = self.unit if stored is None or site in _OF_NATIVE_DTYPE else UNIT_ROUNDOFF.get(stored, self.unit)
        else:
            row_wise = ROW_WISE_ROUNDINGS
            unit = self.roundoffs.row_wise if site in ROW_WISE else self.roundoff_at(site)
        if site in ROW_WISE:
            return row_wise * unit
        if site is Site.ATTN_PROBS:
            return _PROBABILITY_ROUNDINGS * unit
        if site is Site.ATTN_CTX:
            return _ATTENTION_ROUNDINGS * unit
        is_kept = self.roundoffs is None and self.dtype in HALF and site not in ATTENTION_ROW_SITES
        is_wide = is_kept and unit < UNIT_ROUNDOFF["float16"]
        return PRODUCT_ROUNDINGS * unit * (_WIDE_SUMS if is_wide else 1.0)
