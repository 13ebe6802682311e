"""Evidence that may be looked at after every text: it keeps its level, and it grows where every text agrees."""

from __future__ import annotations

import numpy as np
import pytest

from kvdrift.server.betting import SHARES, capital, fewest_units
from kvdrift.server.plan import ServerPlan
from kvdrift.server.sequential import generation_of
from kvdrift.server.values import FORCED_REPEAT, GENERATION, Captured, LogprobPair


def test_a_fair_coin_reaches_one_over_alpha_in_fewer_than_alpha_of_all_sequences() -> None:
    """With all of 20,000 sequences stopped where they stand highest: the worst that optional stopping can do."""
    rng = np.random.default_rng(0)
    signs = np.where(rng.random((20_000, 200)) < 0.5, 1.0, -1.0)
    wealth = np.sum([part * np.cumprod(1.0 + share * signs, axis=1) for share, part in SHARES], axis=0)
    for alpha in (0.1, 0.01):
        assert (wealth.max(axis=1) >= 1.0 / alpha).mean() <= alpha

    assert wealth[0, 19] == pytest.approx(capital([bool(s > 0) for s in signs[0, :20]]))
    assert sum(part for _, part in SHARES) == pytest.approx(1.0)


def test_one_contradiction_does_not_end_it() -> None:
    assert fewest_units(50_000.0) == 17
    assert capital([False] + [True] * 30) > 50_000.0
    assert capital([True] * 10_000) > 1e200


def captured(sizes: list[float], repeats: list[float]) -> Captured:
    found = Captured()
    for route, values in ((GENERATION, sizes), (FORCED_REPEAT, repeats)):
        found.pairs += [
            LogprobPair(prompt=f"p{i}", route=route, index=1, position=9, token=5, value=-1.0 + x, reference=-1.0)
            for i, x in enumerate(values)
        ]
    return found


def test_a_server_that_does_not_repeat_itself_has_that_as_its_noise() -> None:
    exact = generation_of(captured([0.01] * 17, [0.0] * 12), ServerPlan())
    noisy = generation_of(captured([0.01] * 17, [0.01] * 12), ServerPlan())

    assert exact.beyond
    assert not noisy.beyond
    assert noisy.within
    assert noisy.bound == pytest.approx(0.04)


@pytest.mark.parametrize("odd", [0.5, float("nan")])
def test_one_text_that_differs_keeps_it_from_passing(odd: float) -> None:
    test = generation_of(captured([0.0] * 30 + [odd], [0.0] * 12), ServerPlan())

    assert not test.beyond
    assert not test.within
    assert test.differing == ["p30"]
