"""Modes that an engine claims, looked for in the tensors: in effect, not in effect, or cannot tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np

from kvdrift.diagnosis.model import Floats
from kvdrift.diagnosis.storage import explain_storage
from kvdrift.errors import UsageError
from kvdrift.replay.quantisation import float8_scale, group_size, quantised_float8, quantised_integers
from kvdrift.trace.model import Array, CacheRead, Trace
from kvdrift.verdict.determinism import Group
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import Site

Answer = Literal["in effect", "not in effect", "cannot tell"]
NAMES = ("batch-invariant", "kv-dtype", "prefix-cache", "static-cache", "attention")
_ALIASES = {
    "fp8": "float8", "float8_e4m3": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2",
    "bf16": "bfloat16", "fp16": "float16", "f16": "float16", "fp32": "float32", "f32": "float32", "fp64": "float64",
}  # fmt: skip
_FLOATS: dict[str, type] = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
}
_BITS = {"int2": 2, "int4": 4, "int8": 8}
_CAUSES = {
    Cause.KV_ROUNDED_BF16: "bfloat16",
    Cause.KV_ROUNDED_FP16: "float16",
    Cause.KV_ROUNDED_FP8: "float8",
    Cause.KV_ROUNDED_INT2: "int2",
    Cause.KV_ROUNDED_INT4: "int4",
    Cause.KV_ROUNDED_INT8: "int8",
}
# The share of the squared difference between rows as written and as read that a format must explain. Scales that the
# engine rounds leave a little of it.
_EXPLAINED = 0.99


@dataclass(frozen=True, slots=True)
class Claim:
    """A mode that an engine is said to be in; `value` is "" for one that has none."""

    name: str
    value: str = ""

    def __str__(self) -> str:
        return self.name if not self.value else f"{self.name}={self.value}"


@dataclass(frozen=True, slots=True)
class Answered:
    """A claim, the answer, and why: one sentence without its full stop."""

    claim: Claim
    answer: Answer
    why: str


def parse_claim(text: str) -> Claim:
    """Return a claim as it is typed, such as "kv-dtype=fp8" or "batch-invariant".

    Raises:
        UsageError: it is not known.
    """
    name, _, value = text.partition("=")
    value = _ALIASES.get(value.lower(), value) if name == "kv-dtype" else value
    if name not in NAMES:
        raise UsageError(f"unknown claim {text!r}; --claim takes {', '.join(NAMES)}")
    if name == "kv-dtype" and value not in (*_FLOATS, *_BITS, "float8"):
        raise UsageError(f"unknown KV dtype {value!r}; --claim kv-dtype= takes float8, {', '.join((*_FLOATS, *_BITS))}")
    if name == "attention" and not value:
        raise UsageError("--claim attention= takes the name of an implementation, such as sdpa or eager")
    if name not in ("kv-dtype", "attention") and value:
        raise UsageError(f"--claim {name} takes no value")
    return Claim(name, value)


def answer(claim: Claim, groups: Sequence[Group], first: Trace, again: Trace, n_steps: int) -> Answered:
    """Answer a claim.

    Args:
        claim: what is claimed.
        groups: what runs in batches showed.
        first: the first run of a text, recorded at every position.
        again: the same text once more, at once behind it.
        n_steps: how many of its last tokens were decoded one by one.
    """
    match claim.name:
        case "batch-invariant":
            found = _batch_invariant(groups)
        case "kv-dtype":
            found = _kv_dtype(claim.value, first, n_steps)
        case "prefix-cache":
            found = _prefix_cache(again, n_steps)
        case "static-cache":
            found = _static_cache(first, n_steps)
        case _:
            found = _attention(claim.value, first)
    return Answered(claim, *found)


def _batch_invariant(groups: Sequence[Group]) -> tuple[Answer, str]:
    batches = [group for group in groups if group.name != "runs"]
    off = next((group for group in batches if group.changed), None)
    if off is not None:
        return "not in effect", off.text
    if not batches or any(group.state != "bit-identical" for group in batches):
        return "cannot tell", next((g.why for g in batches if g.why), None) or "no batch was run"
    return "in effect", f"every row has the bits that it has alone, in {' and '.join(group.name for group in batches)}"


# --------------------------------------------------------------------------------------------------- dtype of the cache


def _kv_dtype(claimed: str, trace: Trace, n_steps: int) -> tuple[Answer, str]:
    """Rows as they were written beside the same rows as a later step reads them, layer by layer."""
    n_seen = 0
    other: dict[str, list[str]] = {}
    undecided = ""
    for layer, site, written, read, dtype in _stored(trace, n_steps):
        n_seen += 1
        seen, held = _held_in(claimed, site, written, read, dtype)
        if seen is False:
            other.setdefault(held, []).append(f"layer {layer} / {site}")
        elif seen is None:
            undecided = held
    if not n_seen:
        return "cannot tell", "no row was recorded both as it is written and as it is read"
    if other:
        held, places = next(iter(other.items()))
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        return "not in effect", f"{held} (at {places[0]}{more}, of {n_seen} looked at)"
    if undecided:
        return "cannot tell", undecided
    return "in effect", f"the rows of {n_seen} caches of K and V read as {claimed} would hold what was written"


def _stored(trace: Trace, n_steps: int) -> Iterator[tuple[int, Site, Floats, Floats, np.dtype[np.generic]]]:
    """Yield layer, cache, rows written and rows read [slot, head, dim], of the last step and rows of earlier calls."""
    last = len(trace.tokens) - 1
    written: dict[tuple[int | None, Site], dict[int, Array]] = {}
    for record in trace.rows:
        if record.site in (Site.K_ROPE, Site.V_PROJ):
            written.setdefault((record.layer, record.site), {}).update(
                zip(record.positions, record.values, strict=True)
            )
    for read in _reads(trace, last):
        source = Site.K_ROPE if read.site is Site.K_CACHE else Site.V_PROJ
        rows = written.get((read.layer, source), {})
        at = [i for i, slot in enumerate(read.slots.tolist()) if slot in rows and slot < len(trace.tokens) - n_steps]
        if not at:
            continue
        shape = read.rows.shape[1:]
        known = [rows[int(read.slots[i])] for i in at]
        if known[0].size == int(np.prod(shape)):
            stack = np.stack([row.reshape(shape) for row in known]).astype(np.float64)
            yield read.layer, read.site, stack, read.rows[at].astype(np.float64), read.rows.dtype


def _reads(trace: Trace, position: int) -> Iterator[CacheRead]:
    yield from (read for read in trace.cache_reads() if position in read.positions)


def _held_in(
    claimed: str, site: Site, written: Floats, read: Floats, dtype: np.dtype[np.generic]
) -> tuple[bool | None, str]:
    """Whether rows read as a cache of the claimed dtype would hold them, None if that cannot be told, and in words what
    they read as."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.array_equal(written, read):
            return _as_written(claimed, written, dtype)
        if any(_share(written, read, predicted) > _EXPLAINED for predicted in _predicted(claimed, written)):
            return True, claimed
    bad = np.flatnonzero((written != read).any(axis=(1, 2)))
    found = max(
        explain_storage(str(site), written, read, bad, dtype.name), key=lambda item: item.explained, default=None
    )
    if found is None or found.explained < _EXPLAINED or found.cause not in _CAUSES:
        return False, "the rows read are neither those written nor those rows in that dtype"
    held = _CAUSES[found.cause]
    return held == claimed, f"the rows read as if stored in {held}"


