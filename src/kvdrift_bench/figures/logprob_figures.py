"""The table of what was said of drawn dumps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from kvdrift_bench.run.logprob_runs import CLEAN, LogprobRun


def table(runs: Iterable[LogprobRun]) -> str:
    """Return verdicts, causes and guilty sides by fault and dtypes, as Markdown."""
    groups: dict[tuple[str, str], list[LogprobRun]] = {}
    for run in runs:
        groups.setdefault((run.fault, run.dtypes), []).append(run)
    lines = [
        "| fault | sampler / trainer | right | MISMATCH | INCONCLUSIVE | cause named most | guilty side right |",
        "|---|---|---|---|---|---|---|",
    ]
    for (fault, dtypes), found in sorted(groups.items(), key=lambda item: (item[0][0] != CLEAN, *item[0])):
        said = Counter(run.verdict for run in found)
        causes = Counter(run.cause for run in found if run.cause)
        sides = [run.guilty_right for run in found if run.guilty_right is not None]
        cause = "-" if not causes else "{} ({})".format(*causes.most_common(1)[0])
        side = f"{sum(sides)} of {len(sides)}" if sides else "-"
        lines.append(
            f"| {fault} | {dtypes} | {sum(run.right for run in found)} of {len(found)} | {said['MISMATCH']} | "
            f"{said['INCONCLUSIVE']} | {cause} | {side} |"
        )
    return "\n".join(lines) + "\n"


def summary(runs: Iterable[LogprobRun]) -> str:
    """Return the rates in one sentence."""
    found = list(runs)
    right = sum(run.right for run in found)
    clean = [run for run in found if run.fault == CLEAN]
    alarms = sum(run.verdict == "MISMATCH" for run in clean)
    sides = [run.guilty_right for run in found if run.guilty_right is not None]
    return (
        f"{right} of {len(found)} verdicts right ({right / max(1, len(found)):.1%}); {alarms} alarms in {len(clean)} "
        f"clean dumps; guilty side right in {sum(sides)} of {len(sides)} with a third dump."
    )
