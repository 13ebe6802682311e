"""Explanations of what went wrong between the operands of attention and its output: probabilities and contexts."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from kvdrift.diagnosis.dropped import explain_dropped_weights
from kvdrift.diagnosis.hidden import explain_hidden_operands, operands_behind
from kvdrift.diagnosis.kernels import explain_read_values
from kvdrift.diagnosis.model import EXACT, GENERAL, LEAST_ENOUGH, NAMED, Candidate, Floats, Suspect, share
from kvdrift.diagnosis.operands import both_rows, capped, operands_of
from kvdrift.diagnosis.plain import ROUNDED
from kvdrift.diagnosis.reads import explain_approximated_powers, explain_rounded_values
from kvdrift.diagnosis.scores import explain_scores
from kvdrift.diagnosis.splits import explain_merged_blocks, explain_merges, explain_splits, explain_value_heads
from kvdrift.diagnosis.visibility import explain_visibility
from kvdrift.replay.attention import Attended, Operands, attend, context_of, probabilities_of, rows_per_head
from kvdrift.replay.causes import ATTENTION_CAUSES
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import Site

# Factors of scores that are tried, by their logarithm; smaller ones are found along a straight line.
_LARGEST_FACTOR, _LEAST_FACTOR, _FACTORS, _REFINEMENTS = 4.2, 0.01, 29, 5
# A factor that was fitted to fewer probabilities says nothing.
_FEWEST = 3
_MOST_SPLITS = 64


def explain_attention(suspect: Suspect) -> Iterator[Candidate]:
    """Yield what could have happened between the operands of attention and its output."""
    site = suspect.address.site
    if site in (Site.ATTN_SCORES, Site.ATTN_PROBS):
        hidden = list(explain_visibility(suspect))
        yield from hidden
        if any(candidate.cause == Cause.NOT_CAUSAL for candidate in hidden):
            return  # the rows of prefill have keys that no replay on the keys of decode could have
        yield from _softmax(suspect)
        yield from _sinks(suspect)
    if site is Site.ATTN_SCORES:
        yield from explain_scores(suspect)
    if site is Site.ATTN_CTX:
        yield from _replayed(suspect)


def _softmax(suspect: Suspect) -> Iterator[Candidate]:
    """Softmax of rounded scores, its result rounded too: computed in a narrower dtype than in prefill."""
    rows, scores = both_rows(suspect, Site.ATTN_PROBS), both_rows(suspect, Site.ATTN_SCORES)
    if rows is None or scores is None:
        return
    prefill, decode = rows
    sinks = None if suspect.spec is None else suspect.spec.sinks
    given = scores[0]  # what decode was given to work with; its own scores may carry another fault
    columns = [None, *([np.asarray(sinks)[:, None]] if sinks is not None else [])]
    for column in columns:
        plain = share(prefill, decode, _shares(given, column))
        if plain >= LEAST_ENOUGH:  # whatever it is, it is not the dtype
            if column is None:
                text = "decode's probabilities sum to one, and those of prefill leave a share to a sink"
                yield Candidate(plain, Cause.SINK_MISSING, text, NAMED)
            continue
        for name in ("bfloat16", "float16"):
            cut = given.astype(ROUNDED[name]).astype(np.float64)
            predicted = _shares(cut, column).astype(ROUNDED[name]).astype(np.float64)
            text = f"decode computes its softmax in {name}"
            yield Candidate(share(prefill, decode, predicted), Cause.SOFTMAX_DTYPE, text, EXACT)


def _shares(scores: Floats, column: Floats | None) -> Floats:
    """The softmax of scores [head, key], beside a column of sinks [head, 1] where there is one."""
    found = scores if column is None else np.concatenate([scores, column], axis=1)
    weights = np.exp(found - found.max(axis=1, keepdims=True))
    return np.asarray((weights / weights.sum(axis=1, keepdims=True))[:, : scores.shape[1]])


def _sinks(suspect: Suspect) -> Iterator[Candidate]:
    operands, found = operands_of(suspect, suspect.decode), both_rows(suspect, Site.ATTN_PROBS)
    if operands is None or found is None or operands.attention.sinks is None:
        return
    doubled = tuple(sink + float(np.log(2.0)) for sink in operands.attention.sinks)
    for cause, sinks in ((Cause.SINK_MISSING, None), (Cause.SINK_DOUBLED, doubled)):
        predicted = np.zeros_like(found[1])
        changed = operands.changed(attention=msgspec.structs.replace(operands.attention, sinks=sinks))
        inside = operands.slots <= operands.position
        predicted[:, operands.slots[inside]] = attend(changed).probs[:, inside]
        text = "decode treats the attention sink differently"
        yield Candidate(share(found[0], found[1], predicted), cause, text, EXACT)
    yield from _other_sinks(*found)


def _other_sinks(prefill: Floats, decode: Floats) -> Iterator[Candidate]:
    """The probabilities of each head are off by one factor: what its sink takes is another share."""
    seen = prefill > 0.0
    if (seen.sum(axis=1) < _FEWEST).any():
        return
    factor = (prefill * decode).sum(axis=1, keepdims=True) / (prefill**2).sum(axis=1, keepdims=True)
    if (factor > 0.0).all():
        more = factor - 1.0
        text = (
            "sinks take other shares: what they leave to the keys is multiplied by 1 + x, where x is from "
            f"{more.min():.2g} to {more.max():.2g} from head to head"
        )
        yield Candidate(share(prefill, decode, factor * prefill), Cause.SINK_WRONG, text, GENERAL)


def _replayed(suspect: Suspect) -> Iterator[Candidate]:
    """Causes that act inside the attention function: replayed on decode's own operands, or on those of prefill where a
    kernel shows none."""
    operands = operands_behind(suspect) or operands_of(suspect, suspect.decode)
    observed = suspect.decode.at(Site.ATTN_CTX, suspect.address.position)
    if operands is None or observed is None:
        return
    clean = attend(operands)
    if observed.size != clean.context.size:
        return  # values are expanded behind attention
    wrong = observed.reshape(clean.context.shape)
    if suspect.decode.at(Site.Q_ROPE, suspect.address.position) is None:
        yield from explain_hidden_operands(suspect, operands, clean, wrong)
    for known in ATTENTION_CAUSES:
        direction = known.direction(operands, clean)
        if direction is None or not np.any(direction):
            continue
        size = float(np.sum(direction * (wrong - clean.context)) / np.sum(direction**2)) if known.relative else 1.0
        text = known.text + (f" (off by {size:+.4g})" if known.relative else "")
        rank = NAMED if known.relative else EXACT
        yield Candidate(share(clean.context, wrong, clean.context + size * direction), known.name, text, rank)
        if known.name == Cause.V_SCALE and size < 0.0:
            # What an empty chunk takes away in a merge is missing everywhere in the same proportion.
            text = f"an empty chunk is merged with a weight of {-size:.4g}"
            yield Candidate(share(clean.context, wrong, (1.0 + size) * clean.context), Cause.GHOST_CHUNK, text)
    yield from _rescaled(operands, clean, wrong)
    yield from _many_sinks(operands, clean, wrong)
    yield from _rounded_scores(operands, clean, wrong)
    yield from explain_merges(operands, clean, wrong)
    yield from explain_merged_blocks(operands, clean, wrong)
    yield from explain_splits(operands, clean, wrong)
    yield from explain_read_values(operands, clean, wrong)
    yield from explain_value_heads(operands, clean, wrong)
    yield from explain_dropped_weights(suspect, operands, clean, wrong)
    yield from explain_rounded_values(operands, clean, wrong)
    yield from explain_approximated_powers(suspect, operands, wrong)


def _many_sinks(operands: Operands, clean: Attended, wrong: Floats) -> Iterator[Candidate]:
    """The sink enters the sum of weights once for each split of the keys."""
    if operands.attention.sinks is None:
        return
    for count in range(2, _MOST_SPLITS + 1):
        sinks = tuple(sink + float(np.log(count)) for sink in operands.attention.sinks)
        changed = operands.changed(attention=msgspec.structs.replace(operands.attention, sinks=sinks))
        text = f"the attention sink enters {count} times, as once in each split of the keys"
        yield Candidate(share(clean.context, wrong, context_of(changed)), Cause.SINK_DOUBLED, text, EXACT)


def _rounded_scores(operands: Operands, clean: Attended, wrong: Floats) -> Iterator[Candidate]:
    """Scores are rounded to a narrower dtype inside a kernel that shows neither them nor its probabilities."""
    whole = operands.changed(attention=msgspec.structs.replace(operands.attention, softcap=None))
    for name in ("bfloat16", "float16"):
        with np.errstate(over="ignore", invalid="ignore"):
            cut = capped(clean.raw, operands.attention.softcap).astype(ROUNDED[name]).astype(np.float64)
        probs = probabilities_of(whole, cut)
        for weights in (probs, probs.astype(ROUNDED[name]).astype(np.float64)):
            text = f"decode rounds the scores of its attention to {name}"
            yield Candidate(share(clean.context, wrong, context_of(operands, weights)), Cause.SCORES_DTYPE, text, EXACT)


def _rescaled(operands: Operands, clean: Attended, wrong: Floats) -> Iterator[Candidate]:
    """Scores are multiplied by a factor too large for the straight line that the catalogue follows: by ln 2 where the
    base of softmax is 2."""

    def at(log_factor: float) -> Floats:
        probs = probabilities_of(operands, clean.raw * float(np.exp(log_factor)))
        return np.asarray(np.matmul(probs[:, None], values)[:, 0])

    values = rows_per_head(operands.values, operands)
    low, high, best = -_LARGEST_FACTOR, _LARGEST_FACTOR, 0.0
    for _ in range(_REFINEMENTS):
        grid = np.linspace(low, high, _FACTORS)
        shares = [share(clean.context, wrong, at(float(log_factor))) for log_factor in grid]
        best, width = float(grid[int(np.argmax(shares))]), (high - low) / (_FACTORS - 1)
        low, high = best - width, best + width
    if abs(best) > _LEAST_FACTOR:
        text = f"scores are multiplied by {np.exp(best):.6g} before softmax"
        if abs(best - np.log(np.log(2.0))) < 1e-3:
            text += ", as where its base is 2"
        yield Candidate(share(clean.context, wrong, at(best)), Cause.SCORE_SCALE, text)
