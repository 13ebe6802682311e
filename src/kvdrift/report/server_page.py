"""report.html of a server: its routes beside their bounds, drift along the context, and every table, as one page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from kvdrift.report.bars import Bar, bars_chart
from kvdrift.report.charts import by_position
from kvdrift.report.html import SIGN, page_environment
from kvdrift.report.markdown import MEANING
from kvdrift.report.view import figure


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
    bars = []
    for route in routes:
        bound, typical = _positive(route.get("bound")), _positive(route["typical"])
        if bound is not None:
            text = (
                f"{route['name']}\n{route.get('status', '')}: drift {figure(route['typical'])} nats (rms), largest "
                f"{figure(route['largest'])}\nbound {figure(route['bound'])}, {route['n']} tokens"
            )
            bars.append(Bar(str(route["name"]), typical, bound, route.get("status") == "FAIL", text))
    return bars_chart(bars, "Drift of every route beside its bound", "drift of logprobs, nats (rms)", "routes")


def _positive(value: Any) -> float | None:
    """A figure that a logarithmic axis can show."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0.0 else None
