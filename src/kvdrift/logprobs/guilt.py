"""Which of three is off: A, B, or the third dump, in which A's engine scored the same tokens by prefill."""

from __future__ import annotations

import numpy as np

from kvdrift.logprobs.dump import Floats
from kvdrift.logprobs.estimates import Estimate, rms_by_sequence
from kvdrift.logprobs.noise import PairNoise, standardised, weight_of
from kvdrift.logprobs.outcome import Guilt
from kvdrift.logprobs.pairing import Pairs

# A side is off if both of its distances are so many times the distance of the other two.
_FAR = 3.0


def guilty_of_three(pairs: Pairs, noise: PairNoise, beyond: tuple[int, ...]) -> Guilt:
    """Compare the three distances over the sequences that are beyond rounding.

    Each distance is the median over these sequences of the rms in units of typical rounding, and at least 1: two that
    agree digit by digit are no nearer than rounding lets be known.
    """
    assert pairs.third is not None
    distance = {
        name: _distance(one, two, pairs, noise, beyond)
        for name, one, two in (
            ("A and B", pairs.a, pairs.b),
            ("A and third", pairs.a, pairs.third),
            ("B and third", pairs.b, pairs.third),
        )
    }
    if not all(np.isfinite(value) for value in distance.values()):
        return Guilt(None, "the third dump lacks these tokens, so it is no witness", distance)
    ab, at, bt = distance.values()
    if ab > _FAR * bt and at > _FAR * bt:
        return Guilt("A", f"A is off: its own prefill agrees with B ({bt:.2g}) and not with A ({at:.2g})", distance)
    if ab > _FAR * at and bt > _FAR * at:
        return Guilt(
            "B",
            f"A agrees with its own prefill ({at:.2g}), B with neither ({bt:.2g}): B is off, or computes another "
            "function than the whole engine of A (weights, template, positions)",
            distance,
        )
    if at > _FAR * ab and bt > _FAR * ab:
        return Guilt("third", f"A and B agree ({ab:.2g}), the third with neither ({at:.2g})", distance)
    return Guilt(
        None, f"all three differ: {', '.join(f'{name} {value:.2g}' for name, value in distance.items())}", distance
    )


def _distance(one: Floats, two: Floats, pairs: Pairs, noise: PairNoise, beyond: tuple[int, ...]) -> float:
    d = two - one
    known = np.isfinite(d) & np.isin(pairs.sequence, beyond)
    if not known.any():
        return float("nan")
    z = np.where(known, standardised(np.where(known, d, 0.0), weight_of(one, two), noise.sigma, pairs.grain), 0.0)
    found, counts = rms_by_sequence(z, pairs.sequence, len(pairs.names), known)
    return max(1.0, float(np.median(found[counts > 0])))


def guilty_of_two(ratio: Estimate, alpha_text: str) -> Guilt:
    """What two dumps alone tell: whether A reports the probabilities that it sampled from.

    The mean of p/q over tokens sampled from q is 1 whatever p is. One far from 1 says that A did not sample from the
    probabilities that it reports, or that B's do not add up to one.
    """
    if not np.isfinite(ratio.error) or ratio.error == 0.0:
        return Guilt(None, "two dumps alone do not tell which side is off; --third (a prefill by A's engine) would")
    if ratio.low <= 1.0 <= ratio.high:
        text = (
            f"the importance ratio is 1 on average ({ratio.value:.3g}, {alpha_text} {ratio.low:.3g} to "
            f"{ratio.high:.3g}), as it is for any B if A reports what it sampled from; --third tells which side is off"
        )
        return Guilt(None, text)
    return Guilt(
        None,
        f"the importance ratio is {ratio.value:.3g} on average ({alpha_text} {ratio.low:.3g} to {ratio.high:.3g}), and "
        "not 1: A did not sample from the probabilities that it reports, or those of B do not add up to one",
    )
