"""Judging is a function of what was measured."""

from collections.abc import Callable

import pytest

from kvdrift.measure.measured import Measured
from kvdrift.verdict.judge import decide_route
from tests.support.traces import synthetic_run

FACTORIES: list[Callable[[], Measured]] = [synthetic_run, lambda: synthetic_run(noise=0.0)]


@pytest.mark.parametrize("build", FACTORIES)
def test_judging_twice_gives_the_same_decision(build: Callable[[], Measured]) -> None:
    run = build()
    assert decide_route(run) == decide_route(run) == decide_route(build())
