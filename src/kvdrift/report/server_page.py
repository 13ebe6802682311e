"""report.html of a server: its routes beside their bounds, drift along the context, and every table, as one page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from kvdrift.report.charts import by_position
from kvdrift.report.html import SIGN, page_environment
from kvdrift.report.markdown import MEANING
from kvdrift.report.view import figure

_LEFT, _WIDTH, _ROW, _TOP = 300.0, 640.0, 26.0, 10.0


def render_server_html(view: Mapping[str, Any]) -> str:
    """Return the report of a server as one page of HTML that fetches nothing.

    Args:
        view: the report as plain data, of schema "server"; what it holds beside that is shown as a table of its own.
    """
    return (
        page_environment()
        .get_template("server.html.jinja")
        .render(
            view=view,
            meaning=MEANING[view["verdict"]],
            sign=SIGN[view["verdict"]],
            routes=routes_chart(view["routes"]),
            curve=by_position(
                view.get("curve") or {}, bound=_positive(view.get("curve_bound")), begins=view.get("curve_begins")
            ),
            reasons=[_sentence(item) for item in view["reasons"]],
        )
    )


def _sentence(item: Any) -> str:
    return str(item.get("text", item)) if isinstance(item, Mapping) else str(item)


def routes_chart(routes: list[dict[str, Any]]) -> Markup | None:
    """Return drift of every route beside its bound, on one logarithmic axis; None where nothing can be drawn."""
    drawn = [r for r in routes if _positive(r.get("bound")) is not None]
    figures = [x for r in drawn for x in (_positive(r["typical"]), _positive(r["bound"]), _positive(r["largest"])) if x]
    if not figures:
        return None
    low, high = math.floor(math.log10(min(figures)) - 0.3), math.ceil(math.log10(max(figures)) + 0.1)

    def at(value: float) -> float:
        return _LEFT + (math.log10(value) - low) / max(1, high - low) * (_WIDTH - _LEFT - 30)

    bottom = _TOP + _ROW * len(drawn)
    parts = []
    for exponent in range(low, high + 1, max(1, (high - low) // 6)):
        x = at(10.0**exponent)
        parts.append(
            Markup('<line class="grid" x1="{0:.1f}" y1="{1}" x2="{0:.1f}" y2="{2:.1f}"/>').format(x, _TOP, bottom)
        )
        parts.append(_label(x, bottom + 16, f"1e{exponent}", "middle"))
    for number, route in enumerate(drawn):
        y = _TOP + _ROW * (number + 0.5)
        style = "x2" if route.get("status") == "FAIL" else "w3"
        text = (
            f"{route['name']}\n{route.get('status', '')}: drift {figure(route['typical'])} nats (rms), largest "
            f"{figure(route['largest'])}\nbound {figure(route['bound'])}, {route['n']} tokens"
        )
        parts.append(_label(_LEFT - 10, y + 4, route["name"], "end"))
        end = at(_positive(route["typical"]) or 10.0**low)
        parts.append(
            Markup(
                '<rect class="c {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="12" data-r="{}" data-c="0" '
                'data-t="{}"/>'
            ).format(style, _LEFT, y - 6, max(2.0, end - _LEFT), number, text)
        )
        bound = at(route["bound"])
        parts.append(_stroke("bound", bound, y - 10, y + 10))
    parts.append(
        _label((_LEFT + _WIDTH) / 2, bottom + 34, "drift of logprobs, nats (rms); the stroke is the bound", "middle")
    )
    return Markup(
        '<svg class="routes" tabindex="0" role="img" aria-label="Drift of every route beside its bound; the table '
        'below has the figures" viewBox="0 0 {0:.0f} {1:.0f}" width="{0:.0f}" height="{1:.0f}" '
        'xmlns="http://www.w3.org/2000/svg">{2}</svg>'
    ).format(_WIDTH, bottom + 42, Markup("").join(parts))


def _stroke(css: str, x: float, top: float, bottom: float) -> Markup:
    return Markup('<line class="{0}" x1="{1:.1f}" y1="{2:.1f}" x2="{1:.1f}" y2="{3:.1f}"/>').format(css, x, top, bottom)


def _label(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text class="label" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _positive(value: Any) -> float | None:
    """A figure that a logarithmic axis can show."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0.0 else None
