"""Measured noise: how coarsely each pass rounds at the finest rung, whatever it is called.

The ladder judges by it (`kvdrift.instruments.ladder`). This instrument says where something is coarser than the rung,
in which pass and by how much, and finds what no rounding is:

* noise in one pass alone that is above what the native dtype rounds to. Two passes that round to dtypes in play err by
  no more than that; a decode step that adds noise would otherwise widen its own bound;
* a change of the layer inputs that never shows: something ignores its input, or kvdrift does not see it;
* noise of both passes in which a place drowns: no drift would stand out of it. Where the terms of a sum cancel, the
  noise is as large as the sum, and still nothing beside the residual stream that the sum is added to. Where the stream
  has more of it than roundings of what went into the place can make, nothing there can be judged.

Noise begins at the first coarse site of a layer, in forward order; what follows inherits it. Blind to noise of both
passes alike, and to noise of one pass below the native rounding; both are stated as the larger minimum that they make.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from kvdrift.instruments.base import NOTHING, Blind, Judges, Panel, Run, Seen
from kvdrift.pairing.floors import SIDES, Floor, FloorTable, Scale, Side, Unmoved
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF, Arithmetic
from kvdrift.vocabulary.sites import Site

# Errors in scores are multiplied by the scores; sums at float32 and float64 err by more than one rounding.
_ATTENTION, _SUMS = 4.0, 16.0
_ATTENDED = (Site.ATTN_SCORES, Site.ATTN_PROBS, Site.ATTN_CTX)

# What is computed from all that a layer computed.
_STREAM = (Site.RESID_ATTN, Site.LAYER_OUT, Site.FINAL_NORM_OUT, Site.LOGITS)


@dataclass(frozen=True, slots=True)
class Coarse:
    """A place at which noise begins: its floor, and the passes `sides` that are coarser than the rung.

    `limit` is what the native dtype may round to there, relative, where one pass alone is coarse; None elsewhere.
    """

    place: Place
    floor: Floor
    sides: tuple[Side, ...]
    limit: float | None = None

    @property
    def size(self) -> float:
        """The noise of the coarser pass."""
        return self.floor.largest

    @property
    def is_no_rounding(self) -> bool:
        """Whether no dtype in play rounds so."""
        return self.limit is not None and self.size > self.limit

    @property
    def is_inside_attention(self) -> bool:
        """Whether it is noise of one pass alone, and begins inside attention."""
        return self.limit is not None and self.place.site in _ATTENDED


class Drowned(NamedTuple):
    """A place at which the noise of both passes hides any drift, its floor, and the noise that it leaves in the stream
    behind it; NaN where nothing behind it was measured."""

    place: Place
    floor: Floor
    left: float


@dataclass(frozen=True, slots=True)
class NoiseFindings:
    """Where noise begins, in forward order, what no change of the inputs reaches, and what drowns in noise."""

    begins: tuple[Coarse, ...]
    unmoved: tuple[Unmoved, ...]
    drowned: tuple[Drowned, ...] = ()


def find_noise(floors: FloorTable, mode: str, arithmetic: Arithmetic) -> NoiseFindings:
    """Return where the noise of a mode begins: once in each layer with aligned inputs, once at all as designed.

    `arithmetic` is that of the native run. Its kernels run at the finest rung too where it is a dtype. Where it is a
    configuration, the finest rung is another one, and nothing in it is coarser than its own dtype.
    """
    in_play = arithmetic.at(floors.rung) if arithmetic.is_configured else arithmetic
    found = _begins(floors, mode, in_play)
    drowned = _drowned(floors.of(mode), floors.scale, mode, in_play)
    return NoiseFindings(tuple(found), floors.unmoved(mode), tuple(drowned))


def _begins(table: FloorTable, mode: str, arithmetic: Arithmetic) -> Iterator[Coarse]:
    floors, scale = table.of(mode), table.scale
    met: set[tuple[int | None, Side]] = set()
    for place in sorted(floors, key=lambda place: place.forward_rank):
        floor = floors[place]
        if mode == Mode.KV_ALIGNED and place.site is Site.LAYER_IN:
            continue  # handed on by the layer below, and not used
        part = place.layer if mode == Mode.KV_ALIGNED else None
        coarse = tuple(side for side in SIDES if getattr(floor, side) > scale.coarse)
        new = tuple(side for side in coarse if (part, side) not in met)
        met.update((part, side) for side in coarse)
        if new:
            limit = _limit(place.site, floor, arithmetic, scale) if len(coarse) == 1 else None
            yield Coarse(place, floor, coarse, limit)


def _drowned(floors: dict[Place, Floor], scale: Scale, mode: str, arithmetic: Arithmetic) -> Iterator[Drowned]:
    """The places where no drift stands out of the noise, and the stream behind them has more noise than follows from
    roundings: those of a kernel in float32 or the native dtype, or what went into the place has of noise."""
    before: dict[int | None, float] = {}
    ordered = sorted(floors, key=lambda place: place.forward_rank)
    for index, place in enumerate(ordered):
        floor, part = floors[place], place.layer if mode == Mode.KV_ALIGNED else None
        known = before.setdefault(part, max(UNIT_ROUNDOFF["float32"], arithmetic.unit))
        if not scale.margin * floor.sum >= 1.0:
            if np.isfinite(floor.sum):
                before[part] = max(known, floor.largest)
            continue
        behind = (item for item in ordered[index:] if item.site in _STREAM and item.layer in (place.layer, None))
        left = next((floors[item].largest for item in behind), np.nan)
        if not left <= scale.margin * known:
            yield Drowned(place, floor, left)


def _limit(site: Site, floor: Floor, arithmetic: Arithmetic, scale: Scale) -> float:
    """What rounding to a dtype in play makes at a site, where the other pass is not coarse.

    Where the terms of a sum cancel in the other pass, they do so in this one as well; and what the other pass shows,
    this one may by the margin of the ladder.
    """
    limit = arithmetic.bound(site) * (1.0 if arithmetic.can_judge else _SUMS)
    cancelling = max(1.0, min(floor.prefill, floor.decode) / scale.cancelling)
    limit *= (_ATTENTION if site in _ATTENDED else 1.0) * cancelling
    return max(limit, scale.margin * min(floor.prefill, floor.decode))


def in_words(begins: Iterable[Coarse], largest: int = 3) -> str:
    """Say where noise begins: site, pass, layers and size, the coarsest first."""
    groups: dict[tuple[Site, tuple[Side, ...]], list[Coarse]] = {}
    for item in begins:
        groups.setdefault((item.place.site, item.sides), []).append(item)
    ordered = sorted(groups.items(), key=lambda group: -max(item.size for item in group[1]))
    said = []
    for (site, sides), items in ordered[:largest]:
        layers = [item.place.layer for item in items if item.place.layer is not None]
        where = "" if not layers else f" of layer {layers[0]}" if len(layers) == 1 else f" of {len(layers)} layers"
        which = "both passes" if len(sides) == len(SIDES) else sides[0]
        said.append(f"{site}{where} in {which} ({max(item.size for item in items):.1e})")
    if len(ordered) > largest:
        said.append(f"{len(ordered) - largest} more sites")
    return ", ".join(said)


class Noise(Blind):
    """Says how coarsely each pass rounds at the finest rung; `Seen.found` is the `NoiseFindings`."""

    name: ClassVar[str] = "noise"
    judges: ClassVar[Judges] = "mode"

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """Judge what was measured; nothing where no input was perturbed."""
        if run.plan.ladder == "off" or not run.floors.has(mode):
            return NOTHING
        found = find_noise(run.floors, mode, run.info.arithmetic)
        wrong = [item for item in found.begins if item.is_no_rounding and not _is_behind_8_bits(run, mode, item)]
        floors = [max(floor.prefill, floor.decode) for floor in run.floors.of(mode).values()]
        upper = run.info.ladder.upper
        text = f"no site rounds more coarsely than {upper} in either pass"
        if found.begins:
            text = f"coarser than {upper}: {in_words(found.begins)}"
        if wrong:
            first = wrong[0]
            times = first.size / (first.limit or first.size)
            text = (
                f"{first.sides[0]} alone has noise of {first.size:.1e} at {first.place}, {times:.1f} times what "
                f"{run.info.dtype} rounds to; {text}"
            )
        evidence = Evidence(
            instrument=self.name,
            mode=mode,
            statistic_name=f"largest noise of one pass at {upper}, relative",
            statistic=max(floors, default=None),
            supports="H1" if wrong else None,
            text=text,
            detail={
                "begins": {str(item.place): [item.floor.prefill, item.floor.decode] for item in found.begins},
                "unmoved": {str(item.place): list(item.sides) for item in found.unmoved},
                "drowned": {str(item.place): item.left for item in found.drowned},
                "n_places": len(floors),
            },
        )
        begins = tuple(self._address(run, mode, item) for item in wrong)
        return Seen(evidence=(evidence,), begins=begins, beyond=begins, found=found)

    def _address(self, run: Run, mode: str, item: Coarse) -> Address:
        return run.floors.where(mode, item.sides[0], item.place)


def _is_behind_8_bits(run: Run, mode: str, item: Coarse) -> bool:
    """Whether noise is no more than what both passes make of operands of 8 bits in front of it: few changes of the
    inputs move what is kept in those, and those that do may move it in one pass alone."""
    known = run.table.of_8_bits.get(mode, run.table.of_8_bits.get(Mode.KV_ALIGNED))
    return known is not None and item.size <= known.behind(item.place, mode, run.floors.scale.margin)


def noise_in(panel: Panel, mode: str) -> NoiseFindings:
    """Return what was found of the noise of a mode."""
    found = panel.seen(Noise.name, mode).found
    return found if isinstance(found, NoiseFindings) else NoiseFindings((), ())