def _as_written(claimed: str, written: Floats, dtype: np.dtype[np.generic]) -> tuple[bool | None, str]:
    """What rows that read as they were written say of a claimed dtype."""
    names = ["float8_e4m3fn", "float8_e5m2"] if claimed == "float8" else [claimed]
    held = f"the rows read are those written, in {dtype.name}"
    if claimed in _BITS:
        return False, held
    if not any(np.array_equal(written.astype(_FLOATS[name]).astype(np.float64), written) for name in names):
        return False, f"{held}, and {claimed} cannot hold them"
    if dtype.name in names:
        return True, claimed
    return None, f"{held}, which {claimed} would hold just as well"


def _predicted(claimed: str, written: Floats) -> Iterator[Floats]:
    """Rows [slot, head, dim] as a cache of the claimed dtype would hand them back, by the scales that are in use."""
    if claimed in _BITS:
        for size in {group_size(written.shape[2]), 32, written.shape[2]}:
            if written.shape[2] % size == 0:
                yield quantised_integers(written, size, _BITS[claimed]).astype(np.float64)
        return
    for name in ["float8_e4m3fn", "float8_e5m2"] if claimed == "float8" else [claimed]:
        yield written.astype(_FLOATS[name]).astype(np.float64)
        if name == "float8_e4m3fn":
            yield quantised_float8(written, float8_scale(written)).astype(np.float64)
            heads = [quantised_float8(written[:, h], float8_scale(written[:, h])) for h in range(written.shape[1])]
            yield np.stack(heads, axis=1)
            yield np.stack([quantised_float8(row, float8_scale(row)) for row in written])


