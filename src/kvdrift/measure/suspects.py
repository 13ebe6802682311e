"""Keeps, while a run is captured, the values of the layer in which a mismatch seems to begin.

Traces of all prompts do not stay in memory; what a diagnosis needs is one layer of one prompt. The layer and the site
are those of the localisation, which picks them by the same order. Of the positions that fail there the first with some
keys before it is kept: where there are two keys, the first but one is the last too, and causes look alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvdrift.compare.drift import NO_LAYER, DriftRow, DriftTable
from kvdrift.diagnosis.model import Suspect, collect
from kvdrift.instruments.ladder import Key, excess_of, rounding_bounds
from kvdrift.instruments.native import beyond_alone
from kvdrift.trace.model import PassPair
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.precision import RUNGS, Roundoffs, Rungs
from kvdrift.vocabulary.sites import Site

# Keys before a token from which on causes no longer look alike.
_TELLING = 8


@dataclass(slots=True)
class Suspects:
    """The earliest suspect of each mode and rung."""

    kept: dict[tuple[str, str], Suspect] = field(default_factory=dict)

    def watch(
        self,
        table: DriftTable,
        pair: PassPair,
        rows: Sequence[DriftRow],
        native: str,
        rungs: Rungs = RUNGS,
        roundoffs: Roundoffs | None = None,
    ) -> None:
        """Look at the newest rows, those of `pair`, and keep its values if a mismatch begins earlier here."""
        mode, rung = str(pair.mode), pair.prefill.rung
        address = _most_telling(_beyond(table, pair, rows, native, rungs, roundoffs))
        if address is None:
            return
        known = self.kept.get((mode, rung))
        if known is None or _order(address) < _order(known.address):
            self.kept[mode, rung] = collect(pair, address, roundoffs if rung == native else None)

    def at(self, address: Address, mode: str, rung: str) -> Suspect | None:
        """Return the suspect of an address, None if other values were kept."""
        found = self.kept.get((mode, rung))
        if found is None or (found.address.layer, found.address.site) != (address.layer, address.site):
            return None
        return found


def _beyond(
    table: DriftTable,
    pair: PassPair,
    rows: Sequence[DriftRow],
    native: str,
    rungs: Rungs,
    roundoffs: Roundoffs | None,
) -> list[Key]:
    if pair.prefill.rung == rungs.upper:
        bounds = rounding_bounds(table, str(pair.mode), rungs)
        return [row.key for row in rows if (row.layer, row.site) in bounds and not excess_of(row, bounds, rungs) <= 1.0]
    if pair.prefill.rung == native and pair.mode is Mode.KV_ALIGNED:
        return beyond_alone({row.key: row for row in rows}, native, roundoffs)
    return []


def _most_telling(keys: Iterable[Key]) -> Address | None:
    addresses = [Address(p, t, None if layer == NO_LAYER else layer, Site(site)) for p, t, layer, site in keys]
    return min(addresses, key=_order, default=None)


def _order(address: Address) -> tuple[tuple[int, int], int, int]:
    """The earliest layer and site; of those the first position with keys enough, or the last one if none has."""
    few = address.position < _TELLING
    return (address.forward_rank, int(few), -address.position if few else address.position)
