"""Explanations by exact products: whether what fails is a product, or lies between products that are right.

What a product is multiplied by is in no trace. That its result is not the product of its operand with the weights that
the model holds is told by its exact reference, and so is that all products of a part are right.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from kvdrift.instruments.products import Off, Products
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.precision import HALF, UNIT_ROUNDOFF
from kvdrift.vocabulary.sites import Site

# A feed-forward part has two products at least.
_FEWEST = 2
# What a product of rounded operands errs by, in roundings of its result: from an eighth of one to two.
_ROUNDINGS = 8.0


class ByProducts(NamedTuple):
    """The cause that products show, in words."""

    cause: Cause
    text: str


def explain_products(products: Products, mode: str, first: Address) -> ByProducts | None:
    """Return what the exact products of the first failing place tell of it, None if nothing."""
    found = products.at(mode, first.place)
    off = {name: known for name, known in found.items() if known is not None}
    if off and first.site in Cause.PRODUCT_WRONG.sites:
        name, known = next(iter(off.items()))
        rounded = _rounded_to(known)
        others = f" (and {len(off) - 1} more)" if len(off) > 1 else ""
        text = (
            f"{known.side}'s {first.site} is not what {name}{others} gives for the row that went in, with the weights "
            "that the model holds: other weights or scales, terms that are left out, another operand, or something "
            "behind it" + (f"; its errors are as large as rounding to {rounded} makes them" if rounded else "")
        )
        return ByProducts(Cause.PRODUCT_WRONG, text)
    if off or first.site not in Cause.BETWEEN_PRODUCTS.sites:
        return None
    routed = products.at(mode, Place(first.layer, Site.ROUTER))
    if found and routed and not any(routed.values()):
        text = (
            f"the router and the experts are right in both passes ({', '.join((*routed, *found))}), so other experts "
            "are taken in one of them, or with other weights"
        )
        return ByProducts(Cause.EXPERT_WEIGHTS, text)
    if len(found) >= _FEWEST:
        text = (
            f"the {len(found)} products of {first.site} are right in both passes ({', '.join(found)}), so what lies "
            "between or behind them is another function in one of the passes"
        )
        return ByProducts(Cause.BETWEEN_PRODUCTS, text)
    return None


def _rounded_to(off: Off) -> str | None:
    """The dtype of 16 bits by whose roundings all rows may be off, None if none is."""
    sizes = [(abs(math.log(off.largest / UNIT_ROUNDOFF[name])), name) for name in HALF if off.largest > 0.0]
    for _, name in sorted(sizes):
        unit = UNIT_ROUNDOFF[name]
        if unit / _ROUNDINGS <= off.least and off.largest <= _ROUNDINGS / 4.0 * unit:
            return name
    return None


__all__ = ["ByProducts", "explain_products"]
