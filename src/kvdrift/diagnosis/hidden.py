"""Explanations of a context whose decode kernel shows none of its operands: it is replayed on those of prefill.

That decode attends with the query and the rows that prefill has is what a right decode step does, up to rounding. So a
replay on them with one thing changed predicts its context, and what is wrong with an operand that nobody saw is told
by the context that it makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import msgspec
import numpy as np

from kvdrift.diagnosis.model import EXACT, NAMED, Candidate, Floats, Suspect, share
from kvdrift.diagnosis.operands import operands_of
from kvdrift.replay.attention import Attended, Operands, attend, context_of, visible
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import CACHE_SITES, Site

# Rows that are read for other ones are tried for so many keys at most, and so many lengths of windows and chunks.
_MOST_KEYS = 64
# Prefill's own context must follow from its operands, up to this share of its squares.
_FOLLOWS = 1e-3
# A cap that is tried is this share of the largest score at least, and this many times as large at most.
_LEAST_CAP, _LARGEST_CAP, _CAPS, _REFINEMENTS = 0.05, 20.0, 41, 5


def operands_behind(suspect: Suspect) -> Operands | None:
    """Return what prefill attended with at the first failing position, as `operands_of` gives it, where decode shows
    neither its query nor the rows that it read, or has them in another form, as latent ones; None: decode shows some,
    or prefill's context does not follow from its own."""
    position = suspect.address.position
    shown = suspect.decode.at(Site.Q_ROPE, position) is not None
    reads = [
        [values.reads.get((site, position)) for site in CACHE_SITES] for values in (suspect.prefill, suspect.decode)
    ]
    in_other_form = any(
        a is not None and b is not None and a.rows.shape[1:] != b.rows.shape[1:] for a, b in zip(*reads, strict=True)
    )
    if (shown or any(read is not None for read in reads[1])) and not in_other_form:
        return None
    operands, context = operands_of(suspect, suspect.prefill), suspect.prefill.at(Site.ATTN_CTX, position)
    if operands is None or context is None:
        return None
    operands = _up_to(operands, position)
    found = context_of(operands)
    if found.size != context.size or not np.isfinite(found).all():
        return None
    left = float(((found.ravel() - context.ravel()) ** 2).sum())
    return operands if left <= _FOLLOWS**2 * float((context**2).sum()) else None


def contexts_at_others(suspect: Suspect) -> Iterator[tuple[Operands, Floats]]:
    """Yield what decode attended with, or prefill where decode shows none of it, and decode's context [head, dim] at
    the positions beside the first failing one."""
    for position in suspect.others:
        there = replace(suspect, address=suspect.address._replace(position=position))
        operands = operands_of(there, suspect.decode) or operands_behind(there)
        context = suspect.decode.at(Site.ATTN_CTX, position)
        if operands is None or context is None:
            continue
        heads, dim = operands.query.shape[0], operands.values.shape[2]
        if context.size == heads * dim:
            yield operands, context.reshape(heads, dim)


def _up_to(operands: Operands, position: int) -> Operands:
    """Operands without the rows of later tokens, which prefill has and a decode step has not."""
    inside = operands.slots <= position
    return operands.changed(
        keys=operands.keys[inside], values=operands.values[inside], slots=operands.slots[inside], seen=None
    )


def explain_hidden_operands(
    suspect: Suspect, operands: Operands, clean: Attended, wrong: Floats
) -> Iterator[Candidate]:
    """Yield what the kernel may have attended with instead: rows of other slots, a row before its rotation, the query
    of another head or position, a shorter window, scores under a cap or beside a sink that the model does not have.

    Args:
        suspect: both passes at the layer of the failure.
        operands: those of prefill.
        clean: what follows from them.
        wrong: the context of decode [head, dim].
    """
    yield from _rows_of_other_slots(operands, clean, wrong)
    yield from _before_rotation(suspect, operands, clean, wrong)
    yield from _other_queries(suspect, operands, clean, wrong)
    yield from _heads_moved(operands, clean, wrong)
    yield from _last_keys_alone(operands, clean, wrong)
    yield from _capped(operands, clean, wrong)


