"""Draws the curves of one dtype as small multiples, one panel a rule: a plain SVG without scripts or fonts of its own.

Its greys and colours stand out on light and on dark pages alike, so that it needs no background.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from kvdrift_bench.figures.curves import DtypeCurves, OperatingPoint, RuleCurves
from kvdrift_bench.peers.summary import Points

_COLUMNS = 5
_PANEL_WIDTH, _PANEL_HEIGHT = 132.0, 96.0
_GAP_X, _GAP_Y = 26.0, 46.0
_LEFT, _TOP, _RIGHT, _BOTTOM = 40.0, 74.0, 14.0, 40.0
_X_TICKS = (0.0, 0.05, 0.2, 0.5, 1.0)
_Y_TICKS = (0.0, 0.5, 1.0)
_GREY, _CLEAN, _HARMLESS, _OWN = "#7d8590", "#7d8590", "#2f81f7", "#d9730d"


def draw_curves(curves: DtypeCurves) -> str:
    """Return the figure; the axis of false alarms is a square root, since the few of them matter most."""
    n_rows = math.ceil(len(curves.rules) / _COLUMNS)
    width = _LEFT + _COLUMNS * _PANEL_WIDTH + (_COLUMNS - 1) * _GAP_X + _RIGHT
    height = _TOP + n_rows * _PANEL_HEIGHT + (n_rows - 1) * _GAP_Y + _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" font-family="sans-serif" font-size="10" fill="{_GREY}">',
        f"<title>Faults found by false alarms, {escape(curves.dtype)}</title>",
        *_heading(curves, width),
    ]
    for index, rule in enumerate(curves.rules):
        x = _LEFT + (index % _COLUMNS) * (_PANEL_WIDTH + _GAP_X)
        y = _TOP + (index // _COLUMNS) * (_PANEL_HEIGHT + _GAP_Y)
        parts += _panel(rule, curves.points, x, y, is_first=index % _COLUMNS == 0)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _heading(curves: DtypeCurves, width: float) -> list[str]:
    text = [
        f'<text x="{_LEFT:g}" y="18" font-size="13" font-weight="bold">{escape(curves.dtype)}: share of faults found '
        "(upward) by share of false alarms (to the right), at any threshold</text>",
        f'<text x="{_LEFT:g}" y="36" font-size="11" fill="{_HARMLESS}">blue: false alarms on clean runs and clean '
        "twins</text>",
        f'<text x="{_LEFT + 265:g}" y="36" font-size="11" fill="{_CLEAN}">grey, dashed: on clean runs alone</text>',
    ]
    said = {"ladder": "● kvdrift with the ladder", "native": "○ kvdrift, native dtype alone"}
    shown = "   ".join(f"{said[point.way]}" for point in curves.points if point.way in said)
    if shown:
        text.append(f'<text x="{_LEFT:g}" y="52" font-size="11" fill="{_OWN}">{shown}</text>')
    return text


def _panel(rule: RuleCurves, points: Sequence[OperatingPoint], x: float, y: float, *, is_first: bool) -> list[str]:
    parts = [f'<g transform="translate({x:g} {y:g})">']
    parts.append(f'<text x="0" y="-6" font-size="11">{escape(rule.rule)}</text>')
    parts.append(
        f'<rect width="{_PANEL_WIDTH:g}" height="{_PANEL_HEIGHT:g}" fill="none" stroke="{_GREY}" stroke-opacity=".45"/>'
    )
    for tick in _X_TICKS:
        parts.append(f'<text x="{_x(tick):.1f}" y="{_PANEL_HEIGHT + 12:g}" text-anchor="middle">{100 * tick:g}%</text>')
    for tick in _Y_TICKS if is_first else ():
        parts.append(f'<text x="-5" y="{_y(tick) + 3:.1f}" text-anchor="end">{100 * tick:g}%</text>')
    if rule.clean:
        parts.append(f'<path d="{_steps(rule.clean)}" fill="none" stroke="{_CLEAN}" stroke-dasharray="3 2"/>')
    parts.append(f'<path d="{_steps(rule.harmless)}" fill="none" stroke="{_HARMLESS}" stroke-width="1.6"/>')
    for point in points:
        alarms = point.alarms(with_twins=True).share
        if point.found.share is not None and alarms is not None:
            fill = _OWN if point.way == "ladder" else "none"
            parts.append(
                f'<circle cx="{_x(alarms):.1f}" cy="{_y(point.found.share):.1f}" r="3.4" fill="{fill}" '
                f'stroke="{_OWN}" stroke-width="1.6"/>'
            )
    return [*parts, "</g>"]


def _steps(points: Points) -> str:
    """The curve as a path: to the right, then up, since between two thresholds nothing is gained."""
    best = 0.0
    path = [f"M{_x(0.0):.1f} {_y(0.0):.1f}"]
    for alarms, found in points:
        best = max(best, found)
        path.append(f"H{_x(alarms):.1f}V{_y(best):.1f}")
    return "".join(path)


def _x(share: float) -> float:
    return _PANEL_WIDTH * math.sqrt(share)


def _y(share: float) -> float:
    return _PANEL_HEIGHT * (1.0 - share)
