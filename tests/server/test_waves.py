"""How few rows leave a server the same in every digit, and which prompts have no more together."""

import math

import pytest

from kvdrift.server.values import FORCED, PREFILL_BATCHED, PREFILL_PARTS, LogprobPair
from kvdrift.server.waves import most_rows, quiet_below, waves_of


def pair(position: int, drift: float, route: str = PREFILL_PARTS) -> LogprobPair:
    return LogprobPair(prompt="p", route=route, index=1, position=position, token=1, value=drift, reference=0.0)


def test_the_boundary_is_the_last_one_in_front_of_the_first_difference() -> None:
    pairs = [pair(20, 0.0), pair(60, 1e-6), pair(67, 0.05), pair(90, 0.0)]
    assert (quiet_below(pairs), most_rows(pairs)) == (64, 64)
    assert (quiet_below(pairs[:2]), most_rows(pairs[:2])) == (0, 32)  # no difference: what was reached
    assert (quiet_below([]), most_rows([])) == (0, 0)
    assert most_rows([pair(3, 0.1), pair(90, 0.0)]) == 0
    assert most_rows([pair(40, math.nan), pair(90, 0.0)]) == 32


def test_neighbours_and_single_steps_do_not_move_the_boundary() -> None:
    """What they show may be the very fault that is looked for."""
    pairs = [pair(67, 0.05), pair(5, 0.1, PREFILL_BATCHED), pair(40, 0.1, FORCED)]
    assert (quiet_below(pairs), most_rows(pairs)) == (64, 64)


@pytest.mark.parametrize(
    ("lengths", "waves"),
    [
        ([57, 45, 18, 4], [(57, 4), (45, 18)]),
        ([56, 57, 4], [(57, 4), (56, 4)]),
        ([10, 11, 12, 13, 14], [(14, 13, 12, 11), (10, 10)]),
        ([62, 70, 61], []),
        ([], []),
    ],
)
def test_a_wave_has_fewer_rows_than_change_a_digit(lengths: list[int], waves: list[tuple[int, ...]]) -> None:
    named = {str(n): n for n in lengths}
    found = [tuple(named[name] for name in wave) for wave in waves_of(named, 64, 4)]
    assert found == waves
    assert all(sum(wave) < 64 and len(wave) > 1 for wave in found)
