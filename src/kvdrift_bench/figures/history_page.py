"""The table of releases with a known bug and those that mend it."""

from __future__ import annotations

from collections.abc import Sequence

from kvdrift_bench.run.history_child import HistoryAudit
from kvdrift_bench.run.history_runs import AbsentPair, PairResult


def history_page(results: Sequence[PairResult], absent: Sequence[AbsentPair], command: str, versions: str) -> str:
    """Return the Markdown of the table: one row a pair, then what is not run."""
    told = sum(result.told_apart for result in results)
    mends = len({result.pair.reference for result in results})
    seconds = sum(result.before.seconds + result.after.seconds for result in results)
    lines = [
        f"`{command}` ({versions}): {told} of {len(results)} pairs told apart, of {mends} public references; "
        f"{seconds / max(1, 2 * len(results)):.1f} s a release.",
        "",
        "| pair | releases | way | before | first failure, cause | after | what was wrong, by its mend |",
        "|---|---|---|---|---|---|---|",
        *map(_row, results),
    ]
    if absent:
        lines += ["", "| not run | reference | reason |", "|---|---|---|"]
        lines += [f"| {each.name} | {_link(each.reference)} | {each.reason} |" for each in absent]
    return "\n".join(lines) + "\n"


def _row(result: PairResult) -> str:
    pair = result.pair
    way = [pair.scenario]
    way += [f"{pair.cache} caches"] if pair.cache != "default" else []
    way += ["padded on the right"] if pair.padding == "right" else []
    way += [f"in pieces of {pair.step}"] if pair.step else []
    found = ", ".join(text for text in (result.before.first_failure, result.before.cause) if text)
    cells = (
        pair.name,
        f"{pair.package} {pair.before}, {pair.after}",
        ", ".join(way),
        _verdict(result.before),
        found,
        _verdict(result.after),
        f"{pair.mends} ({_link(pair.reference)})",
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _verdict(audit: HistoryAudit) -> str:
    return audit.verdict or f"ERROR ({audit.said})"


def _link(reference: str) -> str:
    number = reference.rpartition("/")[2]
    return f"[{reference.removeprefix('https://github.com/').split('/')[1]}#{number}]({reference})"


__all__ = ["history_page"]
