"""Statistics on units: sign-flip permutation with the largest statistic over many tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvdrift.vocabulary.evidence import Evidence

Floats = NDArray[np.float64]
K = TypeVar("K")

# Standard errors from which a place is counted in, once the cause itself is certain.
_NOTABLE = 3.0

# Up to this many units all sign patterns are tried; above, this many random ones.
_EXACT_UNITS = 13
_RANDOM_FLIPS = 1 << 13


@dataclass(frozen=True, slots=True)
class MaxT:
    """Result of `sign_flip_max_t`.

    Attributes:
        t: statistic [test]: |mean| over its standard error, without a unit.
        p_values: p-value [test], adjusted for all tests.
        smallest_p: the smallest p-value that this number of units can give.
    """

    t: Floats
    p_values: Floats
    smallest_p: float


def sign_flip_max_t(values: Floats, *, seed: int) -> MaxT:
    """Test for each row of `values` whether its units are symmetric around zero.

    The statistic is |mean| over its standard error. The p-value of a test is the share of sign patterns in which the
    largest statistic of all tests reaches it (Westfall & Young 1993, max-T): it controls the chance of any false alarm
    among the tests, whatever their dependence. A row that is zero throughout has t = 0.

    Args:
        values: [test, unit], each row in a unit of its own; all finite, so NaN is refused.
        seed: of the sign patterns, where there are too many units to try all patterns.

    Returns:
        Statistics and p-values [test]; both empty if there is no test.

    Raises:
        ValueError: fewer than two units, or a value that is not finite.
    """
    n_tests, n_units = values.shape
    if n_units < 2 or not np.isfinite(values).all():
        raise ValueError(f"{n_units} units, all finite: {bool(np.isfinite(values).all())}; two finite ones are needed")
    observed = _t(values)
    if n_units <= _EXACT_UNITS:
        patterns = ((np.arange(1 << n_units)[:, None] >> np.arange(n_units)) & 1) * 2.0 - 1.0
    else:
        rng = np.random.default_rng(seed)
        patterns = rng.choice([-1.0, 1.0], size=(_RANDOM_FLIPS, n_units))
        patterns[0] = 1.0
    largest = np.zeros(len(patterns))
    squares = (values**2).sum(axis=1)
    for start in range(0, len(patterns), 512):
        block = patterns[start : start + 512]
        means = block @ values.T / n_units
        largest[start : start + 512] = _from_moments(means, squares / n_units, n_units).max(axis=1, initial=0.0)
    # A tie within rounding is a tie.
    p_values = np.array([(largest >= t * (1.0 - 1e-9)).mean() for t in observed]) if n_tests else np.zeros(0)
    return MaxT(observed, p_values, 2.0 / len(patterns))


def units_for(alpha: float) -> int | None:
    """Return how many units a p-value of at most `alpha` takes; None if no number of units gives one.

    >>> units_for(1e-3)
    11
    """
    return next((n for n in range(2, _EXACT_UNITS + 1) if 2.0 ** (1 - n) <= alpha), None)


def abstain_for_few(
    instrument: str, mode: str, statistic_name: str, n_units: int, alpha: float, *, bound: float | None = None
) -> Evidence:
    """Return the evidence of an instrument that has too few units for a p-value of `alpha`, and says how many would do.

    It states no minimum: what it would have seen with more units it does not see with these.
    """
    needed = units_for(alpha)
    if needed is None:
        reason = f"no number of units gives a p-value of {alpha:.1e}; the smallest is {2.0 / _RANDOM_FLIPS:.1e}"
    else:
        reason = f"{n_units} distinct (prompt, position) units give no p-value of {alpha:.1e}, {needed} do"
    found = Evidence.abstain(instrument, mode, statistic_name, reason, bound=bound)
    return replace(found, detail={"n_units": n_units, "units_needed": needed, "alpha": alpha})


def affected(shown: Mapping[K, Floats], sure: Iterable[K]) -> list[K]:
    """Return which of several places have a cause that was found for certain at `sure`, or only in all together.

    A place that is too noisy to be sure of by itself is counted in if its coefficient is nearer to that of the sure
    ones than to zero, and three standard errors from zero. Where no place is sure, the one that shows the cause most
    clearly stands for them.

    Args:
        shown: the coefficient of each place, [unit], all finite and in the unit of the cause.
        sure: the places that are certain by themselves.

    Returns:
        The sure places in their order, then the others that are counted in.
    """
    known = list(dict.fromkeys(sure))
    clear = {place: float(_t(values[None])[0]) for place, values in shown.items() if len(values) > 1}
    if not known and clear:
        known = [max(clear, key=lambda place: clear[place])]
    if not known:
        return []
    size = float(np.median([shown[place].mean() for place in known]))
    alike = [
        place
        for place, t in clear.items()
        if t >= _NOTABLE and abs(float(shown[place].mean()) - size) <= abs(size) / 2.0
    ]
    return list(dict.fromkeys([*known, *alike]))


def _t(values: Floats) -> Floats:
    return np.asarray(_from_moments(values.mean(axis=1)[None], (values**2).mean(axis=1), values.shape[1])[0])


def _from_moments(means: Floats, mean_squares: Floats, n_units: int) -> Floats:
    """|mean| / standard error from the first two moments; equal values of one sign give a large number, zeros zero."""
    variance = np.maximum(mean_squares - means**2, mean_squares * 1e-12)
    error = np.sqrt(variance / (n_units - 1))
    return np.asarray(np.divide(np.abs(means), error, out=np.zeros_like(means), where=error > 0.0))
