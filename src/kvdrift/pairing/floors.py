"""The noise of each pass at the finest rung, measured and not assumed: second differences under perturbed inputs.

A pass D is run on its layer inputs x, and again on `x (1 + d xi)` and `x (1 - d xi)`, xi standard normal (stochastic
arithmetic: CESTAC, Vignes 1993; Monte Carlo arithmetic, Parker 1997). At each address

    floor    = |D(+) + D(-) - 2 D(0)| / |D(0)|    what the pass rounds, plus a smooth part of order d^2
    response = |D(+) - D(-)| / |D(+)|             what came through of the change

in the 2-norm, decode and prefill apart: which of them is coarse is then known. Both are measured by the functions that
measure drift, as the drift of D(0) against the mean of D(+) and D(-), twice, and of D(+) against D(-). Where D(0) is
all zeros, such as the scores of a row of zeros, nothing is relative to it: the floor is then relative to half of what
came through, |D(+) - D(-)| / 2.

A change that is smaller than what something inside rounds to is swallowed: the response is nothing, or as much noise as
the floor, or in few elements. A larger d is then taken for that place and what is computed behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.rows import Floats, Rows
from kvdrift.pairing.second_differences import all_zero, beside_zeros, middle_of
from kvdrift.trace.model import PassPair
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import Site

# By what layer inputs are changed, relative: from so little that the smooth part is a rounding of float64, d^2 = u, to
# half a rounding of bfloat16; in between, float32 is passed and its floor still above d^2.
SIZES = (2.0**-26, 2.0**-17, 2.0**-9)

# A floor below this is not told from float64: sums of some thousand terms, at pairs that were not perturbed themselves.
LEAST_FLOOR = 2.0**-44

# One above this is not float64: a 4,096th of a rounding of float32.
COARSE = 2.0**-36


class Scale(NamedTuple):
    """What noise is at a finest rung.

    Attributes:
        sizes: the changes that are tried, relative.
        margin: how many times the floors of both passes a drift may be.
        least: the smallest floor that is told from the rung, relative to the value, as the following.
        coarse: the floor from which on it is not the rung that rounds.
        cancelling: the noise from which on the terms of a sum cancel.
    """

    sizes: tuple[float, ...]
    margin: float
    least: float
    coarse: float
    cancelling: float


# At float32, d^2 is a sixteenth of a rounding (the curve of the floor over d is in decision 29); then come two
# roundings of the float16 that tables hold, and two of blocks of 8 bits. Floors of deep models reach a hundred
# roundings.
SCALES = {
    "float64": Scale(SIZES, 16.0, LEAST_FLOOR, COARSE, 2.0**-43),
    "float32": Scale((2.0**-14, 2.0**-9, 2.0**-6), 8.0, 2.0**-22, 2.0**-14, 2.0**-17),
}
_FINEST = "float64"

Side = Literal["prefill", "decode"]
SIDES: tuple[Side, ...] = ("prefill", "decode")
_OfSide = tuple[dict[Place, tuple[float, float, int]], set[Place]]

# A floor of this share of the response is as much as the response: what came through is noise.
_SWALLOWED = 0.25

# Where fewer elements change, a coarse rounding swallowed the change of the others. Elements on its grid change by one
# step up and one step down, which no second difference shows.
_MOVED = 0.5

# |D(+) + D(-) - 2 D(0)| over the largest of the three: where a sum cancels to nothing in one of them.
_MOST = 4.0

# Noise of this much and more is as large as the value: terms cancel, or the place drowns. It is as large whatever the
# change is, and a larger one shows no more of it.
_SATURATED = 1.0
_GIVEN = (Place(None, Site.EMBED_OUT), Place(0, Site.LAYER_IN))

# Sites that change wherever the layer inputs do. Scores change up to a constant that no softmax sees; if they lie far
# apart, probabilities stay, and so does what attention computes of them.
_MOVING = frozenset(
    {
        Site.ATTN_NORM_OUT,
        Site.Q_PROJ,
        Site.K_PROJ,
        Site.V_PROJ,
        Site.Q_ROPE,
        Site.K_ROPE,
        Site.RESID_ATTN,
        Site.FFN_NORM_OUT,
        Site.MLP_OUT,
        Site.LAYER_OUT,
        Site.FINAL_NORM_OUT,
        Site.LOGITS,
    }
)
_ATTENDING = frozenset({Site.ATTN_SCORES, Site.ATTN_CTX, Site.ATTN_OUT})


class Floor(NamedTuple):
    """The noise of both passes at a place, relative; NaN where a pass was not measured.

    `size` is by what the inputs were changed, the larger of both passes; `n_elements` the fewest of a value there.
    """

    prefill: float
    decode: float
    size: float
    n_elements: int

    @property
    def cancels(self) -> bool:
        """Whether both passes compute nothing but noise: the terms of a sum cancel."""
        return min(self.prefill, self.decode) > _SATURATED

    @property
    def sum(self) -> float:
        """The noise of both passes together."""
        return self.prefill + self.decode

    @property
    def largest(self) -> float:
        """The noise of the coarser pass."""
        return max(self.prefill, self.decode)


class Unmoved(NamedTuple):
    """A place that no change of the layer inputs reaches in the passes `sides`."""

    place: Place
    sides: tuple[Side, ...]


class _Measured(NamedTuple):
    """What one pass at one size of the change shows of a place; `noise` is the part of the floor that stands beside the
    response, `moved` the share of elements that changed.

    `share` is the largest that noise is of the response of its own row. Rows are as unlike as what reaches them: the
    noise of one says nothing of the response of another.
    """

    floor: float
    noise: float
    response: float
    share: float
    n_elements: int
    moved: float


@dataclass(slots=True)
class FloorTable:
    """The floors of one route. Perturbed passes are kept until the pair is there that they belong to, or the pair until
    they come (`keeps_pairs`).

    `shared` are the floors of another route that hold until this one has its own. `rounding` and `response` are drift
    tables, whose modes are named after mode, pass and size.
    """

    shared: FloorTable | None = None
    keeps_pairs: bool = False
    rounding: DriftTable = field(default_factory=DriftTable)
    response: DriftTable = field(default_factory=DriftTable)
    _waiting: dict[tuple[str, str], dict[float, PassPair]] = field(default_factory=dict, repr=False)
    _pairs: dict[tuple[str, str], PassPair] = field(default_factory=dict, repr=False)
    _zeros: set[tuple[str, Place]] = field(default_factory=set, repr=False)
    _known: dict[str, tuple[int, dict[Place, Floor], tuple[Unmoved, ...]]] = field(default_factory=dict, repr=False)
    _rung: str | None = None

    @property
    def scale(self) -> Scale:
        """What noise is at the rung that was perturbed, or at float64 as long as nothing was.

        Raises:
            KeyError: at a rung that has no scale.
        """
        return SCALES[self.rung]

    @property
    def rung(self) -> str:
        """The rung that was perturbed, float64 as long as none was."""
        if self._rung is None and self.shared is not None:
            return self.shared.rung
        return self._rung or _FINEST

    def remember(self, pair: PassPair, shift: float) -> PassPair | None:
        """Keep two perturbed passes until their pair comes, and return the pair if it was there and is measured now."""
        key = pair.mode, pair.decode.prompt
        self._rung = pair.prefill.rung
        self._waiting.setdefault(key, {})[shift] = pair
        if key not in self._pairs or -shift not in self._waiting[key]:
            return None
        self.complete(self._pairs[key])
        return self._pairs[key]

    def complete(self, pair: PassPair) -> None:
        """Measure the perturbed passes that belong to a pair, if there are any, and let go of them."""
        key = pair.mode, pair.decode.prompt
        if self.keeps_pairs:
            self._pairs[key] = pair
        found = self._waiting.pop(key, {})
        for size in sorted({abs(shift) for shift in found}):
            up, down = found.get(size), found.get(-size)
            if up is not None and down is not None:
                self._measure(pair, up, down, size)

    def release(self) -> None:
        """Let go of pairs: no perturbed passes of theirs will come."""
        self._pairs.clear()
        self._waiting.clear()

    def _measure(self, pair: PassPair, up: PassPair, down: PassPair, size: float) -> None:
        for side in SIDES:
            base, above, below = (getattr(item, side) for item in (pair, up, down))
            label = _label(pair.mode, side, size)
            middle = middle_of(base.prompt, above, below)
            self.rounding.add_drifts(PassPair(pair.mode, base, middle, up.positions), label)
            self.response.add_drifts(PassPair(pair.mode, above, below, up.positions), label)
            if (zeros := beside_zeros(base, above, below, _MOVING | _ATTENDING)) is not None:
                self.rounding.add_drifts(PassPair(pair.mode, *zeros, up.positions), _at_zeros(label))
            self._zeros.update((label, place) for place in all_zero(base, _MOVING | _ATTENDING))

    def has(self, mode: str) -> bool:
        """Whether anything was measured in a mode, on this route or the shared one."""
        return self._has(mode) or (self.shared is not None and self.shared.has(mode))

    def _has(self, mode: str) -> bool:
        return any(len(self._rows(self.rounding, mode, side, self.scale.sizes[0])) for side in SIDES)

    def is_coarse(self, mode: str) -> bool:
        """Whether a pass rounds more coarsely than the rung does somewhere, or does not answer."""
        coarse = any(max(item.prefill, item.decode) > self.scale.coarse for item in self.of(mode).values())
        return coarse or bool(self.unmoved(mode))

    def of(self, mode: str) -> dict[Place, Floor]:
        """Return the floors of a mode by place, the largest of all that was perturbed."""
        return self._pooled(mode)[0]

    def where(self, mode: str, side: Side, place: Place) -> Address:
        """Return the address at which the floor of a place is largest.

        Raises:
            KeyError: nothing was measured there.
        """
        if self.shared is not None and not self._has(mode):
            return self.shared.where(mode, side, place)
        for size in reversed(self.scale.sizes):
            rows = self._rows(self.rounding, mode, side, size)
            at = np.flatnonzero(rows.by_place({place: 1.0}) == 1.0) if len(rows) else np.empty(0, dtype=np.intp)
            if len(at):
                return rows.addresses(at[[np.argmax(rows.rel_l2[at])]])[0]
        raise KeyError(place)

    def unmoved(self, mode: str) -> tuple[Unmoved, ...]:
        """Return the places that no change of the inputs reaches, at the largest size either, in forward order."""
        return self._pooled(mode)[1]

    def wants_larger(self, mode: str) -> float | None:
        """Return the size that is to be tried next, None if what was tried came through, or there is no larger one."""
        sizes = self.scale.sizes
        tried = [size for size in sizes if any(len(self._rows(self.rounding, mode, side, size)) for side in SIDES)]
        if not tried or len(tried) == len(sizes):
            return None
        if any(size > tried[-1] for side in SIDES for size in self._coarse_alone(mode, side).values()):
            return sizes[len(tried)]
        swallowed = any(
            _is_swallowed(place, item, (_label(mode, side, tried[-1]), place) in self._zeros, self.scale.least)
            for side in SIDES
            for place, item in self._at(mode, side, tried[-1]).items()
        )
        return sizes[len(tried)] if swallowed else None

    def _coarse_alone(self, mode: str, side: Side) -> dict[Place, float]:
        """The size that each place needs that swallowed a smaller one where nothing else changed.

        As designed, the inputs of all tokens change: keys carry the change on, and a query that swallowed it does not
        show. With aligned inputs it does.
        """
        if mode != Mode.AS_DESIGNED or not self._has(Mode.KV_ALIGNED):
            return {}
        return self._larger(side)

    def _larger(self, side: Side, *, by_itself: bool = False) -> dict[Place, float]:
        """The places of a pass with aligned inputs that needed a larger change than the first, and which."""
        found = self._of_side(Mode.KV_ALIGNED, side, by_itself=by_itself)[0]
        return {place: size for place, (_, size, _) in found.items() if size > self.scale.sizes[0]}

    # -------------------------------------------------------------------------------------------------------- pooling

    def _pooled(self, mode: str) -> tuple[dict[Place, Floor], tuple[Unmoved, ...]]:
        if self.shared is not None and not self._has(mode):
            return self.shared._pooled(mode)
        known = self._known.get(mode)
        if known is not None and known[0] == len(self.rounding.blocks):
            return known[1:]
        sides = {side: self._of_side(mode, side) for side in SIDES}
        nothing = (np.nan, 0.0, 1)
        floors: dict[Place, Floor] = {}
        for place in dict.fromkeys([*sides["prefill"][0], *sides["decode"][0]]):
            first, second = (sides[side][0].get(place, nothing) for side in SIDES)
            floors[place] = Floor(first[0], second[0], max(first[1], second[1]), min(first[2], second[2]))
        still = {place for side in SIDES for place in sides[side][1]}
        unmoved = tuple(
            Unmoved(place, tuple(side for side in SIDES if place in sides[side][1]))
            for place in sorted(still, key=lambda place: place.forward_rank)
        )
        self._known[mode] = len(self.rounding.blocks), floors, unmoved
        return floors, unmoved

    def _of_side(self, mode: str, side: Side, *, by_itself: bool = False) -> _OfSide:
        """The floor, the size that gave it and the fewest elements by place, and the places that did not move."""
        least = self.scale.least
        at = [(size, found) for size in self.scale.sizes if (found := self._at(mode, side, size))]
        floors: dict[Place, tuple[float, float, int]] = {}
        still: set[Place] = set()
        reached: dict[int | None, int] = {}
        alone = self._coarse_alone(mode, side)
        # The keys of a prefill change with its query, those of an aligned step do not; few rows rarely leave a grid.
        asks = mode == Mode.KV_ALIGNED and len(at) > 1 and not by_itself
        shown = self._larger(SIDES[side == SIDES[0]], by_itself=True) if asks else {}
        for place in sorted(at[0][1] if at else (), key=lambda place: place.forward_rank):
            part = _inherits_from(place, mode)
            start = index = max(reached.get(part, 0), sum(size < alone.get(place, 0.0) for size, _ in at[:-1]))
            while index < len(at):
                item = at[index][1].get(place)
                is_zero = (_label(mode, side, at[index][0]), place) in self._zeros
                if item is None or not _is_swallowed(place, item, is_zero, least):
                    break
                if index == len(at) - 1:
                    if item.response == 0.0:
                        still |= {place} & {Place(place.layer, site) for site in _MOVING}
                    break
                index += 1
            first, last = (at[min(i, len(at) - 1)][1].get(place) for i in (start, index))
            if first is not None and last is not None and first.floor <= least and last.moved <= first.moved:
                index = start  # what does not move at the largest change either is not swallowed by a coarse rounding
            larger = sum(size < shown.get(place, 0.0) for size, _ in at[:-1])
            if larger > index and (item := at[larger][1].get(place)) is not None and _is_noise(item, least):
                index = larger
            reached[part] = min(index, len(at) - 1)
            tried = [(size, found[place]) for size, found in at[: index + 1] if place in found]
            floor = max(item.floor for _, item in tried)
            floors[place] = (
                # Nothing is computed before the input of the first layer: what differs there is not noise.
                min(floor, least) if place in _GIVEN else floor,
                tried[-1][0],
                min(item.n_elements for _, item in tried),
            )
        return floors, still

    def _at(self, mode: str, side: Side, size: float) -> dict[Place, _Measured]:
        """What one pass shows at one size by place: the largest floor, and the smallest response."""
        rounding, response = (self._rows(table, mode, side, size) for table in (self.rounding, self.response))
        if not len(rounding):
            return {}
        zeros = self._zeros_of(mode, side, size)
        noise = rounding.where(zeros.find(rounding.key) < 0)
        found = noise.largest_by_place(np.minimum(2.0 * noise.rel_l2, _MOST))
        at_zeros = zeros.largest_by_place(np.minimum(2.0 * zeros.rel_l2, _MOST))
        shares = noise.largest_by_place(_shares(noise, response))
        responses = response.largest_by_place(-response.rel_l2)
        moved = response.largest_by_place(-response.n_differ / np.maximum(1, response.n_elements))
        fewest = rounding.largest_by_place(-rounding.n_elements.astype(np.float64))
        measured: dict[Place, _Measured] = {}
        for place in dict.fromkeys([*found, *at_zeros]):
            beside, alone = found.get(place, 0.0), at_zeros.get(place, 0.0)
            # A row of zeros has a response of its own, twice the half that its noise is relative to.
            swallowing = max(beside, alone if alone > 2.0 * _SWALLOWED else 0.0)
            if np.isfinite(floor := max(beside, alone)):
                measured[place] = _Measured(
                    floor,
                    swallowing,
                    -responses.get(place, -np.inf),
                    max(shares.get(place, 0.0), np.inf if swallowing > beside else 0.0),
                    int(-fewest[place]),
                    -moved.get(place, -np.inf),
                )
        return measured

    def _zeros_of(self, mode: str, side: Side, size: float) -> Rows:
        """The rows of zeros, with noise relative to half of what came through."""
        label = _at_zeros(_label(mode, side, size))
        return self._labelled(self.rounding, label)

    def _rows(self, table: DriftTable, mode: str, side: Side, size: float) -> Rows:
        return self._labelled(table, _label(mode, side, size))

    def _labelled(self, table: DriftTable, label: str) -> Rows:
        rung = next((block.rung for block in table.blocks if block.mode == label), "")
        return table.select(label, rung)


def _at_zeros(label: str) -> str:
    return f"{label}, rows of zeros"


def _label(mode: str, side: str, size: float) -> str:
    return f"{mode} {side} {size:.0e}"


def _inherits_from(place: Place, mode: str) -> int | None:
    """The layer whose coarse sites a place inherits; as designed, those of all layers below are one.

    With aligned inputs a layer inherits nothing: another input takes the place of the one that comes in, which is still
    what the layer below computed.
    """
    if mode != Mode.KV_ALIGNED or place.layer is None:
        return None
    return place.layer - 1 if place.site is Site.LAYER_IN else place.layer


def _shares(noise: Rows, response: Rows) -> Floats:
    """What noise is of the response of the same row, [row]; infinite where nothing came through."""
    at = response.find(noise.key)
    came = np.where(at < 0, 0.0, response.rel_l2[at]) if len(response) else np.zeros(len(noise))
    made = np.minimum(2.0 * noise.rel_l2, _MOST)
    return np.asarray(np.divide(made, came, out=np.full(len(noise), np.inf), where=came > 0.0))


def _is_noise(item: _Measured, least: float) -> bool:
    """Whether a floor is as much as the response: the smooth part of a second difference is far less."""
    return item.noise > least and item.share > _SWALLOWED


def _is_swallowed(place: Place, item: _Measured, is_zero: bool, least: float) -> bool:
    """Whether a change of the inputs came through as noise or not at all, so that the floor may be any.

    A floor up to `least` is that of the rung.
    """
    if item.noise > _SATURATED and item.moved >= _MOVED:
        return False
    # Of scores the largest stays, and few others: what comes through then is steps of a coarse grid, as elsewhere.
    few = item.moved < _MOVED and place.site in _MOVING | {Site.ATTN_SCORES}
    if item.noise > least:
        return item.share > _SWALLOWED or few
    if is_zero or place.site not in _MOVING | _ATTENDING:
        return False
    return item.response == 0.0 or few
