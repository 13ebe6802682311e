"""Explanations of a context whose scores are right: spans of keys lost, counted twice or merged wrongly, values of
another head."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvdrift.diagnosis.model import EXACT, Candidate, Floats, share
from kvdrift.replay.attention import Attended, Operands
from kvdrift.vocabulary.causes import Cause

# Spans begin and end at so many keys at most, and partial results meet at so many: at each key where there are fewer,
# else at multiples of a power of two. Spans are tried in pairs of ends, so that their number grows with the square.
MOST_ENDS, MOST_MEETINGS = 64, 2048
_LOG2_E = float(np.log2(np.e))


def cuts_of(n_keys: int, most: int) -> list[int]:
    """Return where keys are cut, 0 and `n_keys` included: at each, or at multiples of the least power of two that
    leaves at most `most` spans between cuts."""
    step = 1
    while n_keys / step > most:
        step *= 2
    return [*range(0, n_keys, step), n_keys]


def explain_splits(operands: Operands, clean: Attended, wrong: Floats) -> Iterator[Candidate]:
    """Yield which span of keys is left out of the result, left out of its numerator alone, or counted twice.

    With p the probabilities, a span S of weight w = sum_S p and of result o = sum_S p v, the context c becomes
    (c - o) / (1 - w), c - o, or (c + o) / (1 + w).
    """
    cuts = cuts_of(clean.probs.shape[1], MOST_ENDS)
    results, weights = (
        np.concatenate([np.zeros_like(part[:, :1]), np.cumsum(part, axis=1)], axis=1)
        for part in _between(cuts, operands, clean)
    )
    best: dict[str, tuple[float, Cause, int, int]] = {}
    for i in range(len(cuts)):
        for j in range(i + 1, len(cuts)):
            if j - i == len(cuts) - 1:
                continue  # all keys are no span
            o, w = results[:, j] - results[:, i], weights[:, j] - weights[:, i]
            left = np.where(w < 1.0 - 1e-12, 1.0 - w, 1.0)
            for form, cause, predicted in (
                ("lost", Cause.SPLIT_LOST, (clean.context - o) / left),
                ("half", Cause.SPLIT_LOST, clean.context - o),
                ("twice", Cause.SPLIT_COUNTED_TWICE, (clean.context + o) / (1.0 + w)),
            ):
                explained = share(clean.context, wrong, predicted)
                if form not in best or best[form][0] < explained:
                    best[form] = explained, cause, i, j
    for form, (explained, cause, i, j) in best.items():
        keys = f"the keys of the slots {operands.slots[cuts[i]]} to {operands.slots[cuts[j] - 1]}"
        text = {
            "lost": f"decode does not merge the result of {keys}",
            "half": f"decode merges the weights of {keys} without their values",
            "twice": f"decode merges {keys} twice",
        }[form]
        yield Candidate(explained, cause, text, EXACT)


def explain_merges(operands: Operands, clean: Attended, wrong: Floats) -> Iterator[Candidate]:
    """Yield with which wrong weights the partial results of two spans of keys are put together, the best of each kind.

    Span i has the result o_i, the largest score m_i and the sum l_i = sum exp(s - m_i); right is
    (o_1 l_1 e^m_1 + o_2 l_2 e^m_2) / (l_1 e^m_1 + l_2 e^m_2). All follow from the probabilities p, which are exp(s)
    times a constant of the head: o_i = sum p v / sum p, and l_i = sum p / max p.
    """
    cuts = cuts_of(clean.probs.shape[1], MOST_MEETINGS)
    if len(cuts) < 3:
        return
    results, weights = _between(cuts, operands, clean)
    peaks = np.maximum.reduceat(clean.probs, cuts[:-1], axis=1)[:, :, None]
    # By cut, what lies before it and what lies behind it; sums from either end, as a difference would cancel.
    sides = [
        [np.cumsum(part, axis=1)[:, :-1] for part in (results, weights)],
        [np.cumsum(part[:, ::-1], axis=1)[:, -2::-1] for part in (results, weights)],
    ]
    tops = np.maximum.accumulate(peaks, axis=1)[:, :-1], np.maximum.accumulate(peaks[:, ::-1], axis=1)[:, -2::-1]
    best: dict[str, tuple[float, int]] = {}
    for at in range(len(cuts) - 2):
        masses = [weight[:, at] for _, weight in sides]
        if not all((mass > 0.0).all() for mass in masses):
            continue  # a span that no query sees, or none with a probability that is not 0
        parts = [result[:, at] / mass for (result, _), mass in zip(sides, masses, strict=True)]
        logs = [np.log(mass) for mass in masses]
        sums = [log - np.log(top[:, at]) for log, top in zip(logs, tops, strict=True)]
        half = np.full_like(masses[0], 0.5)
        for first, second, word in (
            (2.0 * half, 2.0 * half, "added without their softmax weights"),
            (half, half, "averaged without their softmax weights"),
            (*_shares(*sums), "merged without the difference of their largest scores"),
            (*_shares(*(log * _LOG2_E for log in logs)), "merged with log-sums of base 2 taken for natural ones"),
        ):
            explained = share(clean.context, wrong, first * parts[0] + second * parts[1])
            if word not in best or best[word][0] < explained:
                best[word] = explained, cuts[at + 1]
    for word, (explained, cut) in best.items():
        text = f"the results of the first {cut} keys and of the later ones are {word}"
        yield Candidate(explained, Cause.CHUNK_MERGE, text)


def explain_merged_blocks(operands: Operands, clean: Attended, wrong: Floats) -> Iterator[Candidate]:
    """Yield with which wrong weights the results of blocks of keys, of one length that is a power of two but for the
    last, are put together, the best of each kind: as of `explain_merges`, for more than two parts."""
    n_keys = clean.probs.shape[1]
    best: dict[str, tuple[float, int]] = {}
    for size in (2**power for power in range(n_keys.bit_length()) if 2 * 2**power < n_keys):
        cuts = [*range(0, n_keys, size), n_keys]
        results, masses = _between(cuts, operands, clean)
        if not (masses > 0.0).all():
            continue
        parts, logs = results / masses, np.log(masses)
        sums = logs - np.log(np.maximum.reduceat(clean.probs, cuts[:-1], axis=1))[:, :, None]
        equal = np.full_like(masses, 1.0 / (len(cuts) - 1))
        for weights, word in (
            (np.ones_like(masses), "added without their softmax weights"),
            (equal, "averaged without their softmax weights"),
            (_softmax(sums), "merged without the difference of their largest scores"),
            (_softmax(logs * _LOG2_E), "merged with log-sums of base 2 taken for natural ones"),
        ):
            explained = share(clean.context, wrong, (weights * parts).sum(axis=1))
            if word not in best or best[word][0] < explained:
                best[word] = explained, size
    for word, (explained, size) in best.items():
        yield Candidate(explained, Cause.CHUNK_MERGE, f"the results of blocks of {size} keys are {word}")


def _softmax(logs: Floats) -> Floats:
    """Weights [head, part, 1] whose logarithms are given, scaled to a sum of one."""
    weights = np.exp(logs - logs.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _between(cuts: list[int], operands: Operands, clean: Attended) -> tuple[Floats, Floats]:
    """The sums of p v, [head, span, dim], and of p, [head, span, 1], over the keys between cuts."""
    values = operands.values.transpose(1, 0, 2)
    group = clean.probs.shape[0] // values.shape[0]
    weighed = np.repeat(values, group, axis=0)
    weighed *= clean.probs[:, :, None]
    starts = cuts[:-1]
    return np.add.reduceat(weighed, starts, axis=1), np.add.reduceat(clean.probs, starts, axis=1)[:, :, None]


def _shares(first: Floats, second: Floats) -> tuple[Floats, Floats]:
    """The two weights whose logarithms are given, scaled to a sum of one."""
    share_of_first = 1.0 / (1.0 + np.exp(np.clip(second - first, -700.0, 700.0)))
    return share_of_first, 1.0 - share_of_first


def explain_value_heads(operands: Operands, clean: Attended, wrong: Floats) -> Iterator[Candidate]:
    """Yield which kv head's values each query head is given, where its probabilities are right."""
    heads, kv_heads = clean.probs.shape[0], operands.values.shape[1]
    if kv_heads < 2:
        return
    made = np.einsum("hs,sgd->hgd", clean.probs, operands.values)
    mapping = np.argmin(((made - wrong[:, None]) ** 2).sum(axis=2), axis=1)
    right = np.arange(heads) // (heads // kv_heads)
    if np.array_equal(mapping, right):
        return
    tiled = np.array_equal(mapping, np.arange(heads) % kv_heads)
    text = f"query heads weigh the values of the kv heads {mapping.tolist()} instead of {right.tolist()}"
    cause = Cause.HEADS_TILED if tiled else Cause.HEAD_GROUP_WRONG
    yield Candidate(share(clean.context, wrong, made[np.arange(heads), mapping]), cause, text, EXACT)
