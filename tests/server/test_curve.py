"""Drift along the context: where it begins, what is allowed, and stretches without any."""

from __future__ import annotations

import re

from kvdrift.report.charts import by_position

CURVE = {
    "decode_solo": [
        {"first": 32, "last": 63, "n": 9, "rms": 0.0, "largest": 0.0},
        {"first": 64, "last": 95, "n": 9, "rms": 0.08, "largest": 0.2},
    ]
}


def test_the_bound_and_the_place_where_drift_begins_are_drawn_inside_the_chart() -> None:
    drawn = str(by_position(CURVE, bound=0.6, begins=64))

    assert ">bound 0.6<" in drawn
    assert ">from 64<" in drawn
    lines = re.findall(r'class="slope" x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)"', drawn)
    (x1, y1, x2, y2), upright = (tuple(map(float, line)) for line in lines)
    assert y1 == y2
    assert x1 < upright[0] == upright[2] < x2
    assert upright[1] < y1 < upright[3]


def test_a_stretch_without_drift_is_drawn_and_said() -> None:
    assert "decode_solo, 32 to 63\n0 nats" in str(by_position(CURVE))
    assert "bound" not in str(by_position(CURVE))
    assert by_position({"decode_solo": CURVE["decode_solo"][:1]}) is None
