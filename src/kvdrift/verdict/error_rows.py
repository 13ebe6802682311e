"""The value at the first failure, element by element, in both passes: what a picture of the shape of an error shows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kvdrift.diagnosis.model import Suspect, Values
from kvdrift.pairing.rows import Floats
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.sites import CACHE_SITES, Site

# Bars that a picture can show apart from each other.
_MOST_BARS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRow:
    """Elements of the value that fails first: of a row of the cache the one of `slot`, of attention that of `head`.

    Where there are more than can be told apart, each stands for its neighbours and is the one that differs most; `at`
    are the numbers of the elements that are shown, out of `n_elements`.
    """

    address: Address
    slot: int | None
    head: int | None
    at: tuple[int, ...]
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    n_elements: int


def error_row(suspect: Suspect, slot: int | None) -> ErrorRow | None:
    """Return both passes' elements at the first failure; None where they were not kept, or have no common shape."""
    site, position = suspect.address.site, suspect.address.position
    prefill, decode = (_values(side, site, position, slot) for side in (suspect.prefill, suspect.decode))
    if prefill is None or decode is None:
        return None
    head = None
    if prefill.ndim == 2 and site not in CACHE_SITES and prefill.shape[0] == decode.shape[0]:
        n_keys = min(prefill.shape[1], decode.shape[1])
        off = _off(prefill[:, :n_keys], decode[:, :n_keys])
        head = int(off.max(axis=1).argmax())
        prefill, decode = prefill[head, :n_keys], decode[head, :n_keys]
    prefill, decode = prefill.ravel(), decode.ravel()
    if prefill.shape != decode.shape or not prefill.size:
        return None
    off = _off(prefill, decode)
    ends = np.linspace(0, len(off), min(_MOST_BARS, len(off)) + 1).astype(np.int64)
    at = [int(a + off[a:b].argmax()) for a, b in pairwise(ends)]
    return ErrorRow(
        address=suspect.address,
        slot=slot if site in CACHE_SITES else None,
        head=head,
        at=tuple(at),
        prefill=tuple(prefill[at].tolist()),
        decode=tuple(decode[at].tolist()),
        n_elements=len(off),
    )


def _off(prefill: Floats, decode: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.abs(np.nan_to_num(decode - prefill, nan=np.inf, posinf=np.inf, neginf=np.inf))


def _values(side: Values, site: Site, position: int, slot: int | None) -> Floats | None:
    """Elements [feature], attention rows [head, key], or one row of the cache [head, dim]."""
    if site not in CACHE_SITES:
        return side.at(site, position)
    read = side.reads.get((site, position))
    if read is None or slot is None:
        return None
    found = np.flatnonzero(read.slots == slot)
    return read.rows[int(found[-1])].astype(np.float64) if len(found) else None
