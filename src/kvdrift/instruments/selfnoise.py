"""Self-noise: how much the engine varies, at the native dtype, under a change that cannot matter.

The last token of each prompt is prefilled twice: at the end of the prompt alone, and with the continuation behind it.
In a causal model the answer is the same, so whatever differs is the engine's own rounding, with its real kernels on
this machine. It informs and never decides: decode takes another route and may well round otherwise than two prefills
do, and a prefill that repeats itself bit for bit says nothing of that.
"""

from __future__ import annotations

from statistics import median
from typing import ClassVar

from kvdrift.instruments.base import NOTHING, Blind, Judges, Panel, Run, Seen
from kvdrift.pairing.drift import DriftTable
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.plan import SELF_NOISE


def judge_self_noise(table: DriftTable, mode: str, native: str) -> Evidence:
    """Return the drift of decode in `mode` over the drift between two prefills, as the median over sites."""
    noise = _by_site(table, SELF_NOISE, native)
    drift = _by_site(table, mode, native)
    if not noise:
        reason = "no prompt was prefilled at two lengths (each has one token)"
        return _evidence(mode, None, reason, valid=False)
    typical = {site: median(values) for site, values in noise.items()}
    largest = max(max(values) for values in noise.values())
    ratios = [median(drift[site]) / value for site, value in typical.items() if value > 0.0 and site in drift]
    detail: dict[str, object] = {"noise": typical, "drift": {site: median(values) for site, values in drift.items()}}
    if not ratios:
        text = "two prefills of the same token at two lengths agree bit for bit: they show no noise to compare with"
        return _evidence(mode, None, text, detail)
    text = (
        f"the same token prefilled at two lengths drifts by up to {largest:.2g}; decode drifts {median(ratios):.2g} "
        f"times as much (median of {len(ratios)} sites)"
    )
    return _evidence(mode, median(ratios), text, detail)


def _evidence(
    mode: str, statistic: float | None, text: str, detail: dict[str, object] | None = None, *, valid: bool = True
) -> Evidence:
    return Evidence(
        instrument="self_noise",
        mode=mode,
        statistic_name="median over sites of decode's drift over the drift of two prefills",
        statistic=statistic,
        valid=valid,
        reason=None if valid else text,
        text=text,
        detail=detail or {},
    )


def _by_site(table: DriftTable, label: str, rung: str) -> dict[str, list[float]]:
    rows = table.select(label, rung)
    rows = rows.where(rows.rel_l2 < float("inf"))
    found: dict[str, list[float]] = {}
    for place, here in rows.groups():
        found.setdefault(str(place.site), []).extend(here.rel_l2.tolist())
    return found


class SelfNoise(Blind):
    """Holds decode's drift beside that of two prefills."""

    name: ClassVar[str] = "self_noise"
    judges: ClassVar[Judges] = "mode"

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """Inform about a run that kvdrift captured itself."""
        if run.foreign is not None:
            return NOTHING
        return Seen(evidence=(judge_self_noise(run.table, mode, run.info.dtype),))
