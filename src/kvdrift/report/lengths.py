"""The section of a length sweep: one row for each length, and the boundaries between them in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kvdrift.verdict.boundaries import Boundary
from kvdrift.verdict.judge import Judged
from kvdrift.verdict.lengths import Length, ModeAtLength

View = dict[str, Any]

# Lengths that a suggested command has at most, besides the two ends of a gap.
_NARROW = 8


def build_lengths_view(judged: Judged) -> View | None:
    """Return what a run says of each length of its sweep as plain data; None if it swept no lengths."""
    found, span = judged.lengths, judged.measured.plan.span
    if found is None:
        return None
    return {
        "span": span,
        "rows": [_row(item) for item in found.lengths],
        "boundaries": list(_boundaries(found.boundaries, span)),
        "pooled": [str(address) for address in found.pooled],
        "untested": found.untested,
    }


def _row(item: Length) -> View:
    return {
        "length": item.length,
        "prompt": item.prompt,
        "verdict": str(item.verdict),
        "first_failure": None if item.first_failure is None else str(item.first_failure),
        "self_noise": item.self_noise,
        "kernel_prefill": item.kernels[0],
        "kernel_decode": item.kernels[1],
        "modes": {name: _mode(mode) for name, mode in item.modes.items()},
        "reasons": list(dict.fromkeys(reason for mode in item.modes.values() for reason in mode.reasons)),
    }


def _mode(mode: ModeAtLength) -> View:
    return {
        "verdict": str(mode.verdict),
        "n_pairs": mode.n_pairs,
        "n_exact": mode.n_equal,
        "n_beyond": len(mode.beyond),
        "largest_drift": None if mode.largest is None else mode.largest.rel_l2,
        "largest_drift_at": None if mode.largest is None or mode.largest.rel_l2 == 0.0 else str(mode.largest.place),
        "worst_excess": mode.excess,
    }


def _boundaries(found: Sequence[Boundary], span: int) -> Iterator[View]:
    """The boundaries, of which two that enclose a single place are one sentence."""
    ends = {(b.change, b.axis, b.modes, b.before): b for b in found if not b.rises and b.is_exact}
    told: set[int] = set()
    for item in found:
        if id(item) in told:
            continue
        end = ends.get((item.change, item.axis, item.modes, item.after)) if item.rises and item.is_exact else None
        view = _boundary(item, span)
        if end is not None:
            told.add(id(end))
            what, otherwise = _words(item)
            view["text"] = f"at {item.axis} {item.after} alone {what}; at {item.before} and {end.after} {otherwise}"
            view["ends"] = end.before
        yield view


def _boundary(item: Boundary, span: int) -> View:
    return {
        "change": item.change,
        "axis": item.axis,
        "before": item.before,
        "after": item.after,
        "exact": item.is_exact,
        "rises": item.rises,
        "modes": list(item.modes),
        "sites": list(item.sites),
        "first": None if item.first is None else str(item.first),
        "narrow": None if item.is_exact else narrowing(item.before, item.after, span),
        "text": _sentence(item, span),
    }


def narrowing(before: int, after: int, span: int) -> str:
    """Return the --lengths that look into a gap: every position of it, if few prompts cover them.

    >>> narrowing(64, 128, span=4)
    '64-128:8'
    >>> narrowing(67, 80, span=4)
    '67-79:4,80'
    """
    step = max(span, -(-(after - before) // _NARROW))
    if after - before <= step:
        return f"{before},{after}" if after - before == 1 else f"{before}-{after}"
    last = before + (after - before) // step * step
    return f"{before}-{last}:{step}" + ("" if last == after else f",{after}")


def _sentence(item: Boundary, span: int) -> str:
    """Say where a boundary lies and what changes there."""
    what, otherwise = _words(item)
    if not item.is_exact:
        begins = "begins" if item.rises else "ends"
        return (
            f"between {item.axis} {item.before} and {item.axis} {item.after} it {begins} that {what}; "
            f"--lengths {narrowing(item.before, item.after, span)} narrows it down"
        )
    if item.rises:
        return f"from {item.axis} {item.after} on {what}; at {item.axis} {item.before} {otherwise}"
    return f"up to {item.axis} {item.before} {what}; at {item.axis} {item.after} {otherwise}"


def _words(item: Boundary) -> tuple[str, str]:
    """What is the case on one side of a boundary, and on the other."""
    modes = " and ".join(item.modes)
    sites = _sites(item.sites)
    plural = len(item.sites) > 1
    if item.change == "mismatch":
        return f"decode differs from prefill beyond rounding (in {modes}; first: {item.first})", "it does not"
    if item.change == "bits":
        verb = "differ in their" if plural else "differs in its"
        return f"{sites} {verb} bits (in {modes}; of {item.sites[0]} {item.text})", "they are equal"
    if item.change == "drift":
        return f"the drift of {sites} is {item.text} (in {modes})", "it is not"
    return f"{item.text} (in {modes})", "it does not"


def _sites(sites: tuple[str, ...]) -> str:
    if len(sites) <= 3:
        return " and ".join(sites)
    return f"{sites[0]} and {len(sites) - 1} later sites"
