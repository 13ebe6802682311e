"""Explanations of wrong scores: their scale, cap, bias and dtype, and which keys and heads they were computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from kvdrift.diagnosis.kernels import explain_other_query, explain_read_scores
from kvdrift.diagnosis.model import EXACT, LEAST_ENOUGH, Bools, Candidate, Floats, Suspect, share
from kvdrift.diagnosis.operands import both_rows, capped, operands_of
from kvdrift.diagnosis.plain import ROUNDED
from kvdrift.diagnosis.reads import explain_frozen_query, explain_query_heads
from kvdrift.replay.attention import Operands, attend
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import Site

_NEWTON_STEPS = 40
# Caps that are tried for one that is not known, by their logarithm.
_CAPS, _CAP_REFINEMENTS = 41, 8
# A fitted cap bends any scores a little; only where it leaves next to nothing does it say something.
_NEARLY_ALL = 0.9
# A head whose factor is off by less than this share of the worst one is off by rounding.
_NEGLIGIBLE = 0.1
# The share of a difference that the operands of decode explain by themselves, from which on it came with them.
_CARRIED = 0.5


def explain_scores(suspect: Suspect) -> Iterator[Candidate]:
    """Yield what may have changed the scores of keys that both passes see."""
    rows = both_rows(suspect, Site.ATTN_SCORES)
    if rows is None or (np.isneginf(rows[0]) != np.isneginf(rows[1])).any():
        return
    visible = ~np.isneginf(rows[0])
    if not visible.any() or not np.isfinite(rows[1][visible]).all():
        return
    operands = operands_of(suspect, suspect.decode)
    softcap = None if operands is None else operands.attention.softcap
    if softcap is None:
        yield from _factors(rows, visible, lambda factor: factor * rows[0])
        yield from _untold_caps(rows, visible)
    yield from _bias(rows, visible, suspect.address.position)
    yield from _added(rows, visible)
    yield from explain_read_scores(suspect, rows, visible)
    yield from explain_frozen_query(suspect)
    if operands is None:
        return
    raw = _placed(operands, attend(operands).raw, rows[0].shape)
    if not np.isfinite(raw[visible]).all():
        return
    if _of(rows, visible, capped(raw, softcap)) > _CARRIED:
        return  # the scores follow from their operands: what is wrong is in those, and any replay would be near
    if softcap is not None:
        yield from _factors(rows, visible, lambda factor: capped(factor * raw, softcap), raw=raw, cap=softcap)
        yield from _caps(rows, visible, raw, softcap)
    yield from _rounded(rows, visible, operands, raw)
    yield from explain_other_query(suspect, operands, rows, visible)
    yield from _heads(rows, visible, operands)
    yield from explain_query_heads(rows, visible, operands)
    yield from _misread(rows, visible, operands)


def _of(rows: tuple[Floats, Floats], visible: Bools, predicted: Floats) -> float:
    return share(rows[0][visible], rows[1][visible], predicted[visible])


def _placed(operands: Operands, scores: Floats, shape: tuple[int, ...]) -> Floats:
    """Scores by slot as scores by key; keys that no slot holds are NaN."""
    full = np.full(shape, np.nan)
    inside = operands.slots < shape[1]
    full[:, operands.slots[inside]] = scores[:, inside]
    return full


def _factors(
    rows: tuple[Floats, Floats],
    visible: Bools,
    predict: Callable[[Floats], Floats],
    *,
    raw: Floats | None = None,
    cap: float | None = None,
) -> Iterator[Candidate]:
    """A factor of all scores, or of those of some heads; under a cap it acts on what is capped."""
    heads = len(rows[0])
    given = np.where(visible, rows[0] if raw is None else raw, 0.0)
    wanted = np.where(visible, rows[1], 0.0)
    one = _fit(given.ravel(), wanted.ravel(), cap)
    each = np.array([_fit(given[head], wanted[head], cap) for head in range(heads)])
    text = f"decode scales its scores by {one:.7g}"
    yield Candidate(_of(rows, visible, predict(np.full((heads, 1), one))), Cause.SCORE_SCALE, text)
    off = np.abs(each - 1.0)
    wrong = np.flatnonzero(off > max(1e-9, _NEGLIGIBLE * off.max()))
    if 0 < len(wrong) < heads:
        text = f"decode scales the scores of the heads {wrong.tolist()} by {each[wrong[0]]:.7g}"
        yield Candidate(_of(rows, visible, predict(each[:, None])), Cause.SCORE_SCALE_HEAD, text)


def _fit(given: Floats, wanted: Floats, cap: float | None) -> float:
    """The factor f for which f * given, capped, comes nearest to `wanted`: least squares, by Gauss and Newton."""
    size = float(given @ given)
    if size == 0.0:
        return 1.0
    if cap is None:
        return float(given @ wanted) / size
    factor = 1.0
    for _ in range(_NEWTON_STEPS):
        at = np.tanh(factor * given / cap)
        slope = given * (1.0 - at**2)
        steep = float(slope @ slope)
        if steep == 0.0:
            break
        factor = max(factor / 4.0, factor + float(slope @ (wanted - cap * at)) / steep)
    return factor


def _caps(rows: tuple[Floats, Floats], visible: Bools, raw: Floats, softcap: float) -> Iterator[Candidate]:
    """No cap at all, or another one."""
    yield Candidate(_of(rows, visible, raw), Cause.SOFTCAP_MISSING, "decode does not cap its scores", EXACT)
    given, wanted = raw[visible], rows[1][visible]
    cap = softcap
    for _ in range(_NEWTON_STEPS):
        ratio = given / cap
        at = np.tanh(ratio)
        slope = at - ratio * (1.0 - at**2)
        steep = float(slope @ slope)
        if steep == 0.0:
            break
        cap = max(cap / 2.0, cap + float(slope @ (wanted - cap * at)) / steep)
    text = f"decode caps its scores at {cap:.6g} instead of {softcap:.6g}"
    yield Candidate(_of(rows, visible, capped(raw, cap)), Cause.SOFTCAP_WRONG, text)


def _untold_caps(rows: tuple[Floats, Floats], visible: Bools) -> Iterator[Candidate]:
    """One pass caps its scores and the other does not, where nothing says that this model has a cap."""
    prefill, decode = rows[0][visible], rows[1][visible]
    largest = max(float(np.abs(prefill).max()), float(np.abs(decode).max()))
    if largest == 0.0:
        return
    for cause, given, wanted, text in (
        (Cause.SOFTCAP_WRONG, prefill, decode, "decode caps its scores at {:.6g}, and prefill does not"),
        (Cause.SOFTCAP_MISSING, decode, prefill, "decode does not cap its scores, which prefill caps at {:.6g}"),
    ):
        low, high = np.log(largest) - 2.0, np.log(largest) + 12.0
        best = low
        for _ in range(_CAP_REFINEMENTS):
            grid = np.linspace(low, high, _CAPS)
            left = [float(((capped(given, float(np.exp(at))) - wanted) ** 2).sum()) for at in grid]
            best, width = float(grid[int(np.argmin(left))]), (high - low) / (_CAPS - 1)
            low, high = best - width, best + width
        cap = float(np.exp(best))
        explained = share(given, wanted, capped(given, cap))
        if explained > _NEARLY_ALL:
            yield Candidate(explained, cause, text.format(cap))


def _rounded(rows: tuple[Floats, Floats], visible: Bools, operands: Operands, raw: Floats) -> Iterator[Candidate]:
    """The product of query and key in a narrower dtype, before or after it is scaled, or both."""
    scale, softcap = operands.attention.scale, operands.attention.softcap
    for name in ("bfloat16", "float16"):

        def cut(values: Floats, dtype: type = ROUNDED[name]) -> Floats:
            with np.errstate(over="ignore", invalid="ignore"):
                return np.asarray(values.astype(dtype).astype(np.float64))

        text = f"decode rounds its scores to {name}"
        for scores in (cut(cut(raw / scale) * scale), cut(raw), cut(raw / scale) * scale):
            for predicted in (capped(scores, softcap), cut(capped(scores, softcap))):
                yield Candidate(_of(rows, visible, predicted), Cause.SCORES_DTYPE, text, EXACT)


def _bias(rows: tuple[Floats, Floats], visible: Bools, position: int) -> Iterator[Candidate]:
    """A bias that grows with the distance of the key, as ALiBi does (Press et al. 2022), is missing or another.

    The slopes of ALiBi follow from the number of heads (section 3 there), so that what became of them is told by
    comparing. A constant that is added to a whole row changes no probability and is left out.
    """
    n_keys = visible.sum(axis=1)
    if n_keys.min() <= 3:
        return
    distance = np.where(visible, (position - np.arange(rows[0].shape[1], dtype=np.float64))[None], 0.0)
    with np.errstate(invalid="ignore"):
        change = np.where(visible, rows[1] - rows[0], 0.0)
    mean = np.where(visible, (change.sum(axis=1) / n_keys)[:, None], 0.0)
    spread = np.where(visible, distance - (distance.sum(axis=1) / n_keys)[:, None], 0.0)
    slope = (spread * change).sum(axis=1) / (spread**2).sum(axis=1)
    centred = share(np.zeros_like(change), change - mean, slope[:, None] * spread)
    explained = min(centred, share(np.zeros_like(change), change, mean + slope[:, None] * spread))
    if float(np.abs(slope).max()) <= 1e-9:
        return
    right = -_alibi_slopes(len(slope))  # the score falls with the distance
    most = int(np.abs(slope).argmax())
    most = 0 if abs(slope[0]) > _NEGLIGIBLE * abs(slope[most]) else most
    text = f"decode's scores differ by a bias linear in the distance, slope {slope[most]:.4g} in head {most}"
    ratio = float(slope @ right) / float(right @ right)
    room = 1e-3 * float(np.abs(slope).max())
    if np.allclose(slope, ratio * right, rtol=0.0, atol=room):
        lost = abs(ratio + 1.0) < 1e-3
        text += ", all of ALiBi" if lost else f", ALiBi times {1.0 + ratio:.4g}"
        yield Candidate(explained, Cause.ALIBI_MISSING if lost else Cause.ALIBI_SCALED, text)
    else:
        of = np.abs(right + slope - right[:, None]).argmin(axis=0)
        if np.allclose(right + slope, right[of], rtol=0.0, atol=room):
            words = f"{text}: heads have the slopes of ALiBi of the heads {of.tolist()}"
            yield Candidate(explained, Cause.ALIBI_SLOPES, words)
    yield Candidate(explained - 1e-6, Cause.ALIBI_WRONG, text)


def _added(rows: tuple[Floats, Floats], visible: Bools) -> Iterator[Candidate]:
    """Numbers are added to the scores of some keys, the same in all heads, as a mask does that is not hiding."""
    seen = visible.all(axis=0)
    heads = len(rows[0])
    if heads < 2 or int(seen.sum()) < 2:
        return
    change = rows[1][:, seen] - rows[0][:, seen]
    # A constant of a whole row changes no probability: what most keys have is that constant.
    change = change - np.median(change, axis=1, keepdims=True)
    added = change.mean(axis=0)
    keys = np.flatnonzero(seen)[np.abs(added) > _NEGLIGIBLE * np.abs(added).max()]
    if not len(keys) or len(keys) > int(seen.sum()) // 2:
        return
    explained = share(np.zeros_like(change), change, np.broadcast_to(added, change.shape))
    text = f"decode adds {added[np.argmax(np.abs(added))]:+.6g} to the scores of the keys {keys.tolist()[:6]}"
    yield Candidate(explained, Cause.SCORE_BIAS, text, EXACT)


def _alibi_slopes(heads: int) -> Floats:
    """2^(-8 h / n) for n heads; where n is not a power of two, those of the next lower one, and every second one of the
    next higher for the rest."""
    power = 2 ** int(np.floor(np.log2(heads)))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4.0 * np.arange(1, 2 * (heads - power) + 1, 2) / power)
    return np.concatenate([slopes, between])


def _heads(rows: tuple[Floats, Floats], visible: Bools, operands: Operands) -> Iterator[Candidate]:
    """Which kv head each query head reads, found from the scores themselves."""
    heads, kv_heads = operands.query.shape[0], operands.keys.shape[1]
    if kv_heads < 2:
        return
    scores = operands.attention.scale * np.einsum("hd,sgd->hgs", operands.query, operands.keys)
    scores = capped(scores, operands.attention.softcap)
    inside = operands.slots < rows[1].shape[1]
    slots = operands.slots[inside]
    seen = visible[:, slots]
    gaps = np.where(seen[:, None], rows[1][:, slots][:, None] - scores[:, :, inside], 0.0)
    mapping = np.argmin((gaps**2).sum(axis=2), axis=1)
    right = np.arange(heads) // (heads // kv_heads)
    if np.array_equal(mapping, right):
        return
    predicted = _placed(operands, scores[np.arange(heads), mapping], rows[1].shape)
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
    cause = (
        Cause.HEADS_TILED if tiled else (Cause.GROUP_SIZE_WRONG if sizes and len(wrong) > 1 else Cause.HEAD_GROUP_WRONG)
    )
    yield Candidate(_of(rows, visible, predicted), cause, text, EXACT)
    group = heads // kv_heads
    if group > 1:
        order = [kv + kv_heads * member for kv in range(kv_heads) for member in range(group)]
        permuted = rows[0][order]
        if (np.isneginf(permuted) == np.isneginf(rows[1])).all():
            text = "query heads are in tile order where attention maps them by group"
            yield Candidate(_of(rows, visible, permuted), Cause.HEADS_TILED, text)


def _misread(rows: tuple[Floats, Floats], visible: Bools, operands: Operands) -> Iterator[Candidate]:
    """Operands in another order: keys of the slot beside, or the query with heads and dims exchanged."""
    softcap = operands.attention.softcap
    for shift, word in ((1, "before"), (-1, "after")):
        moved = attend(operands.changed(keys=np.roll(operands.keys, shift, axis=0))).raw
        predicted = _placed(operands, capped(moved, softcap), rows[1].shape)
        text = f"decode reads the key of the slot {word} in the place of each"
        yield Candidate(_of(rows, visible, predicted), Cause.KEYS_SHIFTED, text, EXACT)
    yield from _parts_of_keys(rows, visible, operands)
    heads, dim = operands.query.shape
    for query in (operands.query.reshape(dim, heads).T, operands.query.T.reshape(heads, dim)):
        plain = msgspec.structs.replace(operands.attention, softcap=None)
        raw = attend(operands.changed(query=np.ascontiguousarray(query), attention=plain)).raw
        predicted = _placed(operands, capped(raw, softcap), rows[1].shape)
        text = "decode reads its query with heads and dims exchanged"
        yield Candidate(_of(rows, visible, predicted), Cause.Q_LAYOUT, text, EXACT)


def _parts_of_keys(rows: tuple[Floats, Floats], visible: Bools, operands: Operands) -> Iterator[Candidate]:
    """Some elements of each key are those of the slot beside, as where rows are loaded by a wider head than they have;
    the key at the end has none beside it and keeps its own."""
    n_keys, _, dim = operands.keys.shape
    for size in (2**power for power in range(dim.bit_length()) if 2**power < dim):
        for end, part in (("last", slice(dim - size, dim)), ("first", slice(size))):
            for shift, word in ((1, "behind"), (-1, "before")):
                keys = operands.keys.copy()
                keys[:, :, part] = operands.keys[np.clip(np.arange(n_keys) + shift, 0, n_keys - 1)][:, :, part]
                raw = attend(operands.changed(keys=keys)).raw
                predicted = _placed(operands, capped(raw, operands.attention.softcap), rows[1].shape)
                if (explained := _of(rows, visible, predicted)) >= LEAST_ENOUGH:
                    text = f"decode reads the {end} {size} elements of each key from the slot {word} it"
                    yield Candidate(explained, Cause.KEYS_SHIFTED, text, EXACT)