def _share(right: Floats, wrong: Floats, predicted: Floats) -> float:
    """The share of the squared difference between two arrays that a third explains; 0 where it is not a number."""
    total, left = float(((wrong - right) ** 2).sum()), float(((wrong - predicted) ** 2).sum())
    return 1.0 - left / total if total > 0.0 and np.isfinite(left) else 0.0


# ------------------------------------------------------------------------------------------------------------- others


def _prefix_cache(again: Trace, n_steps: int) -> tuple[Answer, str]:
    """The second run of a text: were its keys computed again?"""
    prompt = set(range(len(again.tokens) - n_steps))
    computed = [
        {position for record in again.rows if record.site is site for position in record.positions} & prompt
        for site in (Site.K_ROPE, Site.K_PROJ, Site.LAYER_IN)
    ]
    known = next((found for found in computed if found), None)
    reads = [read for read in _reads(again, len(again.tokens) - 1) if read.site is Site.K_CACHE]
    if known is None or not reads:
        return "cannot tell", "the keys of the prompt were not recorded"
    if known == prompt:
        return "not in effect", f"a second run of the same text computed the keys of all {len(prompt)} tokens again"
    first = min(prompt - known)
    return (
        "in effect",
        f"a second run computed {len(known)} of {len(prompt)} keys; that of token {first} was read alone",
    )


def _static_cache(trace: Trace, n_steps: int) -> tuple[Answer, str]:
    """How many rows attention reads, from one step to the next."""
    if n_steps < 2:
        return "cannot tell", "it takes two decode steps"
    steps = list(range(len(trace.tokens) - n_steps, len(trace.tokens)))
    counts = [{len(read.slots) for read in _reads(trace, position) if read.site is Site.K_CACHE} for position in steps]
    if not all(counts):
        return "cannot tell", "no read of the cache was recorded"
    largest = [max(found) for found in counts]
    calls = {call.start: call.kv_len for call in trace.calls}
    lengths = [calls.get(position) or largest[i] for i, position in enumerate(steps)]
    if len(set(lengths)) == 1 and lengths[0] > steps[0] + 1:
        return "in effect", f"every step reads {lengths[0]} slots, whatever the length of the text"
    if all(length == position + 1 for length, position in zip(lengths, steps, strict=True)):
        return "not in effect", f"the cache grows with the text: steps read {lengths[0]} to {lengths[-1]} slots"
    return "cannot tell", f"steps read {', '.join(map(str, lengths))} slots"


def _attention(claimed: str, trace: Trace) -> tuple[Answer, str]:
    """Which attention ran, as seen inside the calls."""
    seen = sorted({name for call in trace.calls for name in (call.attention, *call.kernels)} - {"unknown"})
    if not seen:
        return "cannot tell", "no attention call was seen"
    ran = {call.attention for call in trace.calls}
    if all(claimed == call.attention or claimed in call.kernels for call in trace.calls):
        return "in effect", f"every call ran {', '.join(seen)}"
    return "not in effect", f"what ran is {', '.join(seen)}" if "unknown" not in ran else "not every call was seen"
