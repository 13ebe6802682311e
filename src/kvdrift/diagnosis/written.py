"""Explanations of the row of its own token that decode puts into the cache, told at all probed steps together.

Where the new keys are not recorded on their way into the cache, as in decoders of one's own, the first value that shows
a wrong rotation is the row that attention reads. It has the position of its token, and what the projection gave for it
is recorded beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from kvdrift.diagnosis.model import EXACT, GENERAL, NAMED, Candidate, Floats, Suspect, Values, share
from kvdrift.diagnosis.slots import shared_rows
from kvdrift.replay.turns import pairs_of
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import Site

_BEFORE = (Site.K_NORM, Site.K_PROJ)
# Turns are believed where so many heads share them, or so many steps follow one rule.
_FEWEST_HEADS, _FEWEST_STEPS = 2, 2
# An element that is off by less than this share of the one that is off most is rounding beside it.
_BESIDE = 1e-2
# The fastest pair of a rotary embedding turns by one radian from one position to the next, whatever its base is.
_FASTEST, _NEAR = 1.0, 1e-3


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
        pair = [_row(values, suspect.address.site, at) for values in (suspect.prefill, suspect.decode)]
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


def _row(values: Values, site: Site, position: int) -> Floats | None:
    read = values.reads.get((site, position))
    if read is None or position not in read.slots:
        return None
    return np.asarray(read.rows[int(np.searchsorted(read.slots, position))].astype(np.float64))


def _before(values: Values, position: int) -> Floats | None:
    return next((v for site in _BEFORE if (v := values.at(site, position)) is not None), None)


def _turned(rows: dict[int, tuple[Floats, Floats]]) -> Iterator[Candidate]:
    """The last elements of every head are turned, pair by pair, by angles that all heads share: as in latent attention,
    whose rotated part comes last."""
    heads, dim = next(iter(rows.values()))[0].shape
    if len(rows) < _FEWEST_STEPS:
        return
    right, wrong = (np.stack([pair[side] for pair in rows.values()]) for side in (0, 1))
    off = np.abs(wrong - right).max(axis=(0, 1))
    differs = np.flatnonzero(off > _BESIDE * off.max(initial=0.0))
    if not len(differs) or not np.isfinite(off).all():
        return
    for size in (dim - first for first in range(int(differs[0]) + 1) if (dim - first) % 2 == 0 and first < dim - 1):
        for halves in (True, False):
            before, after = (pairs_of(side[..., dim - size :].ravel(), size, halves) for side in (right, wrong))
            before, after = (pairs.reshape(len(rows), heads, -1) for pairs in (before, after))
            angles = np.angle((after * before.conj()).sum(axis=1))  # [step, pair]
            predicted = right.copy()
            turned = before * np.exp(1j * angles)[:, None]
            tail = np.concatenate([turned.real, turned.imag], axis=-1)
            if not halves:
                tail = np.stack([turned.real, turned.imag], axis=-1).reshape(*turned.shape[:2], -1)
            predicted[..., dim - size :] = tail
            text = f"the last {size} elements of the keys that decode writes are turned by other angles than prefill's"
            explained = share(right, wrong, predicted)
            missing = _is_missing(angles, list(rows))
            if heads >= _FEWEST_HEADS or missing:
                cause = Cause.ROPE_MISSING_ON_K if missing else Cause.ROPE_ANGLES
                word = ": they are not rotated at all" if missing else ""
                yield Candidate(explained, cause, text + word, NAMED if missing else GENERAL)


def _is_missing(angles: Floats, positions: list[int]) -> bool:
    """Whether the angles [step, pair] that decode lacks are those of whole positions: in the fastest pair a radian for
    each."""
    wanted = -_FASTEST * np.asarray(positions, dtype=np.float64)
    return bool((np.abs(np.angle(np.exp(1j * (angles[:, 0] - wanted)))) < _NEAR * np.maximum(1.0, -wanted)).all())
