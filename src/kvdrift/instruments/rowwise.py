"""Directed tests of what is computed token by token: the epsilon of norms, and the angles of the rotary embedding.

As replay does for attention (instruments/replay.py), the observed difference of the passes is projected on the
direction in which a known cause moves the result; the coefficient estimates the size of the cause.

* `norm_epsilon`: a norm divides by sqrt(m + e), with m the mean square of its input. Another epsilon, e + d, multiplies
  a row by 1 - d / (2 m): one d for all rows, layers and norms. Only rows with equal inputs take part.
* rotation: a pair is turned by the angle that prefill shows. Each pass is measured from its own vector before the
  rotation. A cause of size d adds to the angle of decode. `rope_position_offset`: d times the angle of one position.
  `rope_scaling`: d times the whole angle. `rope_base`: a base b e^d turns pair i of n by e^(-d i / n) as fast, which
  adds -d i / n times the whole angle.

Rounding is in no preferred direction. How large the coefficient of rounding alone may be follows from it all the same:
an element that was rounded is off by a relative error of variance u^2/3 E[1/m^2], 0.18 u^2 with mantissas m spread
evenly on a logarithmic scale. Rows of the same input are rounded alike, and so are tables at the same position: they
count once. A coefficient within six such deviations is not a cause, however constant its sign. Kernels that truncate
instead of rounding multiply all rows by one factor: it is fitted beside the epsilon and taken off it.

Blind to: epsilons where all norms that are judged see the same mean square; the size of an epsilon in a layer norm with
a large bias, which lowers it; angles where no two neighbouring positions were compared.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvdrift.instruments.replay import Unit, values_by_place
from kvdrift.instruments.sign_flips import affected
from kvdrift.replay.turns import Complex, Floats, angle_of, pairs_of, step_of
from kvdrift.trace.model import Array, PassPair
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF
from kvdrift.vocabulary.sites import Site

NORM_EPSILON = Cause.NORM_EPSILON
_NORMS = {
    Site.ATTN_NORM_OUT: Site.LAYER_IN,
    Site.FFN_NORM_OUT: Site.RESID_ATTN,
    Site.FINAL_NORM_OUT: Site.LAYER_OUT,
}
_ROTATIONS = {Site.Q_ROPE: (Site.Q_NORM, Site.Q_PROJ), Site.K_ROPE: (Site.K_NORM, Site.K_PROJ)}

# Angles that a cause adds to pair i of n: from the angle of one position, the whole angle, and i / n.
_ANGLES: dict[Cause, Callable[[Floats, Floats, Floats], Floats]] = {
    Cause.ROPE_POSITION_OFFSET: lambda step, whole, share: step,
    Cause.ROPE_SCALING: lambda step, whole, share: whole,
    Cause.ROPE_BASE: lambda step, whole, share: -whole * share,
}

# Variance of the relative error of one rounding, in u^2: 1/3 E[1/m^2], E over mantissas from 1 to 2, which is 3 / (8 ln
# 2) where their logarithms are uniform.
ROUNDED = 1.0 / 3.0 * 3.0 / (8.0 * math.log(2.0))
# Roundings between two right results of a norm: two each, where one scales after it has normed.
OF_A_NORM = 4.0
# Roundings of a turned pair: two products and their sum in each pass.
_OF_A_TURN = 6.0
DEVIATIONS = 6.0
# Constants in float32 bias results by that much of the native roundoff, which is not a fault.
_RELEVANT = 1.0 / 256.0
# Rounding may leave this many roundoffs of a turned vector unexplained.
_ROUNDINGS = 8.0


@dataclass(frozen=True, slots=True)
class RowProjection:
    """The difference of one row along the direction of one cause: coefficient = along / size, error its squared norm.

    `lever` is the relative change that a coefficient of one makes, where it is the same for the whole row. `counted` is
    the part of size that counts once, and `source` what rows have in common that are rounded alike. `distinct` is the
    number of elements of a norm that are not rounded alike; those below the normal numbers are left out.
    """

    cause: Cause
    address: Address
    along: float
    size: float
    error: float
    counted: float
    source: int
    lever: float = 0.0
    distinct: float = 0.0

    @property
    def unit(self) -> Unit:
        """The unit of resampling that the row belongs to."""
        return self.address.prompt, self.address.position


@dataclass(frozen=True, slots=True)
class RowTest:
    """The coefficient of one cause: at one place, or pooled.

    Attributes:
        place: where; None where several places are pooled.
        site: the site of all places; None where several sites are pooled.
        values: coefficient [unit], decode less prefill, in the unit of the cause; 0 where a unit shows none.
        present: whether a unit shows one [unit].
        least: the smallest size that rounding cannot make.
        size: the estimate over all units, each with its weight.
        explained: the share of the squared difference that it removes.
    """

    cause: Cause
    place: Place | None
    site: Site | None
    values: NDArray[np.float64]
    present: NDArray[np.bool_]
    least: float
    size: float
    explained: float

    @property
    def error(self) -> float:
        """Standard error over units."""
        found = self.values[self.present]
        return float(found.std(ddof=1)) / math.sqrt(len(found))


@dataclass(slots=True)
class RowTable:
    """Projections of a run, in the one mode in which inputs are aligned."""

    rows: list[RowProjection] = field(default_factory=list)

    def add(self, pair: PassPair, turned: Collection[int] = ()) -> None:
        """Project the difference of both passes of `pair` at its norms and rotations; rows with values that are not
        finite are left out, and rotations of layers in which queries and keys are `turned` alike."""
        sites = {*_NORMS, *_NORMS.values(), *_ROTATIONS, *(site for before in _ROTATIONS.values() for site in before)}
        passes = [{site: values_by_place(trace, site) for site in sites} for trace in (pair.prefill, pair.decode)]
        self.rows += _norm_rows(pair, *passes)
        self.rows += [row for row in _rotation_rows(pair, *passes) if row.address.layer not in turned]

    @property
    def units(self) -> set[Unit]:
        """All units of resampling."""
        return {row.unit for row in self.rows}

    def tests(self, fresh: Collection[Address], units: Sequence[Unit], unit_roundoff: float) -> list[RowTest]:
        """Return the tests of all causes, whose values are [unit] in the order of `units`.

        Norms take part where `fresh` says that their inputs are equal. `unit_roundoff` is that of the native dtype.
        """
        known = set(fresh)
        groups: dict[tuple[Cause, Place | None, Site | None], list[RowProjection]] = defaultdict(list)
        for row in self.rows:
            is_norm = row.cause == NORM_EPSILON
            if not is_norm or row.address in known:
                site = row.address.site
                groups[row.cause, row.address.place, site].append(row)
                groups[row.cause, None, None if is_norm else site].append(row)
        found = []
        for (cause, place, at), rows in groups.items():
            test = _test(cause, place, at, rows, units, unit_roundoff)
            if test is not None:
                found.append(test)
        return found


_Values = dict[Site, dict[tuple[int | None, int], Array]]


def _norm_rows(pair: PassPair, prefill: _Values, decode: _Values) -> Iterator[RowProjection]:
    last = max((layer for layer, _ in prefill[Site.LAYER_OUT] if layer is not None), default=None)
    for site, source in _NORMS.items():
        for (layer, position), right in prefill[site].items():
            wrong = decode[site].get((layer, position))
            given = prefill[source].get((last if layer is None else layer, position))
            if position not in pair.positions or wrong is None or given is None or right.shape != wrong.shape:
                continue
            x, y, z = (v.astype(np.float64).ravel() for v in (given, right, wrong))
            if x.size != y.size or not all(np.isfinite(v).all() for v in (x, y, z)):
                continue
            known = np.abs(y) >= float(ml_dtypes.finfo(right.dtype).smallest_normal)  # type: ignore[no-untyped-call]
            mean_square = _mean_square(x, y)
            n = int(known.sum())
            if n == 0 or mean_square == 0.0:
                continue
            relative = (z[known] - y[known]) / y[known]
            lever = -0.5 / mean_square
            yield RowProjection(
                NORM_EPSILON,
                Address(pair.prefill.prompt, position, layer, site),
                lever * float(relative.sum()),
                lever**2 * n,
                float(relative @ relative),
                lever**2 * n,
                hash(right.tobytes()),
                lever,
                _distinct(x[known]),
            )


def _distinct(x: Floats) -> float:
    """How many elements are rounded each by itself: n^2 over the sum of the squared numbers of equal ones."""
    _, counts = np.unique(np.abs(x), return_counts=True)
    return float(len(x) ** 2 / np.sum(counts.astype(np.float64) ** 2))


def _mean_square(x: Floats, y: Floats) -> float:
    """The mean square that the norm divides by: of x, or of x less its mean in a layer norm.

    Where the mean matters, the one is told from the other by the signs of the result: those of what was scaled, up to
    the sign of each weight, which is positive in nearly all of them.
    """
    centred = x - x.mean()
    agree = [float(np.mean(np.sign(v) == np.sign(y))) for v in (x, centred)]
    return float(np.mean((centred if agree[1] > agree[0] else x) ** 2))


def _rotation_rows(pair: PassPair, prefill: _Values, decode: _Values) -> Iterator[RowProjection]:
    dims = {record.layer: int(record.rows.shape[2]) for record in pair.prefill.cache}
    for site, sources in _ROTATIONS.items():
        source = next((s for s in sources if prefill[s]), None)
        if source is None:
            continue
        for layer, dim in dims.items():
            places = [
                (layer, p)
                for p in sorted(pair.positions)
                if all((layer, p) in values[s] for values in (prefill, decode) for s in (site, source))
            ]
            rows = {
                p: tuple(
                    values[s][layer, p].astype(np.float64).ravel()
                    for values in (prefill, decode)
                    for s in (source, site)
                )
                for layer, p in places
            }
            for position, projections in _turned(rows, dim, pair.prefill.rung):
                address = Address(pair.prefill.prompt, position, layer, site)
                yield from (RowProjection(cause, address, *found, position) for cause, found in projections)


_Found = tuple[float, float, float, float]


def _turned(
    rows: dict[int, tuple[Floats, ...]], dim: int, rung: str
) -> Iterator[tuple[int, list[tuple[Cause, _Found]]]]:
    """Yield by position the projections of the angle by which decode turns pairs more than prefill does.

    `rows` holds by position what each pass had before and after, prefill's first.
    """
    usable = {
        p: four
        for p, four in rows.items()
        if all(v.size == four[0].size and v.size % dim == 0 and np.isfinite(v).all() for v in four)
    }
    layout = _layout(usable, dim, rung)
    if layout is None:
        return
    rotated, halves = layout
    pairs = {
        p: [pairs_of(v.reshape(-1, dim)[:, :rotated].ravel(), rotated, halves) for v in four]
        for p, four in usable.items()
    }
    step = step_of({p: angle_of(four[0], four[1]) for p, four in pairs.items()})
    if step is None:
        return
    share = np.arange(len(step)) / len(step)
    for position, (before, after, before_too, after_too) in pairs.items():
        turn = after_too * before_too.conj() * (after * before.conj()).conj()
        size = np.abs(turn)
        angle = np.divide(turn.imag, size, out=np.zeros_like(size), where=size > 0.0)
        whole = position * step
        # A table is rounded by u |cos| and u |sin|, which turns a pair by up to u |sin 2a|, all heads alike; what is
        # rounded afterwards differs from head to head.
        heads = len(before)
        weight = 1.0 / (np.sin(2.0 * whole) ** 2 + 1.0 / heads)
        error = float(np.sum(weight * angle**2))
        found: list[tuple[Cause, _Found]] = []
        for cause, of in _ANGLES.items():
            direction = of(step, whole, share)
            once = float(np.sum(weight * direction**2))
            if once > 0.0:
                found.append((cause, (float(np.sum(weight * direction * angle)), heads * once, error, once)))
        yield position, found


def _layout(rows: dict[int, tuple[Floats, ...]], dim: int, rung: str) -> tuple[int, bool] | None:
    """How many elements of a head prefill rotates, and whether pairs lie half a head apart; None if it does not."""
    room = (_ROUNDINGS * UNIT_ROUNDOFF.get(rung, UNIT_ROUNDOFF["float64"])) ** 2
    for rotated in (dim, dim // 2, dim // 4):
        for halves in (True, False):
            if (
                rotated >= 2
                and rotated % 2 == 0
                and rows
                and all(_is_turned(four[0], four[1], dim, rotated, halves, room) for four in rows.values())
            ):
                return rotated, halves
    return None


def _is_turned(before: Floats, after: Floats, dim: int, rotated: int, halves: bool, room: float) -> bool:
    """Whether all heads are turned by the same angles, up to a factor, and the rest of each is left alone."""
    first, second = before.reshape(-1, dim), after.reshape(-1, dim)
    pairs: list[Complex] = [pairs_of(v[:, :rotated].ravel(), rotated, halves) for v in (first, second)]
    total = float(np.sum(np.abs(pairs[1]) ** 2))
    given = float(np.sum(np.abs(pairs[0]) ** 2))
    if total == 0.0 or given == 0.0:
        return False
    turned = math.sqrt(total / given) * pairs[0] * np.exp(1j * angle_of(*pairs))[None]
    left = float(np.sum(np.abs(pairs[1] - turned) ** 2))
    left += float(np.sum((second[:, rotated:] - first[:, rotated:]) ** 2))
    return left <= room * (total + float(np.sum(second[:, rotated:] ** 2)))


def _test(
    cause: Cause, place: Place | None, site: Site | None, rows: list[RowProjection], units: Sequence[Unit], unit: float
) -> RowTest | None:
    by_unit: dict[Unit, list[RowProjection]] = defaultdict(list)
    for row in rows:
        by_unit[row.unit].append(row)
    is_norm = cause == NORM_EPSILON
    sums = {u: _sums(found, without_factor=is_norm and place is None) for u, found in by_unit.items()}
    sums = {u: found for u, found in sums.items() if found[1] > 0.0}
    if len(sums) < 2:
        return None
    values = np.array([sums[u][0] / sums[u][1] if u in sums else 0.0 for u in units])
    along, size = (sum(found[i] for found in sums.values()) for i in (0, 1))
    # Rows that are rounded alike are one: in a place by their source, over places the largest place tells.
    counted: dict[tuple[Place, int], float] = {}
    for row in rows:
        if row.unit in sums:
            counted[row.address.place, row.source] = row.counted
    whole = sum(row.size for row in rows if row.unit in sums)
    informative = (sum(counted.values()) if is_norm else _largest_place(counted)) * size / whole
    roundings = OF_A_NORM if is_norm else _OF_A_TURN
    error = sum(row.error for row in rows)
    lever = max((abs(row.lever) for row in rows), default=0.0) or 1.0
    least = max(
        DEVIATIONS * unit * math.sqrt(roundings * ROUNDED / informative),
        _RELEVANT * unit / lever,
    )
    explained = 0.0 if error == 0.0 else min(1.0, along**2 / size / error)
    return RowTest(cause, place, site, values, np.array([u in sums for u in units]), least, along / size, explained)


def _sums(rows: Iterable[RowProjection], *, without_factor: bool) -> tuple[float, float]:
    """Along and size of one unit; `without_factor` fits a common factor of all rows beside the cause."""
    rows = list(rows)
    along, size = sum(row.along for row in rows), sum(row.size for row in rows)
    if not without_factor:
        return along, size
    n, factor, lever = (
        sum(row.size / row.lever**2 for row in rows),
        sum(row.along / row.lever for row in rows),
        sum(row.size / row.lever for row in rows),
    )
    left = size - lever**2 / n
    return (along - lever * factor / n, left) if left > 1e-6 * size else (0.0, 0.0)


def _largest_place(counted: dict[tuple[Place, int], float]) -> float:
    """The tables of all layers are one and the same: the place with the most to say counts."""
    places: dict[Place, float] = defaultdict(float)
    for (place, _), value in counted.items():
        places[place] += value
    return max(places.values())


def first_place(tests: Sequence[RowTest], p_values: NDArray[np.float64], alpha: float) -> tuple[int, Place] | None:
    """Return the test of the cause that was found, by index, and the place where it begins; None if no cause was.

    `p_values` [test] are adjusted for the whole family, whose level is `alpha`.

    A cause that is in every layer is found by the pooled test; where it begins is the first place that shows it by
    itself, or, where none does, the one with the most to say.
    """
    sure = [index for index, test in enumerate(tests) if p_values[index] <= alpha and abs(test.size) >= test.least]
    pooled = {(tests[i].cause, tests[i].site) for i in sure if tests[i].place is None}
    # The epsilon of one place is a factor, and a factor may be rounding: other places must tell it from one.
    sure = [i for i in sure if tests[i].cause != NORM_EPSILON or (NORM_EPSILON, None) in pooled]
    if not sure:
        return None
    certain = [tests[i] for i in sure]
    begins = {i: _begin(tests[i], certain, tests) for i in sure}
    first = min(begins.values(), key=lambda place: place.forward_rank)
    here = [i for i in sure if begins[i] == first]
    best = max(here, key=lambda i: (tests[i].explained, tests[i].place is None))
    alike = [i for i in here if tests[i].cause == tests[best].cause]
    n_places = len({begins[i] for i in sure if tests[i].cause == tests[best].cause and tests[i].place is not None})
    index = next((i for i in alike if tests[i].place is None and n_places != 1), best)
    return index, first


def _begin(test: RowTest, sure: Sequence[RowTest], tests: Sequence[RowTest]) -> Place:
    """The first place that has the cause of `test`, among those that it covers."""
    every: dict[Place, NDArray[np.float64]] = {}
    certain: list[Place] = []
    for other in tests:
        if other.place is not None and other.cause == test.cause and test.site in (None, other.site):
            every[other.place] = other.values[other.present]
            certain += [other.place] if any(other is item for item in sure) else []
    return test.place or min(affected(every, certain), key=lambda place: place.forward_rank)
