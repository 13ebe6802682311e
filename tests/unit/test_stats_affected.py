"""Which layers have a cause, once it is certain that there is one."""

import numpy as np

from kvdrift.instruments.sign_flips import affected

RNG = np.random.default_rng(0)


def shown(size: float, noise: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    wave = RNG.standard_normal(12)
    values: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = size + noise * (wave - wave.mean()) / wave.std(ddof=1)
    return values


def test_a_noisy_layer_below_counts_if_it_shows_the_same_size() -> None:
    layers = {0: shown(1e-3, 8e-4), 1: shown(1e-3, 1e-5), 2: shown(1e-3, 1e-5)}
    assert sorted(affected(layers, [1, 2])) == [0, 1, 2]


def test_a_layer_without_the_cause_does_not_count_however_noisy_it_is() -> None:
    layers = {0: shown(1e-4, 5e-4), 1: shown(2e-4, 1e-5), 2: shown(1e-3, 1e-5)}
    assert affected(layers, [2]) == [2]


def test_a_cause_that_is_sure_in_all_layers_together_is_where_it_shows_best() -> None:
    layers = {0: shown(0.0, 1e-4), 1: shown(0.0, 1e-4), 2: shown(1e-3, 4e-4)}
    assert affected(layers, []) == [2]
