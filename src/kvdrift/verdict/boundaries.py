"""Where behaviour changes along a length sweep: a mismatch, equal bits, the size of drift, the kernel.

A boundary lies between two neighbours on one of two axes. On the axis of *positions* decode's own position decides (how
many keys it reads); on that of *lengths* the prompt does (how many tokens prefill had). A prompt of length L is probed
at the positions from L on, so one length shows several neighbouring positions. Positions are taken where one boundary
on them says it all, or two around a single position.

What is claimed, and on what grounds:

* a mismatch on one side and none on the other, or another kernel, is a fact;
* a site is called equal in its bits on one side only if every value there is, and different on the other only if so
  many values differ that chance does not explain it: if lengths played no part, all k of the N cells that differ would
  lie among the n of that side with probability C(n, k) / C(N, k). A cell is a (prompt, position, layer) in kv_aligned,
  where no layer inherits the rounding of another, and a (prompt, position) in as_designed;
* the size of drift jumps if the median over layers of every (prompt, position) on one side is above all of the other,
  and the nearest of both sides, as many as one length has, differ in their medians by a factor of `_JUMP` beyond the
  ratio of their numbers of tokens. Rounding does not do that: the error of a sum of n terms grows at most as n (Higham
  2002, section 4.2); where it falls, the same ratio is allowed. If lengths played no part, a complete separation would
  have the probability 1 / C(N, n).

These probabilities are multiplied by the number of sites, modes and places that were looked at, and must not exceed
alpha. Boundaries inform: no verdict rests on them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby, pairwise
from statistics import median
from typing import Literal

import numpy as np

from kvdrift.instruments.route import Route
from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.rows import Rows
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.facts import Call
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import FORWARD_ORDER, Site

# One bit: a result that is rounded once more, or to one digit less, errs by this factor.
_JUMP = 2.0

Axis = Literal["position", "length"]
Unit = tuple[int, int]  # length, position
_AXES: tuple[tuple[Axis, int], ...] = (("position", 1), ("length", 0))  # axis, and its place in a unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """A change between the neighbours `before` and `after` on an axis.

    Attributes:
        change: what changes: "mismatch", "bits", "drift" or "kernel".
        rises: whether there is a mismatch, unequal bits or more drift from `after` on; False: up to `before`.
        modes: the modes that show it.
        sites: those that change, in forward order; for a mismatch that of `first`.
        first: the first address beyond noise on its side, for a mismatch.
        text: figures or names behind it.
    """

    change: Literal["mismatch", "bits", "drift", "kernel"]
    axis: Axis
    before: int
    after: int
    rises: bool
    modes: tuple[str, ...]
    sites: tuple[str, ...] = ()
    first: Address | None = None
    text: str = ""

    @property
    def is_exact(self) -> bool:
        """Whether nothing lies between the two neighbours."""
        return self.after == self.before + 1


@dataclass(frozen=True, slots=True)
class Sweep:
    """The measured pairs of a sweep. `lengths` are the prompts' lengths by name."""

    lengths: Mapping[str, int]
    table: DriftTable
    routes: Sequence[Route]
    native: str
    modes: Sequence[str]
    _series: dict[tuple[str, Site], dict[Unit, Rows]] = field(default_factory=dict, repr=False)

    @property
    def series(self) -> dict[tuple[str, Site], dict[Unit, Rows]]:
        """The native pairs by (mode, site), and by unit: one for each layer."""
        if not self._series:
            for mode in self.modes:
                rows = self.table.where(
                    lambda b, mode=mode: (b.mode, b.rung) == (mode, self.native) and b.prompt in self.lengths  # type: ignore[misc]
                )
                for site in dict.fromkeys(place.site for place in rows.places):
                    self._series[mode, site] = self._by_unit(rows.where(rows.is_at(site)))
        return self._series

    def _by_unit(self, rows: Rows) -> dict[Unit, Rows]:
        lengths = np.array([self.lengths.get(name, 0) for name in rows.names], dtype=np.int64)[rows.prompt]
        order = np.lexsort((rows.position, lengths))
        units = np.stack([lengths, rows.position])[:, order]
        starts = np.flatnonzero(np.diff(units, axis=1, prepend=-1).any(axis=0))
        parts = np.split(order, starts[1:])
        return {(int(units[0, i]), int(units[1, i])): rows.where(at) for i, at in zip(starts, parts, strict=True)}

    @property
    def units(self) -> list[Unit]:
        """Every (length, position) that was compared, ascending."""
        return sorted({unit for by_unit in self.series.values() for unit in by_unit})

    @property
    def n_tests(self) -> int:
        """How many places of all series a boundary may be found at, on two axes and in two directions."""
        gaps = len({position for _, position in self.units}) + len({length for length, _ in self.units}) - 2
        return max(1, 2 * gaps * len(self.series))


