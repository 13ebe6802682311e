"""What both passes of one engine round at each place, measured where the engine lets its inputs be changed."""

from __future__ import annotations

import numpy as np

from kvdrift.pairing.floors import SCALES
from kvdrift.versus.record import Side
from kvdrift.versus.values import Floats, PassValues, relative
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF

# Where noise cannot be measured: so many roundings of the precision that a side says it has, times the root of the
# layers below. It is a bound for what is written down and not a measurement, and the verdict says so.
_STATED = 64.0


def floors_of(side: Side, name: str) -> dict[Place, float]:
    """Return the noise of the pass `name` at each place, relative, the largest over prompts and positions.

    Measured: |D(+) + D(-) - 2 D(0)| / |D(0)| for inputs changed by a little up and down, and at least the least that is
    told from the precision, and what the elementary functions of the engine err by. Else: what the precision of the
    side allows for, as the module says.
    """
    found: dict[Place, float] = {}
    least = max(SCALES[side.rung].least if side.rung in SCALES else 0.0, side.functions)
    for item in side.prompts.values():
        clean = item.prefill if name == "prefill" else item.decode
        if item.changed is None:
            for place in clean.rows:
                found[place] = _stated(side, place)
            continue
        up, down = item.changed[name]
        for place, rows in clean.rows.items():
            worst = max((_second(rows, up, down, place, at) for at in rows), default=0.0)
            found[place] = max(found.get(place, 0.0), worst, least)
    return found


def margin_of(side: Side) -> float:
    """How many times its floors a difference may be; 1 for what was not measured."""
    return SCALES[side.rung].margin if side.is_measured else 1.0


def _stated(side: Side, place: Place) -> float:
    depth = side.facts.n_layers if place.layer is None else place.layer
    return float(_STATED * UNIT_ROUNDOFF[side.rung] * np.sqrt(1.0 + depth))


def _second(rows: dict[int, Floats], up: PassValues, down: PassValues, place: Place, at: int) -> float:
    one, two = up.rows.get(place, {}).get(at), down.rows.get(place, {}).get(at)
    if one is None or two is None or one.shape != rows[at].shape or two.shape != rows[at].shape:
        return 0.0
    return 2.0 * relative(rows[at], 0.5 * (one + two))
