"""What rounding can make of a logprob: in stated dtypes, or as measured by a dump that was made twice.

Rounding moves each logit by about sigma. The logprob of token t then moves by e_t - sum_j p_j e_j, whose size is
between 1 - p_t and sqrt(2) (1 - p_t) times sigma: a token that is certain cannot move. Differences are therefore
measured in units of sigma (1 - p), with what the file itself rounded added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kvdrift.errors import UsageError
from kvdrift.logprobs.dump import Floats
from kvdrift.logprobs.pairing import Pairs

# sigma of one side in nats: rms of what it differs by from float32, over 1 - p. Measured on SmolLM2-135M up to int8
# (docs/compare.md, "How large rounding is"; float16 lies three bits below bfloat16); the others are that of int8, times
# how much coarser a weight is rounded, and were not measured.
STATED = {
    "float64": 1e-9,
    "float32": 1e-5,
    "float16": 1e-2,
    "bfloat16": 7e-2,
    "int8": 0.13,
    "fp8": 0.5,
    "int4": 1.5,
}
ALIASES = {
    "fp64": "float64",
    "fp32": "float32",
    "f32": "float32",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "w8a16": "int8",
    "w8a8": "int8",
    "q8_0": "int8",
    "float8": "fp8",
    "nf4": "int4",
    "q4_1": "int4",
    "q4_0": "int4",
}
UNKNOWN = "bfloat16"
SOURCE = "stated, from SmolLM2-135M on a CPU (docs/compare.md)"


# Drift up to so many times what is stated for another model and engine is taken for rounding: two bits more are lost.
# What was measured on this very model needs half of it.
MARGIN_STATED, MARGIN_MEASURED = 4.0, 2.0
# A repetition that moves less than this share of what is stated ran the same kernels, and measured nothing.
_MOVED = 1.0 / 3.0


@dataclass(frozen=True, slots=True)
class PairNoise:
    """What rounding typically makes of a difference, in nats over 1 - p, and up to which multiple it is believed."""

    sigma: float
    margin: float
    source: str
    measured: dict[str, float]

    @property
    def bound(self) -> float:
        """The largest typical difference that is taken for rounding, in nats over 1 - p."""
        return self.sigma * self.margin


def dtype_named(text: str | None, flag: str) -> str | None:
    """Return the dtype that a name means, None for none.

    Raises:
        UsageError: nobody knows it.
    """
    if text is None:
        return None
    name = ALIASES.get(text.lower(), text.lower())
    if name not in STATED:
        raise UsageError(f"unknown dtype {text!r}; {flag} takes {', '.join([*STATED, *sorted(ALIASES)])}")
    return name


def weight_of(a: Floats, b: Floats) -> Floats:
    """Return 1 - p [token], p being the geometric mean of both probabilities; 1 where a logprob is not finite."""
    middle = 0.5 * (np.minimum(a, 0.0) + np.minimum(b, 0.0))
    return np.where(np.isfinite(middle), -np.expm1(np.where(np.isfinite(middle), middle, 0.0)), 1.0)


def noise_of(pairs: Pairs, dtypes: tuple[str | None, str | None]) -> PairNoise:
    """Return the noise of A against B: as stated for both dtypes, or as their repetitions and the third dump show it.

    Repetitions tell what A, and B, differ by from themselves; the third dump is by the engine and dtype of A. Either
    replaces what is stated if it moved at all: equal digits show an engine that is deterministic, and not that it does
    not round. A measurement beyond the stated bound is a fault or a noisy engine, which nobody can tell: it is left out
    for the third dump, and kept for a repetition, which computes the same thing twice.
    """
    stated = [STATED[dtype or UNKNOWN] for dtype in dtypes]
    measured: dict[str, float] = {}
    sides = list(stated)
    n_measured = 0
    runs = (
        ("A repeated", 0, pairs.a, pairs.repeat_a, True),
        ("B repeated", 1, pairs.b, pairs.repeat_b, True),
        ("A against the third", 0, pairs.a, pairs.third, False),
    )
    for name, side, one, two, same in runs:
        if two is None or (sigma := sigma_between(one, two, pairs.grain)) is None:
            continue
        measured[name] = sigma
        usable = sigma >= _MOVED * stated[side] and (same or sigma <= MARGIN_STATED * stated[side])
        if usable:
            sides[side] = max(sigma, sides[side]) if sides[side] != stated[side] else sigma
            n_measured = max(n_measured, 1)
    words = [
        f"{'AB'[i]} {dtype or f'of unknown dtype, taken for {UNKNOWN}'}: {side:.2g}, "
        + ("measured" if side != stated[i] else "stated")
        for i, (dtype, side) in enumerate(zip(dtypes, sides, strict=True))
    ]
    # B's own noise is stated where only A was measured: it is trusted if the same model was found to be no noisier.
    margin = MARGIN_MEASURED if n_measured else MARGIN_STATED
    return PairNoise(math.hypot(*sides), margin, "; ".join(words), measured)


def sigma_between(one: Floats, two: Floats, grain: Floats) -> float | None:
    """Return sigma of one of two runs of the same thing, from the differences [token] of both; None if none is finite.

    The rms over 1 - p of tokens whose p is at most 0.95, the largest 1 % left out; two runs have twice the variance of
    one, hence the root of 2.
    """
    d = two - one
    known = np.isfinite(d)
    if not known.any():
        return None
    weight = weight_of(one, two)[known]
    chosen = weight > 0.05 if (weight > 0.05).sum() >= 8 else weight > 0.0
    if not chosen.any():
        return None
    z = np.sort(np.maximum(np.abs(d[known]) - grain[known], 0.0)[chosen] / weight[chosen])
    return float(np.sqrt(np.mean(z[: max(1, int(0.99 * z.size))] ** 2) / 2.0))


def standardised(d: Floats, weight: Floats, sigma: float, grain: Floats) -> Floats:
    """Return `d` [token] over what rounding typically makes of it; NaN and infinite values stay what they are."""
    scale: Floats = np.hypot(sigma * weight, grain + 1e-300)
    return d / scale
