"""Estimates of a divergence from the logprobs of sampled tokens, and where a drift begins. Numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Where kernels and caches change over: tiles, pages, blocks. A change point is named only if it is one of these.
STEPS = (16, 32, 64, 96, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Estimates over tokens that were sampled from decode, in nats; infinite where a logprob gap overflows.

    `k1` is the mean of log q/p, `k3` the mean of p/q - 1 - log p/q, both estimates of KL(q || p) with q decode and p
    prefill; `chi2` the mean of (p/q - 1)^2, an estimate of the chi-square divergence of p from q. (J. Schulman,
    "Approximating KL divergence", 2020.) They are estimates of these only if the tokens were sampled from q itself.
    """

    n: int
    k1: float
    k3: float
    chi2: float


def divergence(value: Floats, reference: Floats) -> Divergence:
    """Estimate the divergence of two routes from their logprobs of the same tokens, in nats.

    A NaN on either side makes all three estimates NaN, and so does an empty array.

    Args:
        value: [token], by decode, which sampled the tokens.
        reference: [token], by prefill.

    >>> divergence(np.array([-1.0, -2.0]), np.array([-1.0, -2.0])).k3
    0.0
    """
    if not value.size:
        return Divergence(0, float("nan"), float("nan"), float("nan"))
    with np.errstate(over="ignore", invalid="ignore"):
        log_ratio = reference - value
        excess = np.expm1(log_ratio)
        return Divergence(
            int(value.size), float(-log_ratio.mean()), float((excess - log_ratio).mean()), float((excess**2).mean())
        )


def rms(values: Floats) -> float:
    """Return the root of the mean square of `values` [...], in their unit; NaN if there are none or one is not finite.

    >>> rms(np.array([3.0, 4.0, 0.0, 0.0]))
    2.5
    """
    if not values.size or not np.isfinite(values).all():
        return float("nan")
    return float(np.sqrt(np.mean(values**2)))


@dataclass(frozen=True, slots=True)
class ChangePoint:
    """A position from which on drift is larger: `before` and `after` are its rms on both sides, in nats."""

    position: int
    before: float
    after: float
    p_value: float


def change_point(
    positions: Sequence[int], groups: Sequence[str], drift: Floats, *, floor: float, seed: int, n_shuffles: int = 999
) -> ChangePoint | None:
    """Return the boundary of STEPS that parts small drift from large drift best.

    The result is None if no boundary has four tokens on both sides, or if a drift is NaN or infinite.

    The statistic is the gain in log-likelihood of two normal variances over one. Its p-value comes from shuffling drift
    among the positions of each prompt, which keeps what differs between prompts. Drift of neighbouring positions is
    taken as independent, so the p-value informs and decides nothing.

    Args:
        positions: [token], of the whole sequence.
        groups: [token], the name of its prompt.
        drift: [token], in nats.
        floor: the drift below which nothing can be told apart, in nats.
        seed: of the shuffles.
        n_shuffles: how many there are; the smallest p-value is 1 / (n_shuffles + 1).
    """
    places = np.asarray(positions)
    squares = np.asarray(drift, dtype=np.float64) ** 2 + floor**2
    candidates = [b for b in STEPS if (places < b).sum() >= 4 and (places >= b).sum() >= 4]
    if not candidates or not np.isfinite(squares).all():
        return None
    sides = np.array([places >= b for b in candidates], dtype=np.float64)
    found = _gains(sides, squares)
    best = int(np.argmax(found))
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(np.asarray(groups) == name) for name in dict.fromkeys(groups)]
    shuffled = np.repeat(squares[None], n_shuffles, axis=0)
    for member in members:
        shuffled[:, member] = rng.permuted(shuffled[:, member], axis=1)
    reached = 1 + int((_gains(sides, shuffled.T).max(axis=0) >= found[best]).sum())
    after = sides[best] > 0
    return ChangePoint(
        candidates[best],
        float(np.sqrt(np.mean(drift[~after] ** 2))),
        float(np.sqrt(np.mean(drift[after] ** 2))),
        reached / (n_shuffles + 1),
    )


def _gains(sides: Floats, squares: Floats) -> Floats:
    """Return the gain of each split [split, ...] of `squares` [token, ...]; -inf where the later side is not larger."""
    n_tokens = len(squares)
    n_after = sides.sum(axis=1).reshape(-1, *[1] * (squares.ndim - 1))
    n_before = n_tokens - n_after
    behind = sides @ squares
    after = behind / n_after
    before = (squares.sum(axis=0) - behind) / n_before
    gain = 0.5 * (n_tokens * np.log(squares.mean(axis=0)) - n_after * np.log(after) - n_before * np.log(before))
    return np.asarray(np.where(after > before, gain, -np.inf))


@dataclass(frozen=True, slots=True)
class Bin:
    """The drift of one stretch of positions, `first` to `last`, in nats."""

    first: int
    last: int
    n: int
    rms: float
    largest: float


def curve(positions: Sequence[int], drift: Floats) -> list[Bin]:
    """Return drift by stretches of positions that end at the boundaries of STEPS, in nats.

    A stretch with a NaN has NaN figures; a stretch without a token is left out.

    Args:
        positions: [token], of the whole sequence.
        drift: [token], in nats.

    >>> [(b.first, b.last, b.n) for b in curve([3, 15, 16, 40], np.zeros(4))]
    [(0, 15, 2), (16, 31, 1), (32, 63, 1)]
    """
    places = np.asarray(positions)
    edges = [0, *STEPS, 1 << 62]
    bins = []
    for first, end in pairwise(edges):
        inside = (places >= first) & (places < end)
        if inside.any():
            part = np.abs(drift[inside])
            bins.append(Bin(first, end - 1, int(inside.sum()), rms(drift[inside]), float(part.max())))
    return bins


def lag(values: Sequence[Floats], references: Sequence[Floats]) -> int:
    """Return by how many tokens the references are displaced: 0, or the lag of -1 or 1 at which they fit far better.

    `values` and `references` have an array [token] of logprobs for each prompt, in nats. Prompts with fewer than 8
    tokens, a NaN or an infinity are left out; fewer than two prompts give 0.

    Far better is a typical (median over prompts) misfit below a quarter of the one at 0; rounding cannot do that,
    because it is not larger there.
    """
    misfit = {0: [], 1: [], -1: []}  # type: dict[int, list[float]]
    for value, reference in zip(values, references, strict=True):
        if value.size < 8 or not (np.isfinite(value).all() and np.isfinite(reference).all()):
            continue
        misfit[0].append(rms((value - reference)[1:-1]))
        misfit[1].append(rms(value[1:-1] - reference[2:]))
        misfit[-1].append(rms(value[1:-1] - reference[:-2]))
    if len(misfit[0]) < 2:
        return 0
    typical = {step: float(np.median(found)) for step, found in misfit.items()}
    best = min(typical, key=lambda step: typical[step])
    return best if best and typical[best] < 0.25 * typical[0] else 0
