"""What a pass computed, by place and position: float64 rows, and the rows that each attention call read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvdrift.trace.model import Array, Trace
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.facts import AttentionSpec
from kvdrift.vocabulary.sites import ATTENTION_ROW_SITES, CACHE_SITES, STATE_SITES, Site

Floats = NDArray[np.float64]

# Rows of keys and of scores are compared as what they are made of; a recurrent state exists at the end of a call alone.
_LEFT_OUT = ATTENTION_ROW_SITES | STATE_SITES


@dataclass(slots=True)
class PassValues:
    """One pass over one prompt.

    Attributes:
        rows: by place and position, [feature]; for a cache site [slot, kv head, dim], ascending
            slots that the token sees.
        attention: how each layer attends, as it was called.
        heads: by layer, (kv heads, dim) of the cache.
        products: by place, module and largest error over the spread of the terms, of products that were also computed
            exactly; the exact results have the rounding of float32.
    """

    rows: dict[Place, dict[int, Floats]] = field(default_factory=dict)
    attention: dict[int, AttentionSpec] = field(default_factory=dict)
    heads: dict[int, tuple[int, int]] = field(default_factory=dict)
    products: dict[Place, tuple[str, float]] = field(default_factory=dict)


@dataclass(slots=True)
class PromptPasses:
    """Everything recorded of one prompt in one engine.

    Attributes:
        prefill, decode: the clean passes; `decode` has no rows where an engine cannot run it.
        changed: for each pass, the passes on inputs that were changed up and down; None where it was not measured.
    """

    tokens: tuple[int, ...]
    probed: tuple[int, ...]
    prefill: PassValues
    decode: PassValues
    changed: Mapping[str, tuple[PassValues, PassValues]] | None = None


def values_of(trace: Trace) -> PassValues:
    """Return what a trace holds, in float64; a later record of an address takes the place of an earlier one."""
    found = PassValues(attention=dict(trace.attention))
    for record in trace.rows:
        if record.site in _LEFT_OUT or record.site in CACHE_SITES:
            continue
        rows = found.rows.setdefault(Place(record.layer, record.site), {})
        for position, value in zip(record.positions, record.values, strict=True):
            rows[position] = np.asarray(value, dtype=np.float64).reshape(-1)
    for item, values, reference, spread in trace.exact_products():
        place = Place(item.layer, item.site)
        error = _product_error(values, reference, spread)
        if error.size and (found.products.get(place, ("", -1.0))[1] < (worst := float(error.max()))):
            found.products[place] = (item.name, worst)
    for read in trace.cache_reads():
        found.heads[read.layer] = (int(read.rows.shape[1]), int(read.rows.shape[2]))
        rows = found.rows.setdefault(Place(read.layer, read.site), {})
        spec = trace.attention.get(read.layer)
        window = None if spec is None else spec.window
        order = np.argsort(read.slots, kind="stable")
        slots = read.slots[order]
        for position in read.positions:
            # A cache with a window lets go of rows that prefill still shows, and that no query sees.
            first = 0 if window is None else max(0, position + 1 - window)
            seen = order[(slots >= first) & (slots <= position)]
            rows[position] = np.asarray(read.rows[seen], dtype=np.float64)
    return found


def _product_error(values: Array, reference: Array, spread: Array) -> Floats:
    """Return how far each result of a product is from the exact one, over the spread of its terms; 0 where both are
    zero, infinite where a result is not finite alone or all its terms are zero."""
    exact = reference.astype(np.float64)
    size = np.maximum(spread.astype(np.float64), np.abs(exact))
    with np.errstate(invalid="ignore", divide="ignore"):
        away = np.abs(values.astype(np.float64) - exact)
        error = np.where(away == 0.0, 0.0, away / size)
    found: Floats = np.where(np.isnan(error), np.inf, error)
    return found


def relative(one: Floats, two: Floats) -> float:
    """Return |two - one| / |one| in the 2-norm: 0 if both are zero, infinite where one side is not finite alone.

    Values of different shape are infinitely far apart: one side read rows that the other did not.
    """
    if one.shape != two.shape:
        return float("inf")
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        same = (one == two) | (np.isnan(one) & np.isnan(two))
        moved = np.linalg.norm(np.where(same, 0.0, two - one))
        size = np.linalg.norm(np.where(np.isfinite(one), one, 0.0))
    if not np.isfinite(moved):
        return float("inf")
    return 0.0 if moved == 0.0 else float(moved / size) if size else float("inf")


def sites_per_layer(values: PassValues) -> set[Site]:
    """Return the sites that were recorded in any layer, or outside them."""
    return {place.site for place in values.rows}
