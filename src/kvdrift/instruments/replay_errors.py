"""Errors of replayed attention against what rounding, and the other pass, let them be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kvdrift.instruments.exact import Sizes, bound_from, promised
from kvdrift.instruments.replay import ReplayRow
from kvdrift.replay.narrow import MOST_ROUNDINGS
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.sites import Site

STATISTIC = "largest attention error of decode over the rounding bound"
_SIDES = ("prefill", "decode")
# What the bound is made of, by whether prefill's own errors are part of it.
_ALLOWS = {
    False: "rounding of scores, probabilities and output",
    True: "prefill's own errors and rounding",
}


def judge_errors(
    rows: Sequence[ReplayRow], mode: str, unit: float, *, is_specified: bool
) -> tuple[dict[Address, float], Evidence]:
    """The addresses whose attention errs by more than its bound, each with how much more, and the evidence."""
    beyond: dict[Address, float] = {}
    bounds = [bound_of(row, unit) for row in rows]
    # What a kernel may round is known of attention that was seen whole, at a half dtype or behind casts to one.
    whole = [row for row in rows if row.given is None]
    is_measured = is_specified and bool(whole) and all(row.sizes for row in whole)
    allowed = _allowed(rows, "prefill") if is_measured else {}
    over = np.array([_over(row, bound, allowed) for row, bound in zip(rows, bounds, strict=True)])
    of_prefill = _over_of_prefill(rows) if is_measured else np.zeros(len(rows))
    for row, value in zip(rows, np.maximum(over, of_prefill * (of_prefill > 1.0)).tolist(), strict=True):
        if row.given is not None and not row.given.over <= 1.0:
            beyond[Address(row.prompt, row.position, row.layer, Site.ATTN_SCORES)] = row.given.over
        is_excused = not (is_specified or row.given is not None) and row.error["decode"] <= 2.0 * row.error["prefill"]
        if not value <= 1.0 and not is_excused:
            beyond[Address(row.prompt, row.position, row.layer, Site.ATTN_CTX)] = value
    return beyond, _attention_errors(mode, rows, bounds, allowed, beyond, over, of_prefill)


def _attention_errors(
    mode: str,
    rows: Sequence[ReplayRow],
    bounds: Sequence[float],
    allowed: Mapping[int, Sizes],
    beyond: Mapping[Address, float],
    over: NDArray[np.float64],
    of_prefill: NDArray[np.float64],
) -> Evidence:
    """The evidence of the bounds, by the errors [row] of both passes over theirs."""
    n_shared = sum(
        not row.error["prefill"] <= bound and row.error["decode"] > bound
        for row, bound in zip(rows, bounds, strict=True)
    )
    shared = f"; at {n_shared} places prefill is off as well" if n_shared else ""
    off = {side: sum(not row.error[side] <= bound for row, bound in zip(rows, bounds, strict=True)) for side in _SIDES}
    if allowed:
        off = {"prefill": int(np.sum(of_prefill > 1.0)), "decode": len(beyond) - int(np.sum(of_prefill > 1.0))}
    only_one = off["decode"] != off["prefill"] and not n_shared
    side = "prefill" if of_prefill.max() > max(1.0, over.max()) else "decode"
    worst = float(np.max(of_prefill if side == "prefill" else over))
    return Evidence(
        instrument="replay",
        mode=mode,
        statistic_name=STATISTIC,
        statistic=worst,
        bound=1.0,
        supports="H1" if beyond else "H0",
        minimum_detectable=_minimum(rows, bounds, allowed),
        text=f"largest attention error of {side} against float64 on its own operands: {100.0 * worst:.2g} % of what "
        f"{_ALLOWS[bool(allowed)]} can do{shared}",
        detail={
            "n_beyond": len(beyond),
            "n_shared": n_shared,
            **({"guilty": max(_SIDES, key=lambda side: off[side])} if only_one else {}),
        },
    )


def _allowed(rows: Sequence[ReplayRow], noise_of: str) -> dict[int, Sizes]:
    """What a pass may err by in each layer, by what the other one, `noise_of`, errs by there."""
    noise: dict[int, list[Sizes]] = defaultdict(list)
    for row in rows:
        if row.sizes:
            noise[row.layer].append(row.sizes[noise_of])
    return {layer: bound_from(sizes) for layer, sizes in noise.items()}


def _over_of_prefill(rows: Sequence[ReplayRow]) -> NDArray[np.float64]:
    """The errors [row] of prefill over what decode's own errors let them be."""
    allowed = _allowed(rows, "decode")
    return np.array(
        [row.sizes["prefill"].over(allowed[row.layer]).worst if row.sizes else 0.0 for row in rows], dtype=np.float64
    )


def _over(row: ReplayRow, bound: float, allowed: Mapping[int, Sizes]) -> float:
    """The error of decode over its bound: that of rounding, which an error of both passes is beyond too, and the one
    that prefill's own errors set. Replayed from its scores, one pass alone may be off, whichever it is."""
    over = (max(row.error.values()) if row.given is not None else row.error["decode"]) / bound
    if not allowed or not row.sizes:
        return over
    return max(over, row.sizes["decode"].over(allowed[row.layer]).worst)


def _minimum(rows: Sequence[ReplayRow], bounds: Sequence[float], allowed: Mapping[int, Sizes]) -> float | None:
    """The smallest relative error of a context that is beyond its bound for sure, at every row that is not."""
    plain = [bound for row, bound in zip(rows, bounds, strict=True) if not allowed or not row.sizes]
    measured = [
        promised(allowed[row.layer], row.relative)
        for row in rows
        if allowed
        and row.sizes
        and np.isfinite(row.relative)
        and row.sizes["decode"].over(allowed[row.layer]).worst <= 1.0
    ]
    return max([*plain, *measured], default=None)


def bound_of(row: ReplayRow, unit: float) -> float:
    """The mean error over sum |p| |v| that rounding cannot reach at this address."""
    return MOST_ROUNDINGS * unit + row.from_scores
