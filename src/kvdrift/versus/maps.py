"""How far two passes are from each other at every place, over what rounding may make of it: what a page draws."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import inf, isfinite, isnan
from typing import Literal

from kvdrift.versus.outcome import DriftMap, MapCell, Parting
from kvdrift.versus.record import Side
from kvdrift.versus.values import PassValues, relative
from kvdrift.vocabulary.address import Address, Place


@dataclass(slots=True)
class _Worst:
    """What was seen of a place so far."""

    drift: float = -1.0
    at: Address | None = None
    n: int = 0
    n_equal: int = 0

    def add(self, drift: float, at: Address) -> None:
        self.n += 1
        self.n_equal += drift == 0.0
        # A value that is no number is further away than any other.
        if self.at is None or (not isnan(self.drift) and (isnan(drift) or drift > self.drift)):
            self.drift, self.at = drift, at


def map_of(
    what: str,
    sides: tuple[Side, Side],
    passes: tuple[str, str],
    bound: Callable[[Place], float],
    first: Parting | None,
    conventions: Collection[Place] = (),
) -> DriftMap:
    """Return the map of two passes over all prompts that both sides have.

    Args:
        what: the two passes, in words.
        sides: whose they are; one side twice for its prefill against its decode.
        passes: the pass of each, `prefill` or `decode`.
        bound: what rounding of both may make at a place, relative.
        first: the first place that is beyond it and matters.
        conventions: places that differ without consequence.
    """
    one, two = sides
    found: dict[Place, _Worst] = {}
    for name in one.prompts.keys() & two.prompts.keys():
        left, right = _pass(one, name, passes[0]).rows, _pass(two, name, passes[1]).rows
        for place in left.keys() & right.keys():
            for at in left[place].keys() & right[place].keys():
                drift = relative(left[place][at], right[place][at])
                found.setdefault(place, _Worst()).add(drift, Address(name, at, *place))
    cells = [
        _cell(place, found[place], bound(place), place in conventions)
        for place in sorted(found, key=lambda each: each.forward_rank)
    ]
    return DriftMap(what, None if first is None else first.address, tuple(cells))


def _pass(side: Side, prompt: str, name: str) -> PassValues:
    item = side.prompts[prompt]
    return item.prefill if name == "prefill" else item.decode


def _cell(place: Place, worst: _Worst, bound: float, is_convention: bool) -> MapCell:
    assert worst.at is not None
    excess = worst.drift / bound if bound > 0.0 else (0.0 if worst.drift == 0.0 else inf)
    state: Literal["equal", "within", "beyond", "convention"]
    if worst.n_equal == worst.n:
        state = "equal"
    elif isfinite(excess) and excess <= 1.0:
        state = "within"
    else:
        state = "convention" if is_convention else "beyond"
    return MapCell(place, worst.drift, bound, excess, worst.n, worst.n_equal, worst.at, state)
