"""The figures of `kvdrift_bench.figures.power` as Markdown."""

from __future__ import annotations

from kvdrift_bench.figures.markdown import table
from kvdrift_bench.figures.power import Estimate, Power


def power_tables(power: Power) -> list[str]:
    """Return the parts of the document, none if there is nothing to show."""
    return [*_calibration(power), *_minima(power), *_estimates(power)]


def _calibration(power: Power) -> list[str]:
    if not power.calibration:
        return []
    rows = []
    for item in power.calibration:
        low, high = item.interval
        share = f"{item.at_most} of {item.n} ({100 * low:.1f}–{100 * high:.1f} %)"
        rows.append([f"{item.level:g}", share, f"{item.level * item.n:.1f}"])
    return [
        "### p-values of the clean runs",
        "The directed tests give one p-value a run, for the largest statistic of all causes and layers. It is honest "
        "if at most a share p of the clean runs has one of p or less.",
        table(["p", "clean runs with a p-value of at most p", "expected of uniform ones"], rows),
    ]


def _minima(power: Power) -> list[str]:
    if not power.minima:
        return []
    settings = sorted({item.setting for item in power.minima})
    by_place = {(item.cause, item.setting): item.size for item in power.minima}
    rows = [
        [cause, *(f"{by_place[cause, s]:.1e}" if (cause, s) in by_place else "–" for s in settings)]
        for cause in sorted({item.cause for item in power.minima})
    ]
    return [
        "### Minimum detectable effects of the directed tests, native dtype alone",
        "Relative size of the cause, in all layers alike, that one audit of these prompts claims to see: six standard "
        "errors of its coefficient over (prompt, position) units, no less than rounding of the outputs alone gives, "
        "and no less than 1/256 of the unit roundoff; median of the clean runs. A "
        "cause that happens or not, such as a key that is lost, is called so from one half on.",
        table(["cause", *settings], rows),
    ]


def _estimates(power: Power) -> list[str]:
    if not power.estimates:
        return []
    rows = []
    ordered = sorted(power.estimates, key=lambda e: (e.setting, e.fault))
    for item in ordered:
        found = "not seen" if item.estimate is None else f"{item.estimate:+.3g}"
        off = "–" if item.estimate is None else f"{100 * (item.estimate / item.truth - 1):+.1f} %"
        rows.append([item.fault, item.setting, f"{item.truth:+g}", _beside(item), _seen(item), found, off])
    unkept = [
        f"- {item.fault} ({item.setting}): {item.truth:+g} planted, {item.minimum:.1e} stated, not seen in "
        f"{item.unkept} of {item.runs}"
        for item in ordered
        if item.unkept
    ]
    return [
        "### Sizes that were planted and sizes that were estimated, native dtype alone",
        "The stated minimum is about a cause in all layers alike; of a fault in one layer it says nothing. Estimates "
        "are the median of the runs in which the directed tests saw the cause.",
        table(
            ["fault", "setting", "planted", "stated minimum", "seen in", "estimated by the directed tests", "off by"],
            rows,
        ),
        "Above the stated minimum of its cause and not seen, which no run should be: "
        + ("none." if not unkept else "\n\n" + "\n".join(unkept)),
    ]


def _seen(item: Estimate) -> str:
    return f"{len(item.estimates)} of {item.runs}"


def _beside(item: Estimate) -> str:
    """The stated minimum, and whether the fault is below it."""
    if item.minimum is None:
        return "–"
    return f"{item.minimum:.1e}" + (" (fault below)" if abs(item.truth) <= item.minimum else "")
