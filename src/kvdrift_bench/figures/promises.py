"""What kvdrift promises of its verdicts, and whether the measured figures keep it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvdrift_bench.figures.shares import Share
from kvdrift_bench.figures.summary import Figures, Summary, WayFigures
from kvdrift_bench.run.records import LADDER, NATIVE

# Without the ladder nothing is promised of a native dtype that is as fine as what judges it.
_FULL = ("float32", "float64")
_HALF = ("bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Promise:
    """One promise: `share` must be at least `least`, or, where that is None, no trial may hit."""

    what: str
    least: float | None
    share: Share

    @property
    def is_kept(self) -> bool | None:
        """None where nothing was tried: no trial keeps no promise."""
        if self.share.share is None:
            return None
        return self.share.hits == 0 if self.least is None else self.share.share >= self.least


_Choose = Callable[[Figures], Share]
_PLACES: tuple[tuple[str, float, _Choose], ...] = (
    ("right layer, of the detected", 0.98, lambda f: f.right_layer),
    ("right site or the next one, of the detected", 0.95, lambda f: f.right_address),
    ("right cause, of the diagnosed", 0.90, lambda f: f.right_cause),
)


def check_promises(summary: Summary) -> list[Promise]:
    """Return every promise with what was measured. A fault above the minimum that ends without a verdict counts as not
    detected here."""
    ladder = [figures for way, figures in summary.ways.items() if way == LADDER]
    native = [figures for way, figures in summary.ways.items() if way == NATIVE]
    half = [some for f in native for dtype, some in f.by_dtype.items() if dtype not in _FULL]
    alone = "half-precision dtype alone" if _is_half(native) else "native configuration alone"
    promises = [
        Promise("false alarms on clean runs, with the ladder", None, _sum(ladder, lambda f: f.clean)),
        Promise("false alarms on clean twins, with the ladder", None, _sum(ladder, lambda f: f.twins)),
        Promise("false alarms on clean runs, native dtype alone", None, _sum(native, lambda f: f.clean)),
        Promise("false alarms on clean twins, native dtype alone", None, _sum(native, lambda f: f.twins)),
        Promise("faults above the stated minimum, with the ladder", 0.99, _sum(ladder, lambda f: f.detected_above)),
        Promise(f"faults above the stated minimum, {alone}", 0.95, _sum(half, lambda f: f.detected_above)),
    ]
    for where, figures in (("with the ladder", ladder), (alone, half)):
        promises += [Promise(f"{what}, {where}", least, _sum(figures, choose)) for what, least, choose in _PLACES]
    return promises


def _is_half(native: Sequence[WayFigures]) -> bool:
    """Whether what was run natively has a dtype of its own, as torch models have."""
    return all(dtype in (*_FULL, *_HALF) for figures in native for dtype in figures.by_dtype)


def _sum(figures: Sequence[Figures], choose: _Choose) -> Share:
    shares = [choose(item) for item in figures]
    return Share(sum(share.hits for share in shares), sum(share.trials for share in shares))
