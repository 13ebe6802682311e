"""Explanations by exact products: whether what fails is a product, or lies between products that are right.

What a product is multiplied by is in no trace. That its result is not the product of its operand with the weights that
the model holds is told by its exact reference, and so is that all products of a part are right. They are right as far
as the native dtype shows: what a product may be off by unseen says nothing about an error that is no larger.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

from kvdrift.instruments.products import Off, Products
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.precision import HALF, UNIT_ROUNDOFF
from kvdrift.vocabulary.sites import CACHE_SITES, Site

# Sites, and what is recorded of the way to them where it is no secret.
_HIDDEN_BY = {
    Site.Q_ROPE: {Site.Q_PROJ},
    Site.K_ROPE: {Site.K_PROJ},
    Site.K_CACHE: {Site.K_PROJ, Site.K_ROPE},
    Site.V_CACHE: {Site.V_PROJ},
    Site.ATTN_CTX: {Site.Q_ROPE, Site.ATTN_SCORES, Site.ATTN_PROBS},
    Site.CONV_STATE: {Site.ATTN_SCORES},
    Site.SSM_STATE: {Site.ATTN_SCORES},
    Site.LAYER_OUT: {Site.ATTN_OUT, Site.MLP_OUT, Site.RESID_ATTN},
}
_SHOWN = 4  # products that are named in a sentence
# A feed-forward part has two products at least.
_FEWEST = 2
# An error that all products of a part would show is so many times larger than the least that they show: it may have
# grown on its way from one of them to the failing site.
_GROWS = 2.0
# Sites that are one product each, and what is recorded of the row that goes into it.
_GIVEN = {
    Site.Q_PROJ: Site.ATTN_NORM_OUT,
    Site.K_PROJ: Site.ATTN_NORM_OUT,
    Site.V_PROJ: Site.ATTN_NORM_OUT,
    Site.ATTN_OUT: Site.ATTN_CTX,
}
# What a product of rounded operands errs by, in roundings of its result: from an eighth of one to two.
_ROUNDINGS = 8.0


class ByProducts(NamedTuple):
    """The cause that products show, in words."""

    cause: Cause
    text: str


def explain_products(
    products: Products,
    mode: str,
    first: Address,
    seen: Collection[Site] = (),
    *,
    drift: float,
    is_own_row: bool = False,
) -> ByProducts | None:
    """Return what the exact products of the first failing place tell of it, None if nothing.

    `seen` are the sites that decode shows of its layer. `drift` is the relative difference of the passes at the place,
    NaN if it is not known; products are called right only where they would show one as large. `is_own_row` says of a
    place in the cache that the rows of decode's own tokens alone are wrong there.
    """
    found = products.at(mode, first.place)
    off = {name: known for name, known in found.items() if known is not None}
    if off and first.site in Cause.PRODUCT_WRONG.sites:
        name, known = next(iter(off.items()))
        rounded = _rounded_to(known)
        others = f" (and {len(off) - 1} more)" if len(off) > 1 else ""
        text = (
            f"{known.side}'s {first.site} is not what {name}{others} gives for the row that went in, with the weights "
            "that the model holds: other weights or scales, terms that are left out, another operand, or something "
            "behind it"
            + (" that decode leaves out, such as a hook" if known.side == "prefill" else "")
            + (f"; its errors are as large as rounding to {rounded} makes them" if rounded else "")
        )
        return ByProducts(Cause.PRODUCT_WRONG, text)
    if not drift > _GROWS * products.minimum(mode, first.layer):
        return None
    if not off and found and first.site in _GIVEN:
        return _in_front(first, list(found), seen)
    if not off and first.site in Cause.BETWEEN_PROJECTIONS.sites:
        return _behind_projections(products, mode, first, seen, is_own_row=is_own_row)
    if off or first.site not in Cause.BETWEEN_PRODUCTS.sites:
        return None
    routed = products.at(mode, Place(first.layer, Site.ROUTER))
    if found and routed and not any(routed.values()):
        shared = [name for name in found if "shared" in name]
        text = (
            f"the router and the experts are right in both passes ({', '.join((*routed, *found))}), so other experts "
            "are taken in one of them, or with other weights"
            + (f", or what {shared[-1]} gives is added otherwise" if shared else "")
        )
        return ByProducts(Cause.EXPERT_WEIGHTS, text)
    if len(found) >= _FEWEST:
        text = (
            f"the {len(found)} products of {first.site} are right in both passes ({', '.join(found)}), so what lies "
            "between or behind them is another function in one of the passes"
        )
        return ByProducts(Cause.BETWEEN_PRODUCTS, text)
    return None


def _in_front(first: Address, names: list[str], seen: Collection[Site]) -> ByProducts:
    """That a product is right for the row that went into it: what differs is that row."""
    given = _GIVEN[first.site]
    where = f"between {given}, which agrees, and it" if given in seen else "in front of it"
    text = (
        f"{names[0]} gives what the row that goes into it makes with the weights that the model holds, in both passes: "
        f"the difference is made {where}"
    )
    return ByProducts(Cause.OPERAND_WRONG, text)


def _behind_projections(
    products: Products, mode: str, first: Address, seen: Collection[Site], *, is_own_row: bool
) -> ByProducts | None:
    """That all products of the layer are right, where nothing of what lies between them and the failing site was
    recorded: several products in a row, a kernel that shows none of its operands, a recurrence."""
    hidden_by = _HIDDEN_BY.get(first.site)
    if (first.site in CACHE_SITES and not is_own_row) or hidden_by is None or set(seen) & hidden_by:
        return None
    places = (Place(first.layer, site) for site in (Site.Q_PROJ, Site.K_PROJ, Site.V_PROJ, Site.ATTN_OUT, Site.MLP_OUT))
    found = {name: known for place in places for name, known in products.at(mode, place).items()}
    if not found or any(found.values()):
        return None
    named = ", ".join([*found][:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    text = (
        f"the {len(found)} products of the layer are right in both passes ({named}), and nothing that lies between "
        f"them and {first.site} was recorded: the difference is made there"
    )
    return ByProducts(Cause.BETWEEN_PROJECTIONS, text)


def _rounded_to(off: Off) -> str | None:
    """The dtype of 16 bits by whose roundings all rows may be off, None if none is."""
    sizes = [(abs(math.log(off.largest / UNIT_ROUNDOFF[name])), name) for name in HALF if off.largest > 0.0]
    for _, name in sorted(sizes):
        unit = UNIT_ROUNDOFF[name]
        if unit / _ROUNDINGS <= off.least and off.largest <= _ROUNDINGS / 4.0 * unit:
            return name
    return None


__all__ = ["ByProducts", "explain_products"]
