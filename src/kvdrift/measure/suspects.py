"""Keeps, while a run is captured, the values of the layer in which a mismatch seems to begin.

Traces of all prompts do not stay in memory; what a diagnosis needs is one layer of one prompt. The layer and the site
are those of the localisation, which picks them by the same order; what an instrument finds that looks at the values
themselves, such as replay, is kept beside. Of the positions that fail there the first with some
keys before it is kept: where there are two keys, the first but one is the last too, and causes look alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from kvdrift.diagnosis.model import Suspect, collect
from kvdrift.instruments.ladder import excess_of, measured_excess, rounding_bounds
from kvdrift.instruments.native import beyond_alone
from kvdrift.instruments.noise import find_noise
from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.floors import FloorTable
from kvdrift.pairing.rows import Rows
from kvdrift.trace.model import PassPair
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.precision import RUNGS, Arithmetic, Rungs

# Keys before a token from which on causes no longer look alike.
_TELLING = 8
# Places that are kept of one instrument and mode: bounds that more pairs widen may let go of the first ones.
_MOST_PLACES = 3


@dataclass(slots=True)
class Suspects:
    """The earliest suspect of each mode and rung, and by mode that of noise in one pass which is no rounding.

    `named` holds those of instruments that look at the native values themselves, by mode, instrument and place.
    """

    kept: dict[tuple[str, str], Suspect] = field(default_factory=dict)
    noisy: dict[str, Suspect] = field(default_factory=dict)
    named: dict[tuple[str, str], dict[Place, Suspect]] = field(default_factory=dict)

    def watch(
        self,
        table: DriftTable,
        pair: PassPair,
        rows: Rows,
        arithmetic: Arithmetic,
        rungs: Rungs = RUNGS,
        floors: FloorTable | None = None,
    ) -> None:
        """Look at the newest rows, those of `pair`, and keep its values if a mismatch begins earlier here."""
        mode, rung = pair.mode, pair.prefill.rung
        if rung == rungs.upper and floors is not None and floors.has(mode):
            self._watch_noise(pair, rows, arithmetic, floors)
        address = _most_telling(_beyond(table, pair, rows, arithmetic, rungs, floors))
        if address is None:
            return
        known = self.kept.get((mode, rung))
        if known is None or _order(address) < _order(known.address):
            self.kept[mode, rung] = collect(pair, address, arithmetic.at(rung))

    def keep(self, instrument: str, pair: PassPair, addresses: Iterable[Address], arithmetic: Arithmetic) -> None:
        """Keep the native values of a pair at the earliest places that an instrument suspects."""
        earliest: dict[Place, Address] = {}
        for address in addresses:
            known = earliest.get(address.place)
            if known is None or _order(address) < _order(known):
                earliest[address.place] = address
        kept = self.named.setdefault((pair.mode, instrument), {})
        for place in sorted(earliest, key=lambda place: place.forward_rank)[:_MOST_PLACES]:
            before = kept.get(place)
            if before is None or _order(earliest[place]) < _order(before.address):
                kept[place] = collect(pair, earliest[place], arithmetic)
        for place in sorted(kept, key=lambda place: place.forward_rank)[_MOST_PLACES:]:
            del kept[place]

    def _watch_noise(self, pair: PassPair, rows: Rows, arithmetic: Arithmetic, floors: FloorTable) -> None:
        """Keep the fine values at which noise begins that no dtype in play makes."""
        mode = pair.mode
        begins = find_noise(floors, mode, arithmetic).begins
        places = {item.place: 1.0 for item in begins if item.is_no_rounding or item.is_inside_attention}
        if not places:
            return
        address = _most_telling(rows.where((rows.by_place(places) == 1.0) & ~rows.equal))
        known = self.noisy.get(mode)
        if address is not None and (known is None or _order(address) < _order(known.address)):
            self.noisy[mode] = collect(pair, address, arithmetic.at(pair.prefill.rung))

    def at(self, address: Address, mode: str, rung: str) -> Suspect | None:
        """Return the suspect of an address, None if other values were kept."""
        named = (
            item
            for (at, _), kept in self.named.items()
            if at == mode and (item := kept.get(address.place)) is not None and item.rung == rung
        )
        return next(
            (item for item in (self.kept.get((mode, rung)), self.noisy.get(mode), *named) if _is_of(item, address)),
            None,
        )

    def fine(self, address: Address, mode: str) -> Suspect | None:
        """Return the values of the finest rung at an address where noise of one pass begins; None: none were kept."""
        noisy = self.noisy.get(mode)
        return noisy if _is_of(noisy, address) else None


def _is_of(suspect: Suspect | None, address: Address) -> bool:
    place = None if suspect is None else (suspect.address.layer, suspect.address.site)
    return place == (address.layer, address.site)


def _beyond(
    table: DriftTable,
    pair: PassPair,
    rows: Rows,
    arithmetic: Arithmetic,
    rungs: Rungs,
    floors: FloorTable | None,
) -> Rows:
    if pair.prefill.rung == rungs.upper:
        bounds = rounding_bounds(table, pair.mode, rungs, floors)
        measured = floors is not None and floors.has(pair.mode)
        excess = measured_excess(rows, bounds) if measured else excess_of(rows, bounds, rungs)
        return excess.rows.where(excess.beyond)
    if pair.prefill.rung == arithmetic.dtype and pair.mode is Mode.KV_ALIGNED:
        return beyond_alone(rows, arithmetic)
    return rows.where(np.zeros(len(rows), dtype=bool))


def _most_telling(rows: Rows) -> Address | None:
    """The address of which `_order` is least."""
    few = rows.position < _TELLING
    first = np.lexsort((np.where(few, -rows.position, rows.position), few, rows.rank))[:1]
    return next(iter(rows.addresses(first)), None)


def _order(address: Address) -> tuple[tuple[int, int], int, int]:
    """The earliest layer and site; of those the first position with keys enough, or the last one if none has."""
    few = address.position < _TELLING
    return (address.forward_rank, int(few), -address.position if few else address.position)
