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
    """Return [head, pair] complex numbers of the elements that are rotated together.

    `halves` pairs an element with the one half a head further, otherwise neighbours are paired.
    """
    heads = values.reshape(-1, dim)
    if halves:
        return np.asarray(heads[:, : dim // 2] + 1j * heads[:, dim // 2 :])
    return np.asarray(heads[:, 0::2] + 1j * heads[:, 1::2])


def angle_of(before: Complex, after: Complex) -> Floats:
    """Return the angle [pair], from -pi to pi, by which all heads of a token are turned."""
    return np.asarray(np.angle(np.sum(after * before.conj(), axis=0)))


def step_of(angles: Mapping[int, Floats]) -> Floats | None:
    """Return the angle [pair] by which one position more turns each pair; pairs that are not rotated have angle 0.

    `angles` are those of `angle_of` by position. Two neighbouring positions give the step up to their rounding. How
    often a pair has turned since position 0 follows from that, and the whole angle then gives it more exactly, by as
    much as there are positions. None where no two positions are neighbours.
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
        step = np.where(np.abs(gap) < 0.5, fine, step)
    return np.asarray(step)
