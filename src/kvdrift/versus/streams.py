"""What two engines add to the residual stream, where both are consistent and the sums differ."""

from __future__ import annotations

import numpy as np

from kvdrift.versus.values import Floats, PassValues
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.sites import Site

# What each sum of the residual stream is of, in any decoder that adds nothing else.
PARTS = {Site.RESID_ATTN: (Site.LAYER_IN, Site.ATTN_OUT), Site.LAYER_OUT: (Site.RESID_ATTN, Site.MLP_OUT)}
# A fit that leaves less of a sum, relative, is that sum: rows of float32 sums err by less.
_FITS = 1e-5
# Constants that differ by less are one.
_ALIKE = 1e-4


def added_otherwise(one: PassValues, two: PassValues, place: Place) -> tuple[str, str] | None:
    """Return how A and B add up the stream at `place`, None where both do it alike or it is not a sum.

    A and B multiply what they add by constants, or one of them does to it what the other does not, as a norm.
    """
    if place.site not in PARTS or place.layer is None:
        return None
    parts = PARTS[place.site]
    sides = [_rows(values, place, parts) for values in (one, two)]
    if any(side is None for side in sides):
        return None
    fits = [_constants(*side) for side in sides if side is not None]
    added = parts[1]
    if fits[0] is not None and fits[1] is not None:
        if np.allclose(fits[0], fits[1], rtol=_ALIKE, atol=_ALIKE):
            return None
        said = [_sum_in_words(fit, parts) for fit in fits if fit is not None]
        return "added", f"{place.site} is {said[0]} in A, and {said[1]} in B"
    for name, other, side, fit in (("A", "B", sides[0], fits[0]), ("B", "A", sides[1], fits[1])):
        if fit is None and side is not None and fits["AB".index(other)] is not None:
            how = "takes a norm of" if _is_norm(side[0] - side[1], side[2]) else "changes"
            return "added", f"{name} {how} {added} before it is added, and {other} does not"
    return None


def _rows(values: PassValues, place: Place, parts: tuple[Site, Site]) -> tuple[Floats, Floats, Floats] | None:
    """The sum and its parts, [position, feature] each; None where one was not recorded or has another shape."""
    found = [values.rows.get(each, {}) for each in (place, *(Place(place.layer, site) for site in parts))]
    positions = sorted(found[0].keys() & found[1].keys() & found[2].keys())
    if not positions or len({rows[at].shape for rows in found for at in positions}) != 1:
        return None
    total, left, right = (np.array([rows[at] for at in positions]) for rows in found)
    return (total, left, right) if all(np.isfinite(rows).all() for rows in (total, left, right)) else None


def _constants(total: Floats, left: Floats, right: Floats) -> tuple[float, float] | None:
    """The two constants of which the sum is made in all rows, None if it is made of none."""
    matrix = np.stack([left.reshape(-1), right.reshape(-1)], 1)
    solved, *_ = np.linalg.lstsq(matrix, total.reshape(-1), rcond=None)
    rest = np.linalg.norm(matrix @ solved - total.reshape(-1))
    return (float(solved[0]), float(solved[1])) if rest <= _FITS * np.linalg.norm(total) else None


def _sum_in_words(constants: tuple[float, float], parts: tuple[Site, Site]) -> str:
    said = [
        f"{part}" if abs(constant - 1.0) < _ALIKE else f"{constant:.6g} times {part}"
        for constant, part in zip(constants, parts, strict=True)
    ]
    return " plus ".join(said)


def _is_norm(added: Floats, part: Floats) -> bool:
    """Whether what was added is the part with a factor of each row and one of each element, as a norm makes it."""
    if len(part) < 2 or (part == 0.0).any():
        return False
    ratio = added / part
    with np.errstate(divide="ignore", invalid="ignore"):
        of_row = np.median(ratio / ratio[0], axis=1)
    fit = of_row[:, None] * ratio[0] * part
    return bool(np.linalg.norm(fit - added) <= 1e-4 * np.linalg.norm(added))
