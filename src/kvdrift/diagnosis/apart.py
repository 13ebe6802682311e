"""Explanations of a wrong rotation where nothing shows what was rotated: decode's pairs are held against prefill's.

In latent attention several products and a norm lie in front of the query, and its rotated part comes last. What decode
turned a pair further than prefill is seen all the same: the complex ratio of the two, which all heads share. How these
angles grow from one position to the next says what is wrong. A constant one is another position, one that grows with
the position is another table, and one that grows from a position on is a position that stood still there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from kvdrift.diagnosis.model import GENERAL, LEAST_ENOUGH, NAMED, Candidate, Floats, Suspect, Values, share
from kvdrift.replay.turns import pairs_of
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import Site

# Turns are believed where so many heads share them, or so many steps follow one rule.
FEWEST_HEADS, FEWEST_STEPS = 2, 2
# An element that is off by less than this share of the one that is off most is rounding beside it.
_BESIDE = 1e-2
# The fastest pair of a rotary embedding turns by one radian from one position to the next, whatever its base is.
_FASTEST, _NEAR = 1.0, 1e-3
# So far behind the last position a position may stand still.
_FAR = 4096
# Roundoffs of a row that agrees.
_ROUNDINGS = 8.0
# What a rule for the angles may leave beside what angles of each position leave.
_LESS = 1e-4

Pairs = Mapping[int, tuple[Floats, Floats]]


def explain_turned_apart(suspect: Suspect, unit: float) -> Iterator[Candidate]:
    """Yield by which angles decode may turn its queries or keys further than prefill, and what these angles are.

    A NaN or an infinity explains nothing.

    Args:
        suspect: its first failing site is that of rotated queries or keys.
        unit: the roundoff of a rotation.
    """
    site, position = suspect.address.site, suspect.address.position
    read = suspect.prefill.reads.get((Site.K_CACHE, position))
    if read is None:
        return
    heads_of = read.rows.shape[2]
    rows: dict[int, tuple[Floats, Floats]] = {}
    for at in (suspect.address.position, *suspect.others):
        pair = suspect.prefill.at(site, at), suspect.decode.at(site, at)
        if pair[0] is None or pair[1] is None or pair[0].size != pair[1].size or pair[0].size % heads_of:
            return
        rows[at] = pair[0].reshape(-1, heads_of), pair[1].reshape(-1, heads_of)
    if len({side.shape for pair in rows.values() for side in pair}) != 1:
        return
    right, wrong = (np.stack([pair[side] for pair in rows.values()]) for side in (0, 1))
    tried = [(share(right, wrong, predicted), angles, size) for angles, predicted, size in turned_apart(rows)]
    enough = max((explained for explained, *_ in tried), default=0.0) - _LESS
    if enough < LEAST_ENOUGH:
        return
    # Elements that are not turned at all may be counted in: the fewest are meant.
    explained, angles, size = min((found for found in tried if found[0] >= enough), key=lambda found: found[2])
    is_query = site is Site.Q_ROPE
    what = f"the last {size} elements of each head of its {'query' if is_query else 'key'}"
    rule = _rule(angles, list(rows), alone=_is_alone(suspect, unit), is_query=is_query)
    if rule is not None:
        cause, words = rule
        yield Candidate(explained - _LESS, cause, f"decode rotates {what} {words}", NAMED)
    if min(len(np.unique(pair[0], axis=0)) for pair in rows.values()) >= FEWEST_HEADS:
        text = f"decode rotates {what} by other angles than prefill"
        yield Candidate(explained - 2.0 * _LESS, Cause.ROPE_ANGLES, text, GENERAL)


def _is_alone(suspect: Suspect, unit: float) -> bool:
    """Whether the other one of query and key agrees: of keys the row that is read, whose rotated part may not have been
    recorded before."""
    position = suspect.address.position
    if suspect.address.site is Site.Q_ROPE:
        both = [row_read(values, Site.K_CACHE, position) for values in (suspect.prefill, suspect.decode)]
    else:
        both = [values.at(Site.Q_ROPE, position) for values in (suspect.prefill, suspect.decode)]
    if both[0] is None or both[1] is None or both[0].shape != both[1].shape:
        return False
    return bool(np.linalg.norm(both[1] - both[0]) <= _ROUNDINGS * unit * np.linalg.norm(both[0]))


def row_read(values: Values, site: Site, position: int) -> Floats | None:
    """Return the row [kv head, dim] of the token at `position` that this token read, None if it is not known."""
    read = values.reads.get((site, position))
    if read is None or position not in read.slots:
        return None
    return np.asarray(read.rows[int(np.searchsorted(read.slots, position))].astype(np.float64))


def turned_apart(rows: Pairs) -> Iterator[tuple[Floats, Floats, int]]:
    """Yield by which angles [step, pair] decode's last elements may be turned further than prefill's, what decode then
    has [step, head, dim], and how many elements that are.

    Both layouts of pairs are tried, and every first element from which on nothing else differs. Nothing is yielded
    where nothing differs, or where values are NaN or infinite.

    Args:
        rows: prefill's and decode's [head, dim] by position.
    """
    right, wrong = (np.stack([pair[side] for pair in rows.values()]) for side in (0, 1))
    n_heads, dim = right.shape[1:]
    off = np.abs(wrong - right).max(axis=(0, 1))
    differs = np.flatnonzero(off > _BESIDE * off.max(initial=0.0))
    if not len(differs) or not np.isfinite(off).all():
        return
    for size in (dim - first for first in range(int(differs[0]) + 1) if (dim - first) % 2 == 0 and first < dim - 1):
        for halves in (True, False):
            before, after = (pairs_of(side[..., dim - size :].ravel(), size, halves) for side in (right, wrong))
            before, after = (pairs.reshape(len(rows), n_heads, -1) for pairs in (before, after))
            angles = np.angle((after * before.conj()).sum(axis=1))
            predicted = right.copy()
            turned = before * np.exp(1j * angles)[:, None]
            tail = np.concatenate([turned.real, turned.imag], axis=-1)
            if not halves:
                tail = np.stack([turned.real, turned.imag], axis=-1).reshape(*turned.shape[:2], -1)
            predicted[..., dim - size :] = tail
            yield angles, predicted, size


def is_missing(angles: Floats, positions: list[int]) -> bool:
    """Whether the angles [step, pair] that decode lacks are those of whole positions: in the fastest pair a radian for
    each."""
    wanted = -_FASTEST * np.asarray(positions, dtype=np.float64)
    return _are_alike(angles[:, 0], wanted, _NEAR * np.maximum(1.0, -wanted))


def _are_alike(first: Floats, second: Floats, room: Floats | float) -> bool:
    return bool((np.abs(np.angle(np.exp(1j * (first - second)))) < room).all())


def _rule(angles: Floats, positions: list[int], *, alone: bool, is_query: bool) -> tuple[Cause, str] | None:
    """What one rule for the angles [step, pair] of all positions says, in the words behind what is rotated."""
    order = np.argsort(positions)
    at, angles = np.asarray(positions, dtype=np.float64)[order], angles[order]
    if len(at) < FEWEST_STEPS or not (np.diff(at) == 1.0).any():
        return None
    offset = Cause.ROPE_POSITION_OFFSET_K
    if is_query:
        offset = Cause.ROPE_POSITION_OFFSET_Q if alone else Cause.ROPE_POSITION_OFFSET
    room = _NEAR * min(1.0, float(np.abs(angles).max()))
    if _are_alike(angles, angles[:1], room):
        n = round(float(angles[0, 0]) / _FASTEST)
        words = "by the same angles more than prefill at every position: as if at another position"
        if n and _are_alike(angles[:1, 0], np.array([_FASTEST * n]), _NEAR):
            way = "further on" if n > 0 else "further back"
            words += f", {abs(n)} {way} where the first pair turns by a radian a position"
        return offset, words
    if is_missing(angles, [int(p) for p in at]):
        missing = Cause.ROPE_MISSING_ON_Q if is_query else Cause.ROPE_MISSING_ON_K
        return (missing, "not at all") if alone else (offset, "as if at position 0")
    neighbours = int(np.flatnonzero(np.diff(at) == 1.0)[0])
    step = np.angle(np.exp(1j * (angles[neighbours + 1] - angles[neighbours])))
    for start in range(int(at[-1]) + _FAR):
        off = (at - start)[:, None]
        if not _are_alike(angles, off * step[None], room * np.maximum(1.0, np.abs(off))):
            continue
        if start == 0:
            return (
                Cause.ROPE_ANGLES,
                "by angles that are off in proportion to the position: another base, scaling or table",
            )
        if _are_alike(step[:1], np.array([-_FASTEST]), _NEAR):
            return offset, f"as if its position stood still at {start}"
    return None


__all__ = ["FEWEST_HEADS", "FEWEST_STEPS", "explain_turned_apart", "is_missing", "row_read", "turned_apart"]
