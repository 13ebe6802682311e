"""Which recorded rows go into a product and come out of it, for engines that compute products exactly."""

from __future__ import annotations

import numpy as np

from kvdrift.trace.model import Array, Trace
from kvdrift.vocabulary.sites import Site

# Sites that hand a row on to a product, and sites that are the result of one.
OPERANDS = (Site.ATTN_NORM_OUT, Site.ATTN_CTX, Site.FFN_NORM_OUT, Site.FINAL_NORM_OUT)
RESULTS = (Site.ATTN_OUT, Site.MLP_OUT, Site.LOGITS)
_BY_NAME = ((Site.Q_PROJ, "q"), (Site.K_PROJ, "k"), (Site.V_PROJ, "v"))


class RecordedRows:
    """What was recorded of such sites, found by place."""

    def __init__(self) -> None:
        self._by_trace: dict[int, dict[tuple[int | None, Site, int], Array]] = {}

    def at(self, trace: Trace, layer: int | None, site: Site, positions: tuple[int, ...]) -> Array | None:
        """Return the recorded rows [position, feature] of a site at some positions; None: not all were recorded."""
        key = id(trace)
        if key not in self._by_trace:
            self._by_trace[key] = {
                (record.layer, record.site, position): values
                for record in trace.rows
                if record.site in OPERANDS or record.site in RESULTS
                for position, values in zip(record.positions, record.values, strict=True)
            }
        known = self._by_trace[key]
        places = [(layer, site, position) for position in positions]
        if any(place not in known for place in places):
            return None
        return np.stack([np.ravel(known[place]) for place in places])


def are_same(rows: Array | None, values: Array | None) -> bool:
    """Whether two arrays hold the same bytes; None holds none."""
    if rows is None or values is None:
        return False
    return rows.shape == values.shape and rows.dtype == values.dtype and rows.tobytes() == values.tobytes()


def site_inside_attention(name: str) -> Site:
    """The site of a product inside attention whose result is none: that of the projection that its name begins like."""
    child = name.rpartition(".")[2]
    return next((site for site, letter in _BY_NAME if child.startswith(letter)), Site.ATTN_OUT)


__all__ = ["OPERANDS", "RESULTS", "RecordedRows", "are_same", "site_inside_attention"]
