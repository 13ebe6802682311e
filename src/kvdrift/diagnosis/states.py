"""Explanations of a recurrent state after a step: columns of a window in another order, another decay of what was kept,
another update.

A step of a linear recurrence makes S_t = a S_(t-1) + u w^T in each head: what was kept decays, and the outer product of
two vectors is written. So a wrong update is an error of rank one in each head, and a wrong decay one that has a part
along the state before.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvdrift.diagnosis.model import EXACT, GENERAL, NAMED, Candidate, Floats, Suspect, share
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import Site

# Of a smaller matrix any error has nearly rank one.
_FEWEST = 4
# Both vectors of what is written may be others: the error then has rank two, in a matrix that is larger.
_FEWEST_OF_TWO = 8
_LESS = 1e-6  # by which more that is fitted must explain more


def explain_state(suspect: Suspect) -> Iterator[Candidate]:
    """Yield what may have happened to the recurrent state at the first failing site."""
    site, position = suspect.address.site, suspect.address.position
    right, wrong = suspect.prefill.at(site, position), suspect.decode.at(site, position)
    if right is None or wrong is None or right.shape != wrong.shape or not np.isfinite(right - wrong).all():
        return
    if site is Site.CONV_STATE:
        yield from _columns(suspect, right, wrong)
    elif right.ndim >= 2 and site is Site.SSM_STATE:
        yield from _heads(right, wrong)
        yield from _recurrence(suspect, right, wrong)


def _columns(suspect: Suspect, right: Floats, wrong: Floats) -> Iterator[Candidate]:
    """Each column of a window [channel, column] is one of prefill's, or of a window before."""
    if right.ndim != 2:
        return
    windows = [right]
    for at in range(suspect.address.position - 1, suspect.address.position - 3, -1):
        for values in (suspect.prefill, suspect.decode):
            before = values.at(suspect.address.site, at)
            if before is not None and before.shape == right.shape and np.isfinite(before).all():
                windows.append(before)
    known = np.concatenate(windows, axis=1)
    gaps = ((wrong[:, :, None] - known[:, None, :]) ** 2).sum(axis=0)
    nearest = gaps.argmin(axis=1)
    order = [int(n) if n < right.shape[1] else -1 for n in nearest]
    if order == list(range(right.shape[1])):
        return
    words = ", ".join("an older one" if n < 0 else str(n) for n in order)
    text = f"the columns of decode's window are those of prefill in the order {words}"
    yield Candidate(share(right, wrong, known[:, nearest]), Cause.CONV_STATE_ORDER, text, EXACT)


def _heads(right: Floats, wrong: Floats) -> Iterator[Candidate]:
    """The heads of a state [head, ...] are in another order."""
    heads = len(right)
    if right.ndim < 3 or heads < 2:
        return
    flat, wanted = right.reshape(heads, -1), wrong.reshape(heads, -1)
    order = ((wanted[:, None] - flat[None]) ** 2).sum(axis=2).argmin(axis=1)
    if (order != np.arange(heads)).any() and len(set(order.tolist())) == heads:
        text = f"decode has the heads of its state in the order {order.tolist()}"
        yield Candidate(share(right, wrong, right[order]), Cause.BLOCKS_PERMUTED, text, EXACT)


def _recurrence(suspect: Suspect, right: Floats, wrong: Floats) -> Iterator[Candidate]:
    """The error is of rank one in each head, or is once a multiple of the state before is taken off."""
    matrices = right.shape[-2:]
    if min(matrices) < _FEWEST:
        return
    error = (wrong - right).reshape(-1, *matrices)
    for rank in (1, 2) if min(matrices) >= _FEWEST_OF_TWO else (1,):
        text = f"what this step writes into the state is another outer product: the error has rank {rank} in every head"
        predicted = right + _first_ranks(error, rank).reshape(right.shape)
        yield Candidate(share(right, wrong, predicted) - _LESS * rank, Cause.SSM_STATE_UPDATE, text, GENERAL)
    before = suspect.decode.at(suspect.address.site, suspect.address.position - 1)
    if before is None or before.shape != right.shape or not np.isfinite(before).all():
        return
    kept = before.reshape(-1, *matrices)
    along = np.array([_multiple(e, k) for e, k in zip(error, kept, strict=True)])
    part = along[:, None, None] * kept
    text = f"decode keeps {along.min():+.4g} to {along.max():+.4g} times more of the state before: its decay is another"
    only = (right.reshape(kept.shape) + part).reshape(right.shape)
    yield Candidate(share(right, wrong, only), Cause.SSM_STATE_DECAY, text, NAMED)
    predicted = (right.reshape(kept.shape) + part + _first_ranks(error - part, 1)).reshape(right.shape)
    text += ", and so is what it writes"
    yield Candidate(share(right, wrong, predicted) - 3.0 * _LESS, Cause.SSM_STATE_DECAY, text, GENERAL)


def _first_ranks(matrices: Floats, rank: int) -> Floats:
    """The nearest matrices [head, row, column] of a rank."""
    left, sizes, right = np.linalg.svd(matrices, full_matrices=False)
    return np.asarray((left[:, :, :rank] * sizes[:, None, :rank]) @ right[:, :rank])


def _multiple(error: Floats, kept: Floats) -> float:
    """The multiple of a matrix that, taken off an error, leaves the least beside its first rank: by the second singular
    value of what lies across the two singular vectors of the error."""
    if not kept.any() or not error.any():
        return 0.0
    best = float((error * kept).sum() / (kept**2).sum())
    for _ in range(_ROUNDS):
        rest = error - best * kept
        rank_one = _first_ranks(rest[None], 1)[0]
        best = float(((error - rank_one) * kept).sum() / (kept**2).sum())
    return best


# The multiple and the outer product are fitted in turn, so often.
_ROUNDS = 200