def find_boundaries(
    sweep: Sweep, beyond: Mapping[str, Sequence[Address]], alpha: float
) -> tuple[tuple[Boundary, ...], str | None]:
    """Return the boundaries of a sweep, and what could not be looked for; `beyond` are the mismatches by mode."""
    level = math.log(alpha / sweep.n_tests)
    found = [*_mismatches(sweep, beyond), *_bits(sweep, level), *_drifts(sweep, level), *_kernels(sweep)]
    n_units = len(sweep.units)
    untested = None
    if -_log_comb(n_units, n_units // 2) > level:
        untested = (
            f"jumps in the size of drift: {n_units} (prompt, position) pairs cannot tell one from chance at alpha "
            f"{alpha}; name more lengths, or take a larger --span"
        )
    return tuple(_merged(found)), untested


# ---------------------------------------------------------------------------------------------------------- mismatch


def _mismatches(sweep: Sweep, beyond: Mapping[str, Sequence[Address]]) -> Iterator[Boundary]:
    for mode in sweep.modes:
        addresses = [a for a in beyond.get(mode, ()) if a.prompt in sweep.lengths]
        failing = {(sweep.lengths[a.prompt], a.position) for a in addresses}
        axis, changes = _changes({unit: unit in failing for unit in sweep.units})
        for before, after, rises in changes:
            place = after if rises else before
            there = [a for a in addresses if (a.position if axis == "position" else sweep.lengths[a.prompt]) == place]
            yield Boundary(
                change="mismatch", axis=axis, before=before, after=after, rises=rises, modes=(mode,), first=there[0]
            )


def _changes(flags: Mapping[Unit, bool]) -> tuple[Axis, list[tuple[int, int, bool]]]:
    """Return where a property of units begins or ends: on positions if it is one step there, or if neighbours enclose
    it, else on lengths, which have it if one of their positions does."""
    by_position: dict[int, set[bool]] = defaultdict(set)
    by_length: dict[int, bool] = defaultdict(bool)
    for (length, position), flag in flags.items():
        by_position[position].add(flag)
        by_length[length] |= flag
    if all(len(found) == 1 for found in by_position.values()):
        steps = _steps({position: found == {True} for position, found in by_position.items()})
        encloses = len(steps) == 2 and steps[0][2] and all(after == before + 1 for before, after, _ in steps)
        if len(steps) == 1 or encloses:
            return "position", steps
    return "length", _steps(by_length)


def _steps(flags: Mapping[int, bool]) -> list[tuple[int, int, bool]]:
    return [(a, b, flags[b]) for a, b in pairwise(sorted(flags)) if flags[a] != flags[b]]


# -------------------------------------------------------------------------------------------------------------- bits


def _bits(sweep: Sweep, level: float) -> Iterator[Boundary]:
    for (mode, site), by_unit in sweep.series.items():
        cells = {unit: _cells(mode, rows) for unit, rows in by_unit.items()}
        candidates: list[tuple[float, Axis, list[_Split]]] = []
        for axis, index in _AXES:
            counts: dict[int, tuple[int, int]] = {}
            for unit, (n, k) in cells.items():
                known = counts.get(unit[index], (0, 0))
                counts[unit[index]] = (known[0] + n, known[1] + k)
            found = [item for item in _splits(counts) if item.log_chance <= level]
            if found and (axis == "length" or len(found) == 1):
                candidates.append((min(item.log_chance for item in found), axis, found))
        if not candidates:
            continue
        # The axis on which chance explains it least; at a tie positions, which lie closer.
        _, axis, found = min(candidates, key=lambda item: item[0])
        for split in found:
            yield Boundary(
                change="bits",
                axis=axis,
                before=split.before,
                after=split.after,
                rises=split.rises,
                modes=(mode,),
                sites=(str(site),),
                text=split.text,
            )


def _cells(mode: str, rows: Rows) -> tuple[int, int]:
    """How many cells there are, and how many of them differ."""
    n_differ = int((~rows.equal).sum())
    return (len(rows), n_differ) if mode == Mode.KV_ALIGNED else (1, int(n_differ > 0))


@dataclass(frozen=True, slots=True)
class _Split:
    before: int
    after: int
    rises: bool
    log_chance: float
    text: str


def _splits(counts: Mapping[int, tuple[int, int]]) -> list[_Split]:
    """Return the places between a run of neighbours without a difference and one with some, with the logarithm of the
    probability that chance alone would have put all differences there."""
    runs = [list(alike) for _, alike in groupby(sorted(counts), key=lambda place: counts[place][1] > 0)]
    found = []
    for first, second in pairwise(runs):
        rises = counts[second[0]][1] > 0
        clean, other = (first, second) if rises else (second, first)
        n_clean = sum(counts[place][0] for place in clean)
        n, k = (sum(counts[place][i] for place in other) for i in (0, 1))
        chance = _log_comb(n, k) - _log_comb(n + n_clean, k)
        text = f"{k} of {n} differ there, 0 of {n_clean} on the other side"
        found.append(_Split(first[-1], second[0], rises, chance, text))
    return found


# ------------------------------------------------------------------------------------------------------------- drift


def _drifts(sweep: Sweep, level: float) -> Iterator[Boundary]:
    for (mode, site), by_unit in sweep.series.items():
        sizes = {unit: median(rows.rel_l2.tolist()) for unit, rows in by_unit.items() if np.isfinite(rows.rel_l2).all()}
        near = max(Counter(length for length, _ in sizes).values(), default=0)
        found = []
        for axis, index in _AXES:
            along = sorted((unit[index], unit[1] + 1, size) for unit, size in sizes.items())
            found += [(jump.ratio, axis, jump) for jump in _jumps(along, near, level)]
        if not found:
            continue
        _, axis, jump = max(found, key=lambda item: item[0])  # the first at a tie: positions
        yield Boundary(
            change="drift",
            axis=axis,
            before=jump.before,
            after=jump.after,
            rises=jump.rises,
            modes=(mode,),
            sites=(str(site),),
            text=f"{jump.ratio:.1f} times that of the other side, at {sweep.native}",
        )


@dataclass(frozen=True, slots=True)
class _Jump:
    ratio: float  # of the medians next to it
    before: int
    after: int
    rises: bool


def _jumps(along: Sequence[tuple[int, int, float]], near: int, level: float) -> Iterator[_Jump]:
    """Return every complete separation of the units (place, tokens, drift), which are sorted by place; the sizes of the
    sides are those of the `near` units next to it."""
    places = [place for place, _, _ in along]
    for rises in (True, False):
        signed = [size if rises else -size for _, _, size in along]
        highest = list(accumulate(signed, max))
        lowest = list(accumulate(reversed(signed), min))[::-1]
        for i in range(1, len(along)):
            if places[i - 1] == places[i] or not highest[i - 1] < lowest[i] or -_log_comb(len(along), i) > level:
                continue
            below, above = along[max(0, i - near) : i], along[i : i + near]
            first, second = (median(size for _, _, size in side) for side in (below, above))
            growth = median(tokens for _, tokens, _ in above) / median(tokens for _, tokens, _ in below)
            small, large = (first, second) if rises else (second, first)
            if 0.0 < small * _JUMP * growth <= large:  # where one side has no drift its bits are equal, which is said
                yield _Jump(large / small, places[i - 1], places[i], rises)


def _log_comb(n: int, k: int) -> float:
    """The logarithm of n choose k."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


# ------------------------------------------------------------------------------------------------------------ kernel


def _kernels(sweep: Sweep) -> Iterator[Boundary]:
    """Another kernel or attention implementation at the native dtype: of decode by position, of prefill by length."""
    for mode in sweep.modes:
        routes = [r for r in sweep.routes if (r.mode, r.rung) == (mode, sweep.native) and r.prompt in sweep.lengths]
        decode = {call.start: _names(call) for route in routes for call in route.decode}
        prefill = {sweep.lengths[route.prompt]: _names(call) for route in routes for call in route.prefill}
        sides: tuple[tuple[str, Axis, dict[int, str]], ...] = (
            ("prefill", "length", prefill),
            ("decode", "position", decode),
        )
        for side, axis, names in sides:
            for before, after in pairwise(sorted(names)):
                if names[before] != names[after]:
                    text = f"{side} runs {names[after]} instead of {names[before]}"
                    yield Boundary(
                        change="kernel", axis=axis, before=before, after=after, rises=True, modes=(mode,), text=text
                    )


def _names(call: Call) -> str:
    return ", ".join((call.attention, *call.kernels))


# ----------------------------------------------------------------------------------------------------------- merging


def _merged(found: Sequence[Boundary]) -> list[Boundary]:
    """Join boundaries at one place: sites of one mode, then modes that show the same."""
    by_mode: dict[tuple[object, ...], list[Boundary]] = defaultdict(list)
    for item in found:
        by_mode[item.change, item.axis, item.before, item.after, item.rises, item.modes].append(item)
    joined = []
    for items in by_mode.values():
        items.sort(key=lambda item: [FORWARD_ORDER[Site(site)] for site in item.sites])
        joined.append(replace(items[0], sites=tuple(site for item in items for site in item.sites)))
    by_place: dict[tuple[object, ...], list[Boundary]] = defaultdict(list)
    for item in joined:
        text = item.text if item.change == "kernel" else ""
        by_place[item.change, item.axis, item.before, item.after, item.rises, item.sites, text].append(item)
    return [
        # kv_aligned comes last: there nothing is inherited, so its figures and its first address are the sharper ones.
        replace(items[-1], modes=tuple(mode for item in items for mode in item.modes))
        for items in by_place.values()
    ]
