"""Explanations of the row of its own token that decode puts into the cache, told at all probed steps together.

Where the new keys are not recorded on their way into the cache, as in decoders of one's own, the first value that shows
a wrong rotation is the row that attention reads. It has the position of its token, and what the projection gave for it
is recorded beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from kvdrift.diagnosis.apart import FEWEST_HEADS, FEWEST_STEPS, is_missing, row_read, turned_apart
from kvdrift.diagnosis.model import EXACT, GENERAL, NAMED, Candidate, Floats, Suspect, Values, share
from kvdrift.diagnosis.slots import shared_rows
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import Site

_BEFORE = (Site.K_NORM, Site.K_PROJ)


def explain_written_row(suspect: Suspect) -> Iterator[Candidate]:
    """Yield what may be wrong with the keys that decode wrote for its own tokens, if no others are bad."""
    if suspect.address.site is not Site.K_CACHE or not is_own_row(suspect):
        return
    rows = own_rows(suspect)
    if not rows:
        return
    plain = {at: v for at in rows if (v := _before(suspect.decode, at)) is not None and v.size == rows[at][0].size}
    if len(plain) == len(rows):
        predicted = np.stack([plain[at].reshape(rows[at][0].shape) for at in rows])
        right, wrong = (np.stack([pair[side] for pair in rows.values()]) for side in (0, 1))
        text = "decode does not rotate the keys that it writes"
        yield Candidate(share(right, wrong, predicted), Cause.ROPE_MISSING_ON_K, text, EXACT)
    yield from _turned(rows)


def is_own_row(suspect: Suspect) -> bool:
    """Whether the rows that are bad are those of decode's own tokens, at every probed step where any is, and no step
    shows another one."""
    shared = shared_rows(suspect)
    return (
        shared is not None
        and not shared.all_differ
        and [int(slot) for slot in shared.slots[shared.bad]] == [suspect.address.position]
    )


def own_rows(suspect: Suspect) -> dict[int, tuple[Floats, Floats]]:
    """The own rows [kv head, dim] of prefill and decode by position, where both passes read them."""
    found = {}
    for at in (suspect.address.position, *suspect.others):
        pair = [row_read(values, suspect.address.site, at) for values in (suspect.prefill, suspect.decode)]
        if pair[0] is not None and pair[1] is not None and pair[0].shape == pair[1].shape:
            plain = _before(suspect.prefill, at)
            found[at] = _heads_once(pair[0], pair[1], 0 if plain is None else plain.size // pair[0].shape[1])
    return found


def _heads_once(prefill: Floats, decode: Floats, n_heads: int) -> tuple[Floats, Floats]:
    """Rows [head, dim] with each of `n_heads` kv heads once, where both have a copy for each query of its group."""
    if n_heads == 0 or prefill.shape[0] % n_heads:
        return prefill, decode
    sides = [side.reshape(n_heads, -1, side.shape[1]) for side in (prefill, decode)]
    if not all(np.array_equal(side, np.broadcast_to(side[:, :1], side.shape)) for side in sides):
        return prefill, decode
    return sides[0][:, 0], sides[1][:, 0]


def with_written_keys(suspect: Suspect) -> Suspect | None:
    """The suspect with its own cached rows in the place of rotated keys that were not recorded, None if they were, or
    the rows that are bad are others."""
    position = suspect.address.position
    is_seen = suspect.prefill.at(Site.K_ROPE, position) is not None
    if suspect.address.site is not Site.K_CACHE or is_seen or not is_own_row(suspect):
        return None
    rows = own_rows(suspect)
    sides = [
        replace(
            values,
            sites={**values.sites, **{(Site.K_ROPE, at): pair[side].ravel() for at, pair in rows.items()}},
        )
        for side, values in enumerate((suspect.prefill, suspect.decode))
    ]
    return replace(suspect, address=suspect.address._replace(site=Site.K_ROPE), prefill=sides[0], decode=sides[1])


def _before(values: Values, position: int) -> Floats | None:
    return next((v for site in _BEFORE if (v := values.at(site, position)) is not None), None)


def _turned(rows: dict[int, tuple[Floats, Floats]]) -> Iterator[Candidate]:
    """The last elements of every head are turned, pair by pair, by angles that all heads share: as in latent attention,
    whose rotated part comes last."""
    if len(rows) < FEWEST_STEPS:
        return
    right, wrong = (np.stack([pair[side] for pair in rows.values()]) for side in (0, 1))
    for angles, predicted, size in turned_apart(rows):
        missing = is_missing(angles, list(rows))
        if right.shape[1] >= FEWEST_HEADS or missing:
            cause = Cause.ROPE_MISSING_ON_K if missing else Cause.ROPE_ANGLES
            text = f"the last {size} elements of the keys that decode writes are turned by other angles than prefill's"
            word = ": they are not rotated at all" if missing else ""
            explained = share(right, wrong, predicted)
            yield Candidate(explained, cause, text + word, NAMED if missing else GENERAL)
