"""How a rotary embedding turned its vectors, read off one pass: angles, the layout of pairs, the angle of one position.

Rotary embedding turns pairs of elements by an angle proportional to the position (Su et al. 2021, section 3.2.2). What
the angles are is read off the values before and after: nothing is assumed of the base or its scaling.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Complex = NDArray[np.complex128]


def pairs_of(values: Floats, dim: int, halves: bool) -> Complex:
    """Return the elements that are rotated together as complex numbers, [head, pair]; NaN and infinities are kept.

    Args:
        values: [head, dim], or flat.
        dim: elements of a head, an even number.
        halves: whether an element is paired with the one half a head further; otherwise neighbours are paired.
    """
    heads = values.reshape(-1, dim)
    if halves:
        return np.asarray(heads[:, : dim // 2] + 1j * heads[:, dim // 2 :])
    return np.asarray(heads[:, 0::2] + 1j * heads[:, 1::2])


def angle_of(before: Complex, after: Complex) -> Floats:
    """Return the angle [pair], in radians from -pi to pi, by which all heads of a token are turned.

    A pair that is 0 in all heads has angle 0, one with a NaN in any head has angle NaN.

    Args:
        before: [head, pair], as `pairs_of` gives it.
        after: the same after the turn.
    """
    return np.asarray(np.angle(np.sum(after * before.conj(), axis=0)))


def step_of(angles: Mapping[int, Floats], room: float = 0.5) -> Floats | None:
    """Return the angle [pair], in radians, by which one position more turns each pair; 0 for pairs that stay.

    Two neighbouring positions give the step up to their rounding. How often a pair has turned since position 0 follows
    from that, and the whole angle then gives the step more exactly, by as much as there are positions. The result is
    None where no two positions are neighbours. A pair whose angle is NaN at one of the neighbours has a NaN step.

    Args:
        angles: by position, those of `angle_of` [pair].
        room: by how many radians the next position may stand off the finer step. Angles that count from another
            position than 0 are told by it where it is small against a radian over the position.
    """
    neighbours = [p for p in sorted(angles) if p + 1 in angles]
    if not neighbours:
        return None
    step = np.angle(sum(np.exp(1j * (angles[p + 1] - angles[p])) for p in neighbours))
    position = neighbours[0]
    if position > 0:
        whole = angles[position]
        fine = (whole + 2.0 * np.pi * np.round((position * step - whole) / (2.0 * np.pi))) / max(position, 1)
        # Where the turns were miscounted, or angles do not start from 0, neighbours disagree with it.
        gap = np.angle(np.exp(1j * (angles[position + 1] - (position + 1) * fine)))
        step = np.where(np.abs(gap) < room, fine, step)
    return np.asarray(step)
