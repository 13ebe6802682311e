"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; cells are Markdown and hold no newline.

    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def percent(share: float) -> str:
    """Return a share in per cent, rounded, but 100 only for all and 0 only for none.

    >>> percent(1.0), percent(0.99999)
    ('100.0 %', '99.9 %')
    """
    value = 100.0 * share
    if 0.0 < value < 0.1 or 99.9 < value < 100.0:
        return f"{min(99.9, max(0.1, value)):.1f} %"
    return f"{value:.1f} %"
