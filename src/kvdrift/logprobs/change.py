"""From which position of a sequence on drift is larger than before, with a kept chance of a false alarm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvdrift.logprobs.dump import Floats

# Neighbours are dependent (an error in the cache stays there), so they are moved in blocks.
BLOCK = 4
_EDGE = 4
_LONGEST = 2048


@dataclass(frozen=True, slots=True)
class Change:
    """Drift of a sequence becomes larger at token `index`; `before` and `after` are its rms, over typical rounding."""

    sequence: int
    index: int
    before: float
    after: float
    p_value: float


def changes(rows: dict[int, Floats], *, seed: int, n_shuffles: int = 1999) -> list[Change]:
    """Return for each sequence the index from which on drift is larger, with its p-value, adjusted for all sequences.

    The statistic is Student's t between the log squares before and after, at the best index. Blocks of BLOCK tokens
    of a sequence are shuffled, all sequences at once, and the largest statistic of a shuffle is compared with each
    (Westfall & Young 1993, max-T). The null is that blocks of a sequence can be exchanged, so a sequence that drifts
    evenly has no change. A sequence of fewer than 4 BLOCK tokens, or with a value that is not finite, is left out.

    Args:
        rows: by sequence, drift over typical rounding [token].
        seed: of the shuffles.
        n_shuffles: how many; the smallest p-value is 1 / (n_shuffles + 1).
    """
    used = {
        key: np.log(np.maximum(row[:_LONGEST] ** 2, 1e-4))
        for key, row in rows.items()
        if row.size >= 4 * BLOCK and np.isfinite(row).all()
    }
    if not used:
        return []
    best = {key: _best(row[None]) for key, row in used.items()}
    rng = np.random.default_rng(seed)
    largest = np.full(n_shuffles, -np.inf)
    for row in used.values():
        n_blocks = row.size // BLOCK
        blocks = row[: n_blocks * BLOCK].reshape(n_blocks, BLOCK)
        for start in range(0, n_shuffles, 256):
            count = min(256, n_shuffles - start)
            order = rng.permuted(np.tile(np.arange(n_blocks), (count, 1)), axis=1)
            found = _best(blocks[order].reshape(count, -1))[0]
            largest[start : start + count] = np.maximum(largest[start : start + count], found)
    result = []
    for key, (statistic, index) in best.items():
        p = (1 + int((largest >= statistic[0]).sum())) / (n_shuffles + 1)
        at, row = int(index[0]), rows[key]
        result.append(
            Change(key, at, float(np.sqrt(np.mean(row[:at] ** 2))), float(np.sqrt(np.mean(row[at:] ** 2))), p)
        )
    return result


def _best(rows: Floats) -> tuple[Floats, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Return the largest t of each of `rows` [row, token] over all splits, and the split."""
    n = rows.shape[1]
    places = np.arange(_EDGE, n - _EDGE + 1)
    total = np.cumsum(rows, axis=1)
    before = total[:, places - 1] / places
    after = (total[:, -1:] - total[:, places - 1]) / (n - places)
    gain = np.sqrt(places * (n - places) / n) * (after - before)
    # The variance within both sides, not of the whole: a clear step would hide itself.
    within = (rows**2).sum(axis=1, keepdims=True) - places * before**2 - (n - places) * after**2
    t = gain / np.sqrt(np.maximum(within, 1e-12) / (n - 2))
    index = np.argmax(t, axis=1)
    return t[np.arange(len(rows)), index], places[index]
