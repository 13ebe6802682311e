"""Contexts that parts of 16 bits give are noise, and those that rounded scores give are not, also where both agree."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvdrift.measure.merges import note_merges
from kvdrift.pairing.merges import Merges
from kvdrift.trace.model import PassPair, Trace
from kvdrift.vocabulary.facts import AttentionSpec
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import Site

HEADS, KEYS, DIM, POSITION = 2, 16, 8, 15
DRAW = np.random.default_rng(4)
QUERY, VALUES = DRAW.standard_normal((HEADS, DIM)), DRAW.standard_normal((KEYS, HEADS, DIM))
Floats = NDArray[np.float64]


def cut(numbers: Floats) -> Floats:
    return numbers.astype(ml_dtypes.bfloat16).astype(np.float64)


def weighed(scores: Floats) -> Floats:
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(np.einsum("hs,shd->hd", weights / weights.sum(axis=1, keepdims=True), VALUES))


def trace_of(name: str, keys: Floats, context: Floats) -> Trace:
    trace = Trace("p", "prefill" if name == "prefill" else "decode", name, "float64", tuple(range(KEYS)))
    trace.add_rows(0, Site.Q_ROPE, (POSITION,), QUERY.reshape(1, -1))
    for site, rows in ((Site.K_CACHE, keys), (Site.V_CACHE, VALUES)):
        trace.add_cache_read(0, site, (POSITION,), np.arange(KEYS), rows)
    trace.add_rows(0, Site.ATTN_CTX, (POSITION,), context.reshape(1, -1))
    trace.add_attention(0, AttentionSpec(scale=1.0))
    return trace


def keys_for(scores: Floats) -> Floats:
    """Keys [key, head, dim] whose products with the query are `scores` [head, key]."""
    return np.asarray(scores.T[..., None] * QUERY / (QUERY**2).sum(axis=1)[:, None])


def noise_of(scores: Floats, context: Floats) -> dict[int, float]:
    known, keys = Merges(), keys_for(scores)
    pair = PassPair(
        Mode.KV_ALIGNED, trace_of("prefill", keys, weighed(scores)), trace_of("decode", keys, context), (POSITION,)
    )
    note_merges(known, pair, "bfloat16")
    return dict(known.noise)


def halves(scores: Floats) -> Floats:
    """Attention in two halves whose log-sums have 16 bits."""
    parts = [scores[:, :8], scores[:, 8:]]
    logs = np.stack([np.log(np.exp(part).sum(axis=1)) for part in parts])
    contexts = [
        np.einsum("hs,shd->hd", np.exp(part - log[:, None]), rows)
        for part, log, rows in zip(parts, logs, (VALUES[:8], VALUES[8:]), strict=True)
    ]
    weights = np.exp(cut(logs))
    return np.asarray(
        sum(w[:, None] * c for w, c in zip(weights, contexts, strict=True)) / weights.sum(axis=0)[:, None]
    )


def test_parts_with_log_sums_of_16_bits_are_noise() -> None:
    scores = DRAW.standard_normal((HEADS, KEYS)) + 3.0

    assert set(noise_of(scores, halves(scores))) == {0}


def test_rounded_scores_are_not_where_a_part_has_one_key_with_weight() -> None:
    """The log-sum of such a part is the score of that key."""
    scores = np.full((HEADS, KEYS), -60.0)
    scores[:, 2], scores[:, 11] = (3.1234567, 2.7654321), (2.9876543, 3.3456789)

    assert np.allclose(halves(scores), weighed(cut(scores)), atol=1e-12), "both do the same"
    assert noise_of(scores, weighed(cut(scores))) == {}