def _rows_of_other_slots(operands: Operands, clean: Attended, wrong: Floats) -> Iterator[Candidate]:
    """One slot is read from another one: its key, its value, or both."""
    n_keys = len(operands.slots)
    if not 1 < n_keys <= _MOST_KEYS:
        return
    best: dict[str, tuple[float, int, int]] = {}
    for of in range(n_keys):
        for read in range(n_keys):
            if of == read:
                continue
            order = np.arange(n_keys)
            order[of] = read
            both = operands.changed(keys=operands.keys[order], values=operands.values[order])
            for word, changed in (("row", both), ("key", both.changed(values=operands.values))):
                explained = share(clean.context, wrong, context_of(changed))
                if word not in best or best[word][0] < explained:
                    best[word] = explained, of, read
    for word, (explained, of, read) in best.items():
        text = f"decode reads, for the {word} of slot {operands.slots[of]}, that of slot {operands.slots[read]}"
        yield Candidate(explained, Cause.SLOT_ALIASED, text, EXACT)


def _before_rotation(suspect: Suspect, operands: Operands, clean: Attended, wrong: Floats) -> Iterator[Candidate]:
    """The query, the new key, or both, are those before rotation."""
    position = suspect.address.position
    plain: dict[str, Floats] = {}
    for what, sites in (("query", (Site.Q_NORM, Site.Q_PROJ)), ("key", (Site.K_NORM, Site.K_PROJ))):
        values = next((v for site in sites if (v := suspect.prefill.at(site, position)) is not None), None)
        if values is not None:
            plain[what] = values
    changes: list[tuple[Cause, str, Operands]] = []
    query, key = plain.get("query"), plain.get("key")
    if query is not None and query.size == operands.query.size:
        changed = operands.changed(query=query.reshape(operands.query.shape))
        changes.append((Cause.ROPE_MISSING_ON_Q, "decode does not rotate its query", changed))
    at = np.flatnonzero(operands.slots == position)
    if key is not None and len(at) == 1 and operands.keys[0].size % key.size == 0:
        keys = operands.keys.copy()
        heads = key.reshape(-1, keys.shape[2])
        # Rows may have been repeated for the query heads of a group before they are seen.
        keys[at[0]] = np.repeat(heads, keys.shape[1] // len(heads), axis=0)
        changes.append((Cause.ROPE_MISSING_ON_K, "decode does not rotate its key", operands.changed(keys=keys)))
    for cause, text, changed in changes:
        yield Candidate(share(clean.context, wrong, context_of(changed)), cause, text, EXACT)


def _other_queries(suspect: Suspect, operands: Operands, clean: Attended, wrong: Floats) -> Iterator[Candidate]:
    """The query is that of another position, as of a buffer that was not filled again."""
    for other in suspect.others:
        query = suspect.prefill.at(Site.Q_ROPE, other)
        if query is not None and query.size == operands.query.size:
            predicted = context_of(operands.changed(query=query.reshape(operands.query.shape)))
            text = f"decode attends with the query of position {other}"
            yield Candidate(share(clean.context, wrong, predicted), Cause.VALUE_OF_OTHER_POSITION, text, EXACT)


def _heads_moved(operands: Operands, clean: Attended, wrong: Floats) -> Iterator[Candidate]:
    """Each head attends with the query of another one, or reads the keys, the values or both of another kv head."""
    n_heads, n_kv = operands.query.shape[0], operands.keys.shape[1]
    if n_heads > 1:
        # tried[r] has in each head the context of the query of the head r further on
        tried = np.stack(
            [context_of(operands.changed(query=np.roll(operands.query, -r, axis=0))) for r in range(n_heads)]
        )
        away = _nearest(tried, wrong)
        order = (np.arange(n_heads) + away) % n_heads
        if len(set(order.tolist())) == n_heads and (order != np.arange(n_heads)).any():
            predicted = tried[away, np.arange(n_heads)]
            text = f"decode has its query heads in the order {order.tolist()}"
            yield Candidate(share(clean.context, wrong, predicted), Cause.Q_HEADS_PERMUTED, text, EXACT)
    if n_kv < 2:
        return
    for word, moved in (("keys and values", "kv"), ("keys", "k"), ("values", "v")):
        tried = np.stack(
            [
                context_of(
                    operands.changed(
                        keys=np.roll(operands.keys, -r, axis=1) if "k" in moved else operands.keys,
                        values=np.roll(operands.values, -r, axis=1) if "v" in moved else operands.values,
                    )
                )
                for r in range(n_kv)
            ]
        )
        away = _nearest(tried, wrong)
        group = np.arange(n_heads) // (n_heads // n_kv)
        read = (group + away) % n_kv
        predicted = tried[away, np.arange(n_heads)]
        tiled = np.array_equal(read, np.arange(n_heads) % n_kv)
        cause = Cause.HEADS_TILED if tiled else Cause.HEAD_GROUP_WRONG
        text = f"the heads of decode read the {word} of the kv heads {read.tolist()}"
        if (read != group).any():
            yield Candidate(share(clean.context, wrong, predicted), cause, text, EXACT)


def _nearest(tried: Floats, wrong: Floats) -> np.ndarray[tuple[int, ...], np.dtype[np.intp]]:
    """Of contexts [choice, head, dim], the choice that is nearest to `wrong` in each head."""
    return np.asarray(np.argmin(((tried - wrong[None]) ** 2).sum(axis=2), axis=0), dtype=np.intp)


def _last_keys_alone(operands: Operands, clean: Attended, wrong: Floats) -> Iterator[Candidate]:
    """Decode sees fewer or more of the latest keys than prefill."""
    seen = np.flatnonzero(visible(operands))
    best = (-np.inf, 0)
    for window in range(1, min(len(operands.slots), _MOST_KEYS) + 1):
        if window in (len(seen), len(seen) - 1):
            continue  # one key less has a name in the catalogue
        changed = operands.changed(attention=msgspec.structs.replace(operands.attention, window=window), seen=None)
        best = max(best, (share(clean.context, wrong, context_of(changed)), window))
    if best[1]:
        cause = Cause.WINDOW_TOO_SHORT if best[1] < len(seen) else Cause.WINDOW_TOO_LONG
        text = f"decode attends to the latest {best[1]} keys, and prefill to {len(seen)}"
        yield Candidate(best[0], cause, text, EXACT)


def _capped(operands: Operands, clean: Attended, wrong: Floats) -> Iterator[Candidate]:
    """Scores are capped, cap * tanh(s / cap), where prefill's are not or by another cap; the cap is fitted. Or the sum
    of weights has exp(0) beside it, as that of a sink of zero or of one slot of zeros."""
    top = float(np.abs(clean.raw[:, visible(operands)]).max(initial=0.0))
    if not top > 0.0:
        return

    def at(cap: float) -> Floats:
        return context_of(operands.changed(attention=msgspec.structs.replace(operands.attention, softcap=cap)))

    low, high = np.log(_LEAST_CAP * top), np.log(_LARGEST_CAP * top)
    best, fitted = -np.inf, 0.0
    for _ in range(_REFINEMENTS):
        grid = np.linspace(low, high, _CAPS)
        shares = [share(clean.context, wrong, at(float(np.exp(log_cap)))) for log_cap in grid]
        index = int(np.argmax(shares))
        best, fitted = max((best, fitted), (shares[index], float(np.exp(grid[index]))))
        width = (high - low) / (_CAPS - 1)
        low, high = grid[index] - width, grid[index] + width
    text = f"decode caps its scores at {fitted:.6g}, and prefill does not or elsewhere"
    yield Candidate(best, Cause.SOFTCAP_WRONG, text, NAMED)
    if operands.attention.sinks is None:
        sinks = (0.0,) * len(operands.query)
        changed = operands.changed(attention=msgspec.structs.replace(operands.attention, sinks=sinks))
        text = "the sum of weights has one more term of 1 in it, as of a sink of zero"
        yield Candidate(share(clean.context, wrong, attend(changed).context), Cause.SINK_WRONG, text, EXACT)
