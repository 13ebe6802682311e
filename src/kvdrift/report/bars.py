"""Bars beside their bounds, on one logarithmic axis that is as wide as the page, with each name above its bar."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

_ROW, _THICK, _FOOT = 38.0, 12.0, 42.0


@dataclass(frozen=True, slots=True)
class Bar:
    """A drift and its bound, of one unit and above 0; `size` is None for a drift of 0. `text` is what the bar says when
    it is pointed at."""

    name: str
    size: float | None
    bound: float
    is_beyond: bool
    text: str


def bars_chart(bars: Sequence[Bar], title: str, x_label: str, css: str) -> Markup | None:
    """Return every bar with a stroke at its bound; None without bars.

    Places along the axis are shares of the width, so that letters are as large on a phone as on a screen.
    """
    figures = [value for bar in bars for value in (bar.size, bar.bound) if value is not None]
    if not figures:
        return None
    low, high = math.floor(math.log10(min(figures)) - 0.3), math.ceil(math.log10(max(figures)) + 0.1)

    def at(value: float) -> float:
        return 2.0 + (math.log10(value) - low) / max(1, high - low) * 94.0

    bottom = _ROW * len(bars) + 6
    parts = list(_grid(low, high, at(10.0**low), at(10.0**high), bottom))
    for number, bar in enumerate(bars):
        top = _ROW * number
        parts.append(_label(at(10.0**low), top + 16, bar.name, "start"))
        end = at(bar.size if bar.size is not None else 10.0**low)
        parts.append(
            Markup(
                '<rect class="c {}" x="{:.2f}%" y="{:.1f}" width="{:.2f}%" height="{}" data-r="{}" data-c="0" '
                'data-t="{}"/>'
            ).format(
                *("x2" if bar.is_beyond else "w3", at(10.0**low), top + 22, max(0.4, end - at(10.0**low))),
                *(_THICK, number, bar.text),
            )
        )
        parts.append(
            Markup('<line class="bound" x1="{0:.2f}%" y1="{1:.1f}" x2="{0:.2f}%" y2="{2:.1f}"/>').format(
                at(bar.bound), top + 19, top + 25 + _THICK
            )
        )
    parts.append(_label(50.0, bottom + 36, f"{x_label}; the stroke is the bound", "middle"))
    return Markup(
        '<svg class="{}" tabindex="0" role="img" aria-label="{}; the table below has the figures" width="100%" '
        'height="{:.0f}" xmlns="http://www.w3.org/2000/svg">{}</svg>'
    ).format(css, title, bottom + _FOOT, Markup("").join(parts))


def _grid(low: int, high: int, left: float, right: float, bottom: float) -> Iterator[Markup]:
    """Lines at whole decades, five at most."""
    for exponent in range(low, high + 1, max(1, math.ceil((high - low) / 4))):
        x = left + (exponent - low) / max(1, high - low) * (right - left)
        yield Markup('<line class="grid" x1="{0:.2f}%" y1="4" x2="{0:.2f}%" y2="{1:.1f}"/>').format(x, bottom)
        yield _label(x, bottom + 15, f"1e{exponent}", "start" if exponent == low else "middle")


def _label(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text class="label" x="{:.2f}%" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)
