"""Explanations of wrong scores, probabilities and contexts, from the operands of attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from kvdrift.diagnosis.model import Bools, Candidate, Floats, Suspect, Values, share
from kvdrift.replay.attention import Operands, attend
from kvdrift.replay.causes import ATTENTION_CAUSES
from kvdrift.sites import Site
from kvdrift.trace.model import Slots


def explain_attention(suspect: Suspect) -> Iterator[Candidate]:
    """Yield what could have happened between the operands of attention and its output."""
    site = suspect.address.site
    if site in (Site.ATTN_SCORES, Site.ATTN_PROBS):
        yield from _visibility(suspect)
        yield from _score_values(suspect)
    if site in (Site.ATTN_PROBS, Site.ATTN_CTX):
        yield from _replayed(suspect)


def operands_of(suspect: Suspect, values: Values) -> Operands | None:
    """Return what a pass attended with, None if it was not captured."""
    position = suspect.address.position
    query, spec = values.at(Site.Q_ROPE, position), suspect.spec
    keys, rows = (values.reads.get((site, position)) for site in (Site.K_CACHE, Site.V_CACHE))
    if query is None or spec is None or keys is None or rows is None or query.size % keys.rows.shape[2]:
        return None
    if not np.array_equal(keys.slots, rows.slots):
        return None
    return Operands(
        query.reshape(-1, keys.rows.shape[2]),
        keys.rows.astype(np.float64),
        rows.rows.astype(np.float64),
        keys.slots,
        position,
        spec,
    )


def _dense(suspect: Suspect, values: Values, site: Site, n_keys: int) -> Floats | None:
    """[head, key] with masked keys at -inf (scores) or 0 (probabilities)."""
    position = suspect.address.position
    row, slots = values.at(site, position), values.slots.get((site, position))
    if row is None or slots is None:
        return None
    full = np.full((row.shape[0], n_keys), -np.inf if site is Site.ATTN_SCORES else 0.0)
    inside = slots < n_keys
    full[:, slots[inside]] = row[:, inside]
    return full


def _both(suspect: Suspect, site: Site) -> tuple[Floats, Floats] | None:
    n_keys = suspect.address.position + 1
    rows = [_dense(suspect, values, site, n_keys) for values in (suspect.prefill, suspect.decode)]
    if rows[0] is None or rows[1] is None or rows[0].shape != rows[1].shape:
        return None
    return rows[0], rows[1]


def _visibility(suspect: Suspect) -> Iterator[Candidate]:
    """Keys that one pass attends to and the other does not."""
    rows = _both(suspect, Site.ATTN_SCORES)
    if rows is None:
        return
    seen = [~np.isneginf(row).all(axis=0) for row in rows]
    lost, gained = np.flatnonzero(seen[0] & ~seen[1]), np.flatnonzero(seen[1] & ~seen[0])
    first, position = int(np.flatnonzero(seen[0])[0]) if seen[0].any() else 0, suspect.address.position
    window = suspect.spec.window if suspect.spec is not None else None
    if len(lost) and not len(gained):
        yield Candidate(1.0, *_lost_keys(rows, lost, first, position, window))
    elif len(gained) and not len(lost):
        cause = "window_too_long" if window is not None and gained.max() < first else "mask_leak"
        yield Candidate(1.0, cause, f"decode attends to the keys {gained.tolist()}, which prefill does not see")


def _lost_keys(
    rows: tuple[Floats, Floats], lost: Slots, first: int, position: int, window: int | None
) -> tuple[str, str]:
    """Name the keys that decode lost. A key that is cut out moves those after it one column down, so that the last
    column seems to be the missing one: where the columns begin to disagree is where it was."""
    if list(lost) == [position]:
        moved = [
            cut
            for cut in range(first, position)
            if np.allclose(rows[0][:, cut + 1 :], rows[1][:, cut:position], rtol=1e-6, atol=1e-9)
            and np.allclose(rows[0][:, first:cut], rows[1][:, first:cut], rtol=1e-6, atol=1e-9)
        ]
        lost = np.array(moved[:1] or lost)
    if list(lost) == list(range(first, first + len(lost))):
        cause = "window_too_short" if window is not None and first > 0 else "key_lost_first"
        return cause, f"decode does not attend to the first {len(lost)} of the keys that prefill attends to"
    if list(lost) == [position]:
        return "key_lost_last", f"decode does not attend to its own token, key {position}"
    if lost[-1] == position and len(lost) == lost[-1] - lost[0] + 1:
        cause = "mask_top_left" if lost[0] == first + 1 else "key_tile_lost"
        return cause, f"decode does not attend to the last {len(lost)} keys, {lost[0]} to {position}"
    return "key_lost_middle", f"decode does not attend to the keys {lost.tolist()}"


def _score_values(suspect: Suspect) -> Iterator[Candidate]:
    rows = _both(suspect, Site.ATTN_SCORES)
    if rows is None or (np.isneginf(rows[0]) != np.isneginf(rows[1])).any():
        return
    visible = ~np.isneginf(rows[0])
    prefill, decode = rows[0][visible], rows[1][visible]
    norm = float(prefill @ prefill)
    factor = float(prefill @ decode) / norm if norm else 1.0
    yield Candidate(
        share(prefill, decode, factor * prefill), "score_scale", f"decode scales its scores by {factor:.7g}"
    )
    yield from _per_head_factor(rows, visible)
    yield from _bias(rows, visible, suspect.address.position)
    operands = operands_of(suspect, suspect.decode)
    if operands is None:
        return
    spec = operands.attention
    if spec.softcap is not None:
        raw = attend(operands.changed(attention=replace(spec, softcap=None))).raw
        yield from _predicted(
            suspect, rows, visible, operands, raw, "softcap_missing", "decode does not cap its scores"
        )
    yield from _heads(suspect, rows, visible, operands)
    for shift, word in ((1, "before"), (-1, "after")):
        moved = operands.changed(keys=np.roll(operands.keys, shift, axis=0))
        raw = _capped(attend(moved).raw, spec.softcap)
        text = f"decode reads the key of the slot {word} in the place of each"
        yield from _predicted(suspect, rows, visible, operands, raw, "keys_shifted", text)


def _per_head_factor(rows: tuple[Floats, Floats], visible: Bools) -> Iterator[Candidate]:
    """Some heads are scaled, others are not."""
    first, second = (np.where(visible, row, 0.0) for row in rows)
    norms = (first**2).sum(axis=1)
    factors = np.divide((first * second).sum(axis=1), norms, out=np.ones_like(norms), where=norms > 0.0)
    wrong = np.flatnonzero(np.abs(factors - 1.0) > 1e-9)
    if 0 < len(wrong) < len(factors):
        yield Candidate(
            share(first, second, factors[:, None] * first) - 1e-9,
            "score_scale_head",
            f"decode scales the scores of the heads {wrong.tolist()} by {factors[wrong[0]]:.7g}",
        )


def _bias(rows: tuple[Floats, Floats], visible: Bools, position: int) -> Iterator[Candidate]:
    """A bias that grows with the distance of the key, as ALiBi does (Press et al. 2022), is missing or another."""
    distance = position - np.arange(rows[0].shape[1], dtype=np.float64)
    with np.errstate(invalid="ignore"):
        change = np.where(visible, rows[1] - rows[0], 0.0)
    weights = np.where(visible, distance[None], 0.0)
    n = visible.sum(axis=1).clip(min=1)
    centre, mean = weights.sum(axis=1) / n, change.sum(axis=1) / n
    spread = np.where(visible, distance[None] - centre[:, None], 0.0)
    denominator = (spread**2).sum(axis=1)
    slope = np.divide((spread * change).sum(axis=1), denominator, out=np.zeros_like(mean), where=denominator > 0.0)
    predicted = np.where(visible, mean[:, None] + slope[:, None] * spread, 0.0)
    if visible.sum(axis=1).min() > 3 and float(np.abs(slope).max()) > 1e-9:
        first = np.where(visible, rows[0], 0.0)
        yield Candidate(
            share(first, first + change, first + predicted) - 1e-6,
            "alibi_wrong",
            f"decode's scores differ by a bias linear in the distance, slope {slope[0]:.4g} in head 0",
        )


def _heads(suspect: Suspect, rows: tuple[Floats, Floats], visible: Bools, operands: Operands) -> Iterator[Candidate]:
    """Which kv head each query head reads, found from the scores themselves."""
    heads, kv_heads = operands.query.shape[0], operands.keys.shape[1]
    if kv_heads < 2:
        return
    scores = operands.attention.scale * np.einsum("hd,sgd->hgs", operands.query, operands.keys)
    scores = _capped(scores, operands.attention.softcap)
    wanted = rows[1][:, operands.slots]
    seen = visible[:, operands.slots]
    gaps = np.where(seen[:, None], wanted[:, None] - scores, 0.0)
    mapping = np.argmin((gaps**2).sum(axis=2), axis=1)
    right = np.arange(heads) // (heads // kv_heads)
    if np.array_equal(mapping, right):
        return
    raw = scores[np.arange(heads), mapping]
    tiled = np.array_equal(mapping, np.arange(heads) % kv_heads)
    wrong = np.flatnonzero(mapping != right)
    text = (
        "query heads read kv heads by tile instead of by group"
        if tiled
        else (
            f"query head {wrong[0]} reads kv head {mapping[wrong[0]]} instead of {right[wrong[0]]}"
            + (f", and {len(wrong) - 1} others are wrong too" if len(wrong) > 1 else "")
        )
    )
    sizes = [g for g in range(1, 2 * heads) if np.array_equal(mapping, np.minimum(np.arange(heads) // g, kv_heads - 1))]
    if sizes and not tiled and len(wrong) > 1:
        text = f"query heads are mapped as if {sizes[0]} of them shared a kv head instead of {heads // kv_heads}"
    cause = "heads_tiled" if tiled else ("group_size_wrong" if sizes and len(wrong) > 1 else "head_group_wrong")
    yield from _predicted(suspect, rows, visible, operands, raw, cause, text)
    if kv_heads < heads:
        group = heads // kv_heads
        order = [kv + kv_heads * member for kv in range(kv_heads) for member in range(group)]
        permuted = rows[0][order]
        if (np.isneginf(permuted) == np.isneginf(rows[1])).all():
            yield Candidate(
                share(rows[0][visible], rows[1][visible], permuted[visible]),
                "heads_tiled",
                "query heads are in tile order where attention maps them by group",
            )


def _predicted(
    suspect: Suspect,
    rows: tuple[Floats, Floats],
    visible: Bools,
    operands: Operands,
    raw: Floats,
    cause: str,
    text: str,
) -> Iterator[Candidate]:
    predicted = np.full(rows[1].shape, -np.inf)
    predicted[:, operands.slots] = raw
    mask = visible & np.isfinite(predicted)
    if mask.sum() == visible.sum():
        yield Candidate(share(rows[0][visible], rows[1][visible], predicted[visible]), cause, text)


def _capped(raw: Floats, softcap: float | None) -> Floats:
    return raw if softcap is None else softcap * np.tanh(raw / softcap)


def _replayed(suspect: Suspect) -> Iterator[Candidate]:
    """Causes that act inside the attention function: replayed on decode's own operands."""
    operands = operands_of(suspect, suspect.decode)
    if operands is None:
        return
    clean, site, position = attend(operands), suspect.address.site, suspect.address.position
    observed = suspect.decode.at(site, position)
    if observed is None:
        return
    if site is Site.ATTN_PROBS:
        spec = operands.attention
        found = _both(suspect, Site.ATTN_PROBS)
        if spec.sinks is None or found is None:
            return
        for cause, sinks in (
            ("sink_missing", None),
            ("sink_doubled", tuple(s + float(np.log(2.0)) for s in spec.sinks)),
        ):
            predicted = np.zeros_like(found[1])
            predicted[:, operands.slots] = attend(operands.changed(attention=replace(spec, sinks=sinks))).probs
            yield Candidate(share(found[0], found[1], predicted), cause, "decode treats the attention sink differently")
        return
    wrong = observed.reshape(clean.context.shape)
    for known in ATTENTION_CAUSES:
        direction = known.direction(operands, clean)
        if direction is None or not np.any(direction):
            continue
        size = float(np.sum(direction * (wrong - clean.context)) / np.sum(direction**2)) if known.relative else 1.0
        text = known.text + (f" (off by {size:+.4g})" if known.relative else "")
        yield Candidate(share(clean.context, wrong, clean.context + size * direction), known.name, text)
    yield from _merged(operands, clean.context, wrong)


def _merged(operands: Operands, clean: Floats, wrong: Floats) -> Iterator[Candidate]:
    """Partial results of two spans of keys are put together without their weights."""
    for cut in range(1, len(operands.slots)):
        parts = [
            attend(operands.changed(keys=operands.keys[s], values=operands.values[s], slots=operands.slots[s])).context
            for s in (slice(None, cut), slice(cut, None))
        ]
        for weight, word in ((1.0, "added"), (0.5, "averaged")):
            yield Candidate(
                share(clean, wrong, weight * (parts[0] + parts[1])),
                "chunk_merge",
                f"the results of keys 0-{cut - 1} and of the later ones are {word} without their softmax weights",
            )
