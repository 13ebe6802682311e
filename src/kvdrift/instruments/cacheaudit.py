"""Cache audit: every slot and head of K and V that decode reads against what prefill wrote there.

Drift of a cached row is inherited from all layers below, so its noise is not known from first principles. But the rows
of one layer drift alike, and a row that holds something else stands out: it is off by about its own size. A slot is
beyond noise if a head of it is off by a quarter of the size of such a row and by many times the median of the layer's
slots, so that one slot among thousands is found, and a model that drifts much by itself is not alarmed at.

Mixtures of experts abstain: a near tie that turns sends one token elsewhere, which then drifts alone, with nothing
wrong.

Quantised caches have a bound of their own, value by value, at the rows that were quantised from equal inputs: those of
the first call. There the row that decode reads and the honestly quantised one are each half a step from what was
written, so they are at most one step apart, up to rounding. Later rows inherit such steps, and are left to the ladder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from kvdrift.instruments.base import NOTHING, Judges, Panel, QuantisedRows, Run, Seen
from kvdrift.pairing.align import Aligner
from kvdrift.replay.quantisation import FORMATS, group_size, steps_of
from kvdrift.trace.model import Array, PassPair, Slots
from kvdrift.trace.recording import RecordedPair
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.plan import Mode, PairRole
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF
from kvdrift.vocabulary.sites import CACHE_SITES, Site

# Fewer slots than this have no median to stand out from.
_FEWEST = 8
# A slot that is off by less than this share of a row's size is not called another row.
_GROSS = 0.25
# Times the median drift of the layer's slots and heads. With log drift spread by a factor of 2 around its median (one
# standard deviation), one in 10^8 rounding errors is as large.
_FAR = 45.0


@dataclass(frozen=True, slots=True)
class WorstSlot:
    """The slot of a cache read that drifts most, in units of the typical size of a row; `median` is over the slots."""

    address: Address
    slot: int
    head: int
    drift: float
    median: float

    @property
    def bound(self) -> float:
        """The drift, in units of a typical row, that rounding does not reach."""
        return max(_GROSS, _FAR * self.median)


def allowed(quantised: QuantisedRows, rows: Array, unit: float) -> Array:
    """Return by how much honest rows may differ from the honest ones `rows`, value by value, in the unit of the rows.

    Both are [slot, head, dim]; `unit` is the unit roundoff of the native dtype. NaN among the rows makes NaN of what is
    allowed, which counts as infinitely off.

    Each side is half a step from what was written. The engine's quantiser computes at the native dtype: scale,
    shifted value, quotient and product err by seven roundings of up to `levels` steps, and the result by one.
    """
    form = FORMATS[quantised.kind]
    if form.n_bits is None:  # computed in float32; 4 significant bits, down to the smallest step of the scale
        size = np.abs(rows.astype(np.float64))
        least = float(size.max(initial=0.0)) / 448.0 * 2.0**-9
        return np.asarray(np.maximum(size * 2.0**-3, least) + 2 * unit * size)
    # Where keys and values have rows of unlike length the engine's groups are smaller, and so are their steps.
    step = steps_of(rows, group_size(rows.shape[-1]), form.n_bits)
    largest = np.abs(rows.astype(np.float64)).max(axis=-1, keepdims=True)
    return np.asarray(step * (1.0 + 7 * unit * form.levels) + 2 * unit * largest)


@dataclass(frozen=True, slots=True)
class QuantisedSlot(WorstSlot):
    """The slot of a quantised cache that drifts most, in units of what honest quantisation allows."""

    @property
    def bound(self) -> float:
        """What honest quantisation allows, in its own units."""
        return 1.0


@dataclass(slots=True)
class SlotTable:
    """The worst slot of every cache read of a run; `n_slots` counts those looked at, one for each head."""

    worst: list[WorstSlot] = field(default_factory=list)
    n_slots: int = 0
    n_short: int = 0

    def add(self, pair: PassPair, quantised: Mapping[str, QuantisedRows] = MappingProxyType({})) -> None:
        """Look at every slot that decode reads at the positions of `pair`; what is not finite is infinitely off.

        `quantised` says which rows a quantised cache has quantised, by prompt.
        """
        unit = UNIT_ROUNDOFF.get(pair.prefill.rung, UNIT_ROUNDOFF["bfloat16"])
        for values in Aligner(pair, sites=CACHE_SITES).pairs():
            if values.slots is None or len(values.slots) < _FEWEST:
                self.n_short += 1
                continue
            shape = (len(values.slots), values.n_heads, -1)
            self.n_slots += len(values.slots) * values.n_heads
            address = Address(pair.prefill.prompt, values.positions[0], values.layer, values.site)
            if (rows := quantised.get(pair.prefill.prompt)) is not None:
                first, second = (side.reshape(shape) for side in (values.prefill, values.decode))
                self.worst.append(_worst_quantised(address, values.slots, first, second, rows, unit))
                continue
            if values.prefill.tobytes() == values.decode.tobytes():  # as they mostly are: nothing to compute
                self.worst.append(WorstSlot(address, int(values.slots[0]), 0, 0.0, unit))
                continue
            first, second = (side.reshape(shape).astype(np.float64) for side in (values.prefill, values.decode))
            with np.errstate(invalid="ignore", over="ignore"):
                size = np.linalg.norm(first, axis=-1)
                off = np.linalg.norm(second - first, axis=-1)
            # A row that is nearly zero, as the values of a first token may be, is held against the others of its head.
            typical = np.maximum(size, np.median(size, axis=0))
            drift = np.divide(off, typical, out=np.zeros_like(off), where=typical > 0.0)
            drift = np.where(np.isnan(drift), np.inf, drift)
            slot, head = np.unravel_index(int(np.argmax(drift)), drift.shape)
            self.worst.append(
                WorstSlot(
                    address,
                    int(values.slots[slot]),
                    int(head),
                    float(drift[slot, head]),
                    max(unit, float(np.median(drift))),
                )
            )


def _worst_quantised(
    address: Address, slots: Slots, honest: Array, read: Array, rows: QuantisedRows, unit: float
) -> QuantisedSlot:
    """The worst of the rows that were quantised from equal inputs."""
    here = slots < rows.n_first
    honest, read = honest[here], read[here]
    off = np.abs(read.astype(np.float64) - honest.astype(np.float64))
    excess = np.divide(off, allowed(rows, honest, unit), out=np.zeros_like(off), where=off != 0.0)
    worst = np.where(np.isnan(excess), np.inf, excess).max(axis=-1)
    slot, head = np.unravel_index(int(np.argmax(worst)), worst.shape)
    return QuantisedSlot(address, int(slots[here][slot]), int(head), float(worst[slot, head]), float(np.median(worst)))


_UNITS = {WorstSlot: "a row's size", QuantisedSlot: "what honest quantisation allows"}


def judge_slots(
    table: SlotTable | None, why_not: str | None = None, mode: str = Mode.AS_DESIGNED
) -> tuple[list[Address], Evidence]:
    """Return the addresses at which a slot is beyond noise, and the evidence; abstains for the reason `why_not`."""
    if table is None or not table.worst:
        reason = why_not or f"no cache read had {_FEWEST} slots or more"
        return [], Evidence.abstain("cache", mode, "largest drift of a cached row over its bound", reason)
    beyond = [item for item in table.worst if item.drift > item.bound]
    worst = max(table.worst, key=lambda item: item.drift / item.bound)
    prompt, position, layer, site, _ = worst.address
    return [item.address for item in beyond], Evidence(
        instrument="cache",
        mode=mode,
        statistic_name="largest drift of a cached row over its bound",
        statistic=worst.drift / worst.bound,
        bound=1.0,
        supports="H1" if beyond else "H0",
        minimum_detectable=max(item.bound for item in table.worst),
        text=f"of {table.n_slots} slots and heads the worst is slot {worst.slot}, head {worst.head} of {site}, read at "
        f"{prompt} / pos {position} / layer {layer}: off by {worst.drift:.2g} of {_UNITS[type(worst)]} "
        f"(median {worst.median:.2g}, bound {worst.bound:.2g})",
        detail={"n_slots": table.n_slots, "n_beyond": len(beyond), "slot": worst.slot, "head": worst.head},
    )


_NO_SLOTS = "a mixture of experts may send one token elsewhere at a near tie, and that token then drifts alone"


@dataclass(slots=True)
class CacheAudit:
    """Looks at every cached row that decode reads, slot by slot and head by head.

    In kv_aligned the rows before the token are the bytes that prefill wrote, so that there is something to say of them
    only where a row stands out.
    """

    name: ClassVar[str] = "cache"
    judges: ClassVar[Judges] = "mode"
    table: SlotTable = field(default_factory=SlotTable)
    aligned: SlotTable = field(default_factory=SlotTable)

    def see(self, item: RecordedPair, run: Run) -> None:
        """Look at the rows of a native pair of a model without experts."""
        native = item.role is PairRole.PAIR and item.pair.prefill.rung == run.info.dtype
        has_experts = run.info.experts_per_token is not None or (
            run.foreign is not None and any(row.site is Site.ROUTER for row in item.pair.prefill.rows)
        )
        if not native or has_experts:
            return
        if item.pair.mode is Mode.AS_DESIGNED:
            self.table.add(item.pair, run.quantised)
        elif run.foreign is None:  # the promise of a foreign kv_aligned is checked by itself
            self.aligned.add(item.pair)

    def suspected(self, pair: PassPair, run: Run) -> list[Address]:
        """Return the reads of a pair in which a slot is beyond its bound."""
        table = self.aligned if pair.mode is Mode.KV_ALIGNED else self.table
        return [i.address for i in table.worst if i.address.prompt == pair.prefill.prompt and i.drift > i.bound]

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """Judge the worst slot of every read."""
        aligned = mode == Mode.KV_ALIGNED
        table = self.aligned if aligned else self.table
        if (aligned or run.foreign is not None) and not table.worst:
            return NOTHING
        beyond, evidence = judge_slots(table, _NO_SLOTS, mode)
        if aligned and not beyond:
            return NOTHING
        return Seen(evidence=(evidence,), begins=tuple(beyond), beyond=tuple(beyond))
