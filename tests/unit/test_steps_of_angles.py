"""The angle of one position is read off those of several, wherever they are counted from."""

import numpy as np
import pytest

from kvdrift.replay.turns import step_of

STEP = 10000.0 ** (-np.arange(8) / 8.0)
POSITIONS = range(11, 16)


@pytest.mark.parametrize("start", [0, 7, -4])
def test_the_step_is_that_of_the_angles_wherever_they_are_counted_from(start: int) -> None:
    noise = np.random.default_rng(1).uniform(-1e-7, 1e-7, (16, 8))
    angles = {p: (p + start) * STEP + noise[p] for p in POSITIONS}

    found = step_of(angles, room=1e-3)

    assert found is not None
    # A pair that turns by less than the room between two positions may be read as if it were counted from 0.
    tolerance = np.where(abs(start) * STEP < 11e-3, abs(start) * STEP / 11, 1e-6)
    assert (np.abs(found - STEP) <= tolerance + 1e-6).all()


def test_angles_from_zero_give_a_finer_step_than_two_neighbours() -> None:
    noise = np.random.default_rng(1).uniform(-1e-3, 1e-3, (16, 8))
    angles = {p: p * STEP + noise[p] for p in POSITIONS}

    found = step_of(angles)

    assert found is not None
    assert np.abs(found - STEP).max() <= 1e-3 / 11


def test_without_neighbours_there_is_no_step() -> None:
    assert step_of({3: STEP, 5: STEP}) is None
