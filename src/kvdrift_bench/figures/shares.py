"""Hits among trials, and how they are shown."""

from __future__ import annotations

from typing import Any

import msgspec

from kvdrift_bench.figures.intervals import exact_interval
from kvdrift_bench.run.records import LADDER, NATIVE

WAY_NAMES = {LADDER: "with the ladder", NATIVE: "native dtype alone"}


class Share(msgspec.Struct, frozen=True):
    """Hits among trials. `share` is None where nothing was tried: no trial is not a success."""

    hits: int
    trials: int

    @property
    def share(self) -> float | None:
        return self.hits / self.trials if self.trials else None

    @property
    def interval(self) -> tuple[float, float]:
        """The exact 95 % confidence interval; from 0 to 1 where nothing was tried."""
        return exact_interval(self.hits, self.trials)

    def as_json(self) -> dict[str, Any]:
        low, high = self.interval
        return {"hits": self.hits, "trials": self.trials, "share": self.share, "interval_95": [low, high]}


def percent(share: float) -> str:
    """Return a share in per cent, rounded, but 100 only for all and 0 only for none.

    >>> percent(1.0), percent(0.99999)
    ('100.0 %', '99.9 %')
    """
    value = 100.0 * share
    if 0.0 < value < 0.1 or 99.9 < value < 100.0:
        return f"{min(99.9, max(0.1, value)):.1f} %"
    return f"{value:.1f} %"


def shown(share: Share) -> str:
    """A share with its counts and its interval; a dash where nothing was tried.

    >>> shown(Share(0, 0)), shown(Share(3, 4))
    ('– (0 of 0)', '75.0 % (3 of 4; 19.4–99.4)')
    """
    if share.share is None:
        return "– (0 of 0)"
    low, high = share.interval
    return f"{percent(share.share)} ({share.hits} of {share.trials}; {100 * low:.1f}–{100 * high:.1f})"


def counts(share: Share) -> str:
    """A share as its counts."""
    return f"{share.hits} of {share.trials}"
