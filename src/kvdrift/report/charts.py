"""Pictures of a report as SVG: sizes and places of marks, from the arrays that the verdict left.

Colours are CSS variables of the page, so that they follow its theme. No mark speaks by colour alone: beyond noise
has an edge, the first failure a frame, lines differ in their marks and dashes. The text of a mark is its `data-t`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from kvdrift.report.view import figure
from kvdrift.verdict.charts import AttentionRow, BadSlot, Cell, Charts, Line, ModeCharts, RungDrift
from kvdrift.verdict.error_rows import ErrorRow
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.sites import AFTER_LAYERS, Site

# Upper ends of the classes of excess: within noise up to 1, beyond it above. The last class of each is open.
_WITHIN = (1e-6, 1e-4, 1e-2, 1e-1)
_BEYOND = (10.0, 1e3)

_WIDTH, _HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 12, 40
# How far a picture shrinks on a narrow page before it scrolls: letters stay readable.
_SMALLEST = 0.6
_MARKS = ("circle", "square", "triangle")
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def class_of(cell: Cell) -> str:
    """Return the class that colours a cell: e (equal bits), w0..w4 (within), x0..x2 (beyond), u (not bounded)."""
    if cell.state == "beyond":
        value = cell.excess if cell.excess is not None and cell.excess > 1.0 else math.inf
        return f"x{sum(value > end for end in _BEYOND)}"
    if cell.state == "equal":
        return "e"
    if cell.excess is None:
        return "u" if cell.state == "unknown" else "w2"
    return f"w{sum(cell.excess > end for end in _WITHIN)}"


# ------------------------------------------------------------------------------------------------------ layer x site


def heat_map(
    cells: Sequence[Cell], n_layers: int, first: Place | None, tell: Callable[[Cell], str] | None = None
) -> Markup:
    """Return the map layer x site: columns are layers, with those before and after them, rows are sites.

    Args:
        cells: one for each layer and site.
        n_layers: of the model.
        first: the place of the first failure, which is framed; None if there is none.
        tell: what a cell says when it is pointed at, a fact a line; None for that of an audit.
    """
    said = tell or tell_cell
    sites = [site for site in Site if any(cell.place.site is site for cell in cells)]
    row_of = {site: row for row, site in enumerate(sites)}
    n_columns = n_layers + 2
    width, height = max(7.0, min(26.0, 380.0 / n_columns)), 17.0
    left, top = 112.0, 6.0
    parts: list[Markup] = []
    for site, row in row_of.items():
        parts.append(_text(left - 8, top + height * (row + 0.72), str(site), "end"))
    every = max(1, math.ceil(34.0 / width))
    for layer in range(0, n_layers, every):
        parts.append(_text(left + width * (layer + 1.5), top + height * len(sites) + 15, str(layer), "middle"))
    parts.append(_text(left + width * n_columns / 2, top + height * len(sites) + 32, "layer", "middle"))
    frame = Markup("")
    for cell in cells:
        column = _column(cell, n_layers)
        x, y = left + width * column, top + height * row_of[cell.place.site]
        parts.append(_cell(cell, x, y, width, height, row_of[cell.place.site], column, said(cell)))
        if first == cell.place:
            frame = Markup('<rect class="first" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                x - 1, y - 1, width + 1, height + 1
            )
    parts.append(frame)  # last, so that no cell lies over it
    title = f"Excess over measured noise of {len(cells)} sites by layer"
    return _svg(left + width * n_columns + 8, top + height * len(sites) + 38, parts, title, "heat")


def _column(cell: Cell, n_layers: int) -> int:
    if cell.place.layer is None:
        return n_layers + 1 if cell.place.site in AFTER_LAYERS else 0
    return cell.place.layer + 1


def _cell(cell: Cell, x: float, y: float, width: float, height: float, row: int, column: int, text: str) -> Markup:
    gap = 1.0
    return Markup(
        '<rect class="c {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" data-r="{}" data-c="{}" data-t="{}"/>'
    ).format(class_of(cell), x, y, width - gap, height - gap, row, column, text)


def tell_cell(cell: Cell) -> str:
    """Return what a cell says when it is pointed at, a fact a line."""
    lines = [
        str(cell.worst),
        f"drift {figure(cell.drift)} (relative, largest of {cell.n_pairs}), {figure(cell.ulp)} ULP",
        f"bound {figure(cell.bound)}, excess {figure(cell.excess)}",
        f"{cell.n_exact} of {cell.n_pairs} pairs have equal bits",
    ]
    if cell.sha256_prefill is not None and cell.sha256_decode is not None:
        lines.append(f"SHA-256 {cell.sha256_prefill[:12]} (prefill), {cell.sha256_decode[:12]} (decode)")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ charts


@dataclass(frozen=True, slots=True)
class _Series:
    """Points of one line: x, y and what each says. `dashed` parts modes, the mark parts rungs."""

    name: str
    points: list[tuple[float, float, str]]
    mark: int = 0
    colour: int = 0
    dashed: bool = False
    joined: bool = True


@dataclass(frozen=True, slots=True)
class _Axes:
    """The scales of a chart: limits of x and y, of their logarithms where a scale is one."""

    x: tuple[float, float]
    y: tuple[float, float]
    log_x: bool
    log_y: bool = True
    width: float = field(default=_WIDTH)

    def at_x(self, value: float) -> float:
        value = math.log10(value) if self.log_x else value
        low, high = self.x
        return _LEFT + (value - low) / (high - low) * (self.width - _LEFT - _RIGHT)

    def at_y(self, value: float) -> float:
        value = math.log10(value) if self.log_y else value
        low, high = self.y
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def precision_chart(modes: Iterable[tuple[str, ModeCharts]]) -> Markup | None:
    """Return drift against unit roundoff on logarithmic axes, with a line of slope 1; None without two rungs."""
    series = []
    for number, (name, mode) in enumerate(modes):
        rungs = sorted(mode.rungs, key=lambda rung: rung.unit)
        for which, mark in (("largest", 2), ("median", 0)):
            points = [(rung.unit, getattr(rung, which), _tell_rung(name, which, rung)) for rung in rungs]
            series.append(_Series(f"{name}, {which}", points, mark, number, dashed=which == "largest"))
        bounds = [(r.unit, r.bound, f"{name}: median bound at {r.rung}\n{figure(r.bound)}") for r in rungs if r.bound]
        if bounds:
            series.append(_Series(f"{name}, median bound", bounds, 1, number, joined=False))
    values = [point for item in series for point in item.points]
    if len({x for x, _, _ in values}) < 2:
        return None
    axes = _axes(values, log_x=True)
    anchor = min((p for item in series if item.name.endswith("median") for p in item.points), key=lambda p: -p[0])
    slope = _diagonal(axes, anchor)
    return _chart(axes, series, "unit roundoff of the rung", "relative drift", "Drift against precision", slope)


def _tell_rung(mode: str, which: str, rung: RungDrift) -> str:
    return f"{mode} at {rung.rung}\n{which} drift {figure(getattr(rung, which))}\nunit roundoff {figure(rung.unit)}"


def _diagonal(axes: _Axes, anchor: tuple[float, float, str]) -> Markup:
    """The line of slope 1 through a point, as far as the chart goes."""
    offset = math.log10(anchor[1]) - math.log10(anchor[0])
    low = max(axes.x[0], axes.y[0] - offset)
    high = min(axes.x[1], axes.y[1] - offset)
    ends = [(axes.at_x(10**x), axes.at_y(10 ** (x + offset))) for x in (low, high)]
    line = Markup('<line class="slope" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(*ends[0], *ends[1])
    x, y = ((a + b) / 2 for a, b in zip(*ends, strict=True))
    return line + _text(x + 12, y + 18, "slope 1", "start")


def line_chart(modes: Iterable[tuple[str, ModeCharts]], which: str, x_label: str, title: str) -> Markup | None:
    """Return the largest drift by layer (`which` "through") or by decode step ("along"); None without two points."""
    series = []
    for number, (name, mode) in enumerate(modes):
        lines: Sequence[Line] = getattr(mode, which)
        for mark, line in enumerate(lines):
            points = [
                (float(x), y, f"{name} at {line.rung}\n{x_label} {x}\ndrift {figure(y)}")
                for x, y in zip(line.at, line.drift, strict=True)
                if y > 0.0
            ]
            if points:
                series.append(_Series(f"{name}, {line.rung}", points, mark, number, dashed=mark > 0))
    values = [point for item in series for point in item.points]
    if len({x for x, _, _ in values}) < 2:
        return None
    return _chart(_axes(values, log_x=False), series, x_label, "relative drift", title)


def lengths_chart(lengths: Mapping[str, Any]) -> Markup | None:
    """Return the largest drift at each length of a sweep, a line for each mode; None without two lengths that drift."""
    names = list(lengths["rows"][0]["modes"]) if lengths["rows"] else []
    series = []
    for number, name in enumerate(names):
        points = []
        for row in lengths["rows"]:
            drift = row["modes"][name]["largest_drift"]
            if drift is not None and math.isfinite(drift) and drift > 0.0:
                text = f"{name} at length {row['length']}\n{row['verdict']}\nlargest drift {figure(drift)}"
                points.append((float(row["length"]), float(drift), text))
        if points:
            series.append(_Series(name, points, number, number, dashed=number > 0))
    values = [point for item in series for point in item.points]
    if len({x for x, _, _ in values}) < 2:
        return None
    return _chart(_axes(values, log_x=False), series, "tokens of the prompt", "relative drift", "Drift by length")


def by_position(
    curve: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    bound: float | None = None,
    begins: int | None = None,
    unit: str = "nats",
) -> Markup | None:
    """Return the drift of logprobs along the context, a line for each route; None without two stretches that drift.

    A stretch without any drift lies at the foot of the chart, on a logarithmic axis that has no zero.

    Args:
        curve: the stretches of each route, with `first`, `last` and `rms` in `unit`.
        bound: what noise allows, in `unit`, drawn across; None if there is none.
        begins: the position at which drift begins, drawn upright; None if it begins nowhere.
        unit: what drift is counted in.
    """
    told = [float(b["rms"]) for bins in curve.values() for b in bins if isinstance(b["rms"], int | float)]
    least = min((x for x in told if math.isfinite(x) and x > 0.0), default=None)
    if least is None:
        return None
    series = []
    for number, (name, bins) in enumerate(curve.items()):
        points = [
            (
                (b["first"] + b["last"]) / 2,
                float(b["rms"]) or least / 10.0,
                f"{name}, {b['first']} to {b['last']}\n{figure(b['rms'])} {unit}",
            )
            for b in bins
            if isinstance(b["rms"], int | float) and math.isfinite(b["rms"])
        ]
        if points:
            series.append(_Series(name, points, number % 3, number, dashed=number > 1))
    values = [point for item in series for point in item.points]
    if len({x for x, _, _ in values}) < 2:
        return None
    reach = [] if bound is None or not bound > 0.0 else [(values[0][0], bound, "")]
    start = [] if begins is None else [(float(begins), values[0][1], "")]
    axes = _axes([*values, *reach, *start], log_x=False)
    marks = Markup("")
    if reach:
        marks += _across(axes, y=reach[0][1], text=f"bound {figure(reach[0][1])}")
    if begins is not None:
        marks += _across(axes, x=float(begins), text=f"from {begins}")
    return _chart(axes, series, "position", f"drift, {unit} (rms)", "Drift along the context", marks)


def _across(axes: _Axes, *, x: float | None = None, y: float | None = None, text: str) -> Markup:
    """A line across a chart at a value of one of its axes, with a word on it."""
    left, right = float(_LEFT), float(axes.width - _RIGHT)
    top, bottom = axes.at_y(10 ** axes.y[1]), axes.at_y(10 ** axes.y[0])
    if y is not None:
        top = bottom = axes.at_y(y)
    if x is not None:
        left = right = axes.at_x(x)
    line = Markup('<line class="slope" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        left, top, right, bottom
    )
    return line + _text(left + 6, top + (14 if x is not None else -5), text, "start")


def _axes(values: Sequence[tuple[float, float, str]], *, log_x: bool) -> _Axes:
    xs = [math.log10(x) if log_x else x for x, _, _ in values]
    ys = [math.log10(y) for _, y, _ in values]
    pad = 0.5 if log_x else max(0.5, 0.02 * (max(xs) - min(xs)))
    return _Axes((min(xs) - pad, max(xs) + pad), (math.floor(min(ys)) - 0.2, math.ceil(max(ys)) + 0.2), log_x)


def _chart(
    axes: _Axes, series: Sequence[_Series], x_label: str, y_label: str, title: str, extra: Markup | None = None
) -> Markup:
    parts = [*_grid(axes, x_label, y_label), *([] if extra is None else [extra])]
    for item in series:
        style = f"s{item.colour % 2}" + (" dash" if item.dashed else "")
        points = [(axes.at_x(x), axes.at_y(y), text) for x, y, text in item.points]
        if item.joined and len(points) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
            parts.append(Markup('<polyline class="line {}" points="{}"/>').format(style, path))
        parts += [_mark(x, y, item.mark, style, text, i) for i, (x, y, text) in enumerate(points)]
    n_wide = 2 if axes.width > 400 else 1
    lines = math.ceil(len(series) / n_wide)
    parts += _legend(series, n_wide)
    return _svg(axes.width, _HEIGHT + 8 + 17 * lines, parts, title, "plot")


def _grid(axes: _Axes, x_label: str, y_label: str) -> Iterator[Markup]:
    bottom, right = _HEIGHT - _BOTTOM, axes.width - _RIGHT
    for value in _ticks(axes.y, 6):
        y = axes.at_y(10**value if axes.log_y else value)
        yield Markup('<line class="grid" x1="{}" y1="{:.1f}" x2="{}" y2="{:.1f}"/>').format(_LEFT, y, right, y)
        yield _text(_LEFT - 6, y + 4, _tick(value, axes.log_y), "end")
    for value in _ticks(axes.x, 10):
        x = axes.at_x(10**value if axes.log_x else value)
        yield _text(x, bottom + 16, _tick(value, axes.log_x), "middle")
    yield Markup('<line class="axis" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(_LEFT, bottom, right, bottom)
    yield _text((_LEFT + right) / 2, bottom + 34, x_label, "middle")
    yield Markup('<text class="label" text-anchor="middle" transform="translate(13 {}) rotate(-90)">{}</text>').format(
        (_TOP + bottom) / 2, y_label
    )


def _ticks(limits: tuple[float, float], most: int) -> list[float]:
    """Whole numbers inside the limits, at most `most` or so of them; of logarithms, whole decades."""
    low, high = limits
    step = 10.0 ** math.floor(math.log10(max((high - low) / most, 1e-12)))
    step = next(step * k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= most)
    step = max(1.0, math.ceil(step))
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _tick(value: float, log: bool) -> str:
    return f"10{str(round(value)).translate(_SUPERSCRIPT)}" if log else f"{value:g}"


def _legend(series: Sequence[_Series], n_wide: int) -> Iterator[Markup]:
    for number, item in enumerate(series):
        x, y = _LEFT + (number % n_wide) * 250.0, _HEIGHT + 8.0 + 17.0 * (number // n_wide)
        style = f"s{item.colour % 2}" + (" dash" if item.dashed else "")
        yield Markup('<line class="line {}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(style, x, y, x + 24, y)
        yield _mark(x + 12, y, item.mark, style, None, 0)
        yield _text(x + 32, y + 4, item.name, "start")


def _mark(x: float, y: float, kind: int, style: str, text: str | None, column: int) -> Markup:
    told = Markup("") if text is None else Markup(' data-r="0" data-c="{}" data-t="{}"').format(column, text)
    css = f"{'c ' if text is not None else ''}mark {style}"
    match _MARKS[kind % len(_MARKS)]:
        case "circle":
            return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3.6"{}/>').format(css, x, y, told)
        case "square":
            return Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="7" height="7"{}/>').format(
                css, x - 3.5, y - 3.5, told
            )
    return Markup('<path class="{}" d="M{:.1f} {:.1f}l4.4 7.4h-8.8z"{}/>').format(css, x, y - 4.8, told)


# --------------------------------------------------------------------------------------------------- attention, cache


def attention_chart(row: AttentionRow) -> Markup:
    """Return three strips of bars, one bar a key: prefill, decode, and the difference below."""
    names = [f"key at position {slot}" for slot in row.slots]
    title = f"Attention of head {row.head}, prefill and decode"
    return _strips(_Strips(row.prefill, row.decode, row.slots, names, "position of the key", title))


def error_chart(row: ErrorRow) -> Markup:
    """Return three strips of bars, one bar an element of the value that fails first."""
    names = [f"element {at}" for at in row.at]
    title = f"Elements of {row.address.site} at the first failure, prefill and decode"
    return _strips(_Strips(row.prefill, row.decode, row.at, names, "element", title))


@dataclass(frozen=True, slots=True)
class _Strips:
    """Values of both passes, what each bar is called, and the numbers below the bars."""

    prefill: Sequence[float]
    decode: Sequence[float]
    numbers: Sequence[int]
    names: Sequence[str]
    x_label: str
    title: str


def _strips(row: _Strips) -> Markup:
    differences = [b - a for a, b in zip(row.prefill, row.decode, strict=True)]
    both = [value for value in (*row.prefill, *row.decode) if math.isfinite(value)]
    top_of = max(map(abs, both), default=0.0) or 1.0
    most = max([abs(value) for value in differences if math.isfinite(value)], default=0.0) or 1.0
    signed = min(both, default=0.0) < 0.0
    strips = (
        ("prefill", row.prefill, "s0", top_of, signed),
        ("decode", row.decode, "s1", top_of, signed),
        ("decode - prefill", differences, "d", most, True),
    )
    width = max(2.4, min(22.0, 640.0 / max(1, len(row.numbers))))
    left, high = 110.0, 62.0
    edge = left + width * len(row.numbers)
    parts: list[Markup] = []
    for number, (name, values, style, most_of, both_ways) in enumerate(strips):
        base = 10 + (high + 16) * number + (high / 2 if both_ways else high)
        scale = (high / 2 if both_ways else high) / most_of
        parts.append(_text(left - 8, base - (-4 if both_ways else high / 2), name, "end"))
        parts.append(Markup('<line class="axis" x1="{}" y1="{}" x2="{:.1f}" y2="{}"/>').format(left, base, edge, base))
        for key, (what, value) in enumerate(zip(row.names, values, strict=True)):
            size = abs(value) * scale if math.isfinite(value) else high / 2
            y = base - size if value >= 0 or not math.isfinite(value) else base
            parts.append(
                Markup(
                    '<rect class="c bar {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" '
                    'data-r="{}" data-c="{}" data-t="{}"/>'
                ).format(
                    *(style, left + width * key, y, max(1.0, width - 1), max(0.6, size)),
                    *(number, key, f"{what}\n{name}: {figure(value)}"),
                )
            )
    every = max(1, math.ceil(40.0 / width))
    bottom = 10 + (high + 16) * 3
    for key in range(0, len(row.numbers), every):
        parts.append(_text(left + width * (key + 0.5), bottom + 8, str(row.numbers[key]), "middle"))
    parts.append(_text((left + edge) / 2, bottom + 26, row.x_label, "middle"))
    return _svg(edge + 12, bottom + 34, parts, row.title, "bars")


def cache_map(charts: Charts) -> Markup | None:
    """Return the map layer x cached position of rows that are beyond their bound; None where there is none."""
    slots: Sequence[BadSlot] = charts.bad_slots
    if not slots:
        return None
    n_slots = max(charts.n_cached, 1 + max(item.slot for item in slots))
    width, height = max(1.5, min(18.0, 660.0 / n_slots)), max(5.0, min(16.0, 480.0 / max(1, charts.n_layers)))
    left, top = 62.0, 8.0
    right, bottom = left + width * n_slots, top + height * charts.n_layers
    parts = [
        Markup('<rect class="field" x="{}" y="{}" width="{:.1f}" height="{:.1f}"/>').format(
            left, top, right - left, bottom - top
        )
    ]
    for layer in range(0, charts.n_layers, max(1, math.ceil(16 / height))):
        parts.append(_text(left - 8, top + height * (layer + 0.5) + 4, str(layer), "end"))
    for slot in range(0, n_slots, max(1, math.ceil(44 / width))):
        parts.append(_text(left + width * (slot + 0.5), bottom + 15, str(slot), "middle"))
    for item in slots:
        x, y = left + width * item.slot, top + height * item.layer
        half = (
            height / 2
            if any(
                other.site is not item.site and (other.layer, other.slot) == (item.layer, item.slot) for other in slots
            )
            else height
        )
        shift = half if item.site is Site.V_CACHE and half < height else 0.0
        text = f"layer {item.layer}, slot {item.slot}\n{item.site}\nexcess {figure(item.excess)}"
        parts.append(
            Markup(
                '<rect class="c x2" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" data-r="{}" data-c="{}" '
                'data-t="{}"/>'
            ).format(x, y + shift, max(1.5, width - 0.5), max(2.0, half - 0.5), item.layer, item.slot, text)
        )
    parts.append(_text((left + right) / 2, bottom + 32, "cached position", "middle"))
    parts.append(
        Markup(
            '<text class="label" text-anchor="middle" transform="translate(13 {:.1f}) rotate(-90)">layer</text>'
        ).format((top + bottom) / 2)
    )
    return _svg(right + 10, bottom + 38, parts, f"Cached rows beyond their bound: {len(slots)}", "cache")


# -------------------------------------------------------------------------------------------------------------- pieces


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text class="label" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _svg(width: float, height: float, parts: Iterable[Markup], title: str, css: str) -> Markup:
    body = Markup("").join(parts)
    return Markup(
        '<svg class="{}" tabindex="0" role="img" aria-label="{}" viewBox="0 0 {:.0f} {:.0f}" width="{:.0f}" '
        'height="{:.0f}" style="min-width:{:.0f}px" xmlns="http://www.w3.org/2000/svg">{}</svg>'
    ).format(*(css, f"{title}; the table below has the figures", width, height, width, height, _SMALLEST * width, body))
