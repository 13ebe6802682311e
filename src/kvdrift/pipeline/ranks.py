"""Which rank of an engine that splits its layers made the first failure, from its part of the values."""

from __future__ import annotations

from typing import Any

from kvdrift.trace.model import PassPair, Trace
from kvdrift.trace.parts import drift_by_part
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.evidence import Caveat
from kvdrift.vocabulary.sites import CACHE_SITES

# A rank is called guilty if its part drifts this many times more than that of the rank that drifts least.
_STANDS_OUT = 8.0


def guilty_rank(pair: PassPair, address: Address) -> Caveat | None:
    """Return a caveat that names the ranks whose part of the value at `address` differs; None if all do, or none."""
    _, position, layer, site = address[:4]
    values = (_row(pair.prefill, address), _row(pair.decode, address))
    if values[0] is None or values[1] is None or values[0].shape != values[1].shape:
        return None
    drifts = drift_by_part(pair.prefill, pair.decode, layer, site, values, position)
    least = min(drifts.values(), default=0.0)
    guilty = {name: drift for name, drift in drifts.items() if drift > _STANDS_OUT * least and drift > 0.0}
    if not guilty or len(guilty) == len(drifts):
        return None
    names = " and ".join(f"{name} by {drift:.2g}" for name, drift in guilty.items())
    rest = max(drift for name, drift in drifts.items() if name not in guilty)
    where = "" if layer is None else f" of layer {layer}"
    return Caveat("RANK", f"{site}{where} differs on {names} of its size; the other parts by at most {rest:.2g}")


def _row(trace: Trace, address: Address) -> Any:
    """The value at an address, a row or the rows of a cache read; None if there is none."""
    _, position, layer, site = address[:4]
    if site in CACHE_SITES:
        reads = (read for read in trace.cache_reads() if (read.layer, read.site) == (layer, site))
        return next((read.rows for read in reads if position in read.positions), None)
    rows = (row for row in trace.rows if (row.layer, row.site) == (layer, site) and position in row.positions)
    return next((row.values[row.positions.index(position)] for row in rows), None)
