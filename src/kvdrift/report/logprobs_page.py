"""report.html of two dumps of logprobs: who is off, from where on, sequences beside what rounding may do to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvdrift.report.bars import Bar, bars_chart
from kvdrift.report.charts import by_position
from kvdrift.report.html import SIGN, page_environment
from kvdrift.report.markdown import MEANING_OF_LOGPROBS
from kvdrift.report.view import figure


def render_logprobs_html(view: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> str:
    """Return the report of two dumps as one page of HTML that fetches nothing.

    Args:
        view: the report as plain data, of schema "logprobs".
        shown: the sequences that are drawn and listed.
    """
    bars = [
        Bar(
            f"sequence {item['name']}",
            item["ratio"] if math.isfinite(item["ratio"]) and item["ratio"] > 0.0 else None,
            item["limit"],
            item["beyond"],
            f"sequence {item['name']}\ndrift {figure(item['ratio'])} times the bound, {figure(item['limit'])} is "
            f"possible for {item['n']} tokens\nlargest {figure(item['largest'])} at token {item['largest_at']}"
            + ("" if item["change"] is None else f"\nfrom token {item['change']} on"),
        )
        for item in shown
        if math.isfinite(item["limit"]) and item["limit"] > 0.0
    ]
    return (
        page_environment()
        .get_template("logprobs.html.jinja")
        .render(
            view=view,
            shown=shown,
            meaning=MEANING_OF_LOGPROBS[view["verdict"]],
            sign=SIGN[view["verdict"]],
            bars=bars_chart(bars, "Sequences beside what is possible", "drift over bound (rms)", "sequences"),
            along=by_position({"all sequences": view["along"]}, bound=1.0, unit="times the bound"),
            reasons=[item["text"] if isinstance(item, Mapping) else item for item in view["reasons"]],
        )
    )
