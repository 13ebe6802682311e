"""How two engines turn their queries and keys: which elements, in which pairs, by which angles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvdrift.versus.values import Floats, PassValues
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import Site

# A rotation that leaves more than this of a row, relative, turns other pairs.
_TURNS = 1e-3
# Elements that move by less of their head, relative, are handed on as they are: rows of float32 are copied exactly.
_STILL = 1e-6


@dataclass(frozen=True, slots=True)
class _Turned:
    """What one side does to a head.

    Attributes:
        positions: [position].
        dim: elements of a head.
        width: how many of them, from the first, are turned.
        pairs: `halves` (i and i + width/2), `neighbours` (2i and 2i + 1), None where neither is a rotation.
        angles: [position, pair], radians.
    """

    positions: Floats
    dim: int
    width: int
    pairs: str | None
    angles: Floats


def rotation(one: PassValues, two: PassValues, place: Place, positions: list[int]) -> tuple[str, str] | None:
    """Return what differs between the rotations of two sides, computed from rows before and after them; None elsewhere.

    None too where rows before the rotation were not recorded, or fewer than two positions.
    """
    layer, site = place
    if layer is None or site not in (Site.Q_ROPE, Site.K_ROPE) or layer not in one.heads or len(positions) < 2:
        return None
    dim = one.heads[layer][1]
    sources = (Site.K_NORM, Site.K_PROJ) if site is Site.K_ROPE else (Site.Q_NORM, Site.Q_PROJ)
    source = next((each for each in sources if Place(layer, each) in one.rows), None)
    if source is None:
        return None
    sides = [_turned(values, Place(layer, source), place, positions, dim) for values in (one, two)]
    if sides[0] is None or sides[1] is None:
        return None
    return _differ(sides[0], sides[1])


def _differ(a: _Turned, b: _Turned) -> tuple[str, str]:
    if a.width != b.width:
        return "rope_width", f"RoPE turns {a.width} of the {a.dim} elements of a head in A, and {b.width} in B"
    if a.pairs != b.pairs and a.pairs is not None and b.pairs is not None:
        said = {"halves": "elements that are half a head apart", "neighbours": "neighbouring elements"}
        return "rope_pairs", f"RoPE turns {said[a.pairs]} in A, and {said[b.pairs]} in B"
    if a.pairs is not None and b.pairs is not None:
        offset = [_offset(side.positions, side.angles) for side in (a, b)]
        if offset[0] is not None and offset[1] is not None and abs(offset[0] - offset[1]) > 0.5:
            return "position", f"positions are displaced: by {offset[0]:.0f} in A, by {offset[1]:.0f} in B"
        base = [_base(side.positions, side.angles) for side in (a, b)]
        if base[0] is not None and base[1] is not None and abs(np.log(base[0] / base[1])) > 1e-3:
            return Cause.ROPE_BASE, f"the base of RoPE is {base[0]:.6g} in A and {base[1]:.6g} in B"
    return "rope", "positions turn the rows by other angles: other frequencies of RoPE, or another scaling of them"


def _turned(values: PassValues, source: Place, place: Place, positions: list[int], dim: int) -> _Turned | None:
    before, after = values.rows.get(source, {}), values.rows.get(place, {})
    at = [p for p in positions if p in before and p in after and before[p].size == after[p].size]
    if len(at) < 2 or after[at[0]].size % dim:
        return None
    x, y = (np.array([rows[p].reshape(-1, dim) for p in at]) for rows in (before, after))
    size = np.linalg.norm(x, axis=-1, keepdims=True)
    moves = (np.abs(y - x) > _STILL * size).any(axis=(0, 1))
    width = dim if moves.all() else int(np.flatnonzero(moves).max(initial=-1)) + 1
    width += width % 2
    x, y = x[..., :width], y[..., :width]
    half = width // 2
    for pairs, first, second in (
        ("halves", slice(None, half), slice(half, None)),
        ("neighbours", slice(None, None, 2), slice(1, None, 2)),
    ):
        u, v = (rows[..., first] + 1j * rows[..., second] for rows in (x, y))
        # One complex factor a pair and position, alike in all heads: its angle is the turn, its size a factor of RoPE.
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = np.nan_to_num((v * np.conj(u)).sum(1) / (np.abs(u) ** 2).sum(1))
        if np.linalg.norm(v - factor[:, None] * u) <= _TURNS * np.linalg.norm(v):
            return _Turned(np.array(at), dim, width, pairs, np.angle(factor))
    return _Turned(np.array(at), dim, width, None, np.zeros((len(at), half)))


def _speed(at: Floats, turned: Floats) -> Floats:
    """Angle per position of each pair, from neighbouring positions."""
    steps = np.flatnonzero(np.diff(at) == 1)
    if not steps.size:
        return np.full(turned.shape[1], np.nan)
    return np.asarray(np.angle(np.exp(1j * (turned[steps + 1] - turned[steps])).mean(0)))


def _base(at: Floats, turned: Floats) -> float | None:
    """The base of which the speeds are the powers, None if they are those of none."""
    speed = np.abs(_speed(at, turned))
    if not np.isfinite(speed).all() or (speed <= 0.0).any() or len(speed) < 2:
        return None
    index = np.arange(len(speed)) / len(speed)
    slope = float((index @ np.log(speed)) / (index @ index))
    fits = np.abs(np.log(speed) - slope * index).max() < 1e-3
    return float(np.exp(-slope)) if fits else None


def _offset(at: Floats, turned: Floats) -> float | None:
    """By how many positions the fastest pair is ahead of its place."""
    speed = _speed(at, turned)
    if not speed.size or not np.isfinite(speed).all() or abs(speed[0]) < 1e-3:
        return None
    ahead = np.angle(np.exp(1j * (turned - at[:, None] * speed)).mean(0))
    return float(np.round(ahead[0] / speed[0])) if abs(ahead[0]) < np.pi else None
