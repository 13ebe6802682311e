"""Whether instruments keep the minima that they state: faults are put into recorded values, and judged again.

The engine runs once for each set of prompts. A fault is added to what one decode pass recorded of a site, in one layer
or in all, at every compared position; the instrument whose minimum it is then judges the same recording as in an
audit. It counts as found if that instrument finds it at that site.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import kvdrift
from kvdrift.instruments.base import Panel
from kvdrift.instruments.ladder import Climb
from kvdrift.instruments.replay import CapturedAttention
from kvdrift.measure.measured import Measured
from kvdrift.pipeline.readers import open_recording
from kvdrift.replay.attention import attend
from kvdrift.replay.causes import ATTENTION_CAUSES
from kvdrift.trace.model import CacheRecord, PassPair, RowRecord, Trace
from kvdrift.trace.recording import RecordedPair, Recording
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.plan import PairRole
from kvdrift.vocabulary.sites import CACHE_SITES, Site
from kvdrift_bench.models.tiny import lively_model
from kvdrift_bench.run.promise_shapes import SHAPES, TIMES, PromiseCell, prompts_of

Floats = NDArray[np.float64]
LAYER, SPAN = 1, 4
# Shapes that are the same at every position.
_ONE_FOR_ALL = ("one element", "one block", "one direction")


@dataclass(frozen=True, slots=True)
class Stated:
    """One instrument in one mode, where its minimum is tried.

    `minimum` reads what the instrument states for a site; None where it states nothing. A fault is put into the pairs
    of the rung `rung`, "native" or "upper".
    """

    instrument: str
    mode: str
    sites: tuple[Site, ...]
    minimum: Callable[[Evidence, Site], float | None]
    rung: str = "native"
    shapes: tuple[str, ...] = tuple(SHAPES)


def _largest(evidence: Evidence, site: Site) -> float | None:
    return evidence.minimum_detectable


def _by_site(evidence: Evidence, site: Site) -> float | None:
    sizes: Any = evidence.detail.get("minimum_by_site", {})
    found = sizes.get(str(site))
    return None if found is None else float(found)


_PRODUCTS = (Site.Q_PROJ, Site.V_PROJ, Site.ATTN_OUT, Site.MLP_OUT, Site.LOGITS)
_LADDER = (Site.Q_ROPE, Site.ATTN_CTX, Site.MLP_OUT, Site.LAYER_OUT, Site.LOGITS)
PROMISES: tuple[Stated, ...] = (
    Stated("ladder", "as_designed", _LADDER, _largest, rung="upper"),
    Stated("ladder", "kv_aligned", _LADDER, _largest, rung="upper"),
    Stated("native", "kv_aligned", (Site.ATTN_NORM_OUT, Site.Q_PROJ, Site.V_PROJ, Site.ATTN_CTX), _by_site),
    Stated("products", "kv_aligned", _PRODUCTS, _by_site),
    Stated("products", "as_designed", _PRODUCTS, _by_site),
    Stated("replay", "kv_aligned", (Site.ATTN_CTX,), _largest),
    Stated("cache", "as_designed", (Site.K_CACHE, Site.V_CACHE), _largest),
    Stated("asymmetry", "kv_aligned", (Site.ATTN_CTX, Site.ATTN_OUT, Site.MLP_OUT), _by_site),
)


def run_recorded(instruments: Sequence[str], draws: int, dtype: str) -> Iterator[PromiseCell]:
    """Try every promise of some instruments, `draws` times each shape, with another fault and other prompts in turn."""
    for promise in PROMISES:
        if promise.instrument in instruments:
            for site in promise.sites:
                for shape in promise.shapes:
                    yield _tried(promise, site, shape, draws, dtype)
    if "directed" in instruments:
        yield from _directed(draws, dtype)


def _tried(promise: Stated, site: Site, shape: str, draws: int, dtype: str) -> PromiseCell:
    found, minimum, tried = 0, 0.0, 0
    for draw in range(draws):
        recording = _recorded(dtype, draw % _SETS)
        stated = promise.minimum(_evidence(recording, promise.instrument, promise.mode), site)
        if stated is None or not np.isfinite(stated):
            continue
        change = _row_change(shape, TIMES * stated, draw)
        # A fault of one prompt is the harder one. Asymmetry counts units, and needs it in all of them.
        prompt = None if promise.instrument == "asymmetry" else draw % len(recording.prompts)
        measured = copy.deepcopy(_without(draw % _SETS, dtype, promise, prompt), _shared(recording))
        for item in recording.pairs():
            if _is_used(item, promise, recording) and _is_of(item, recording, prompt):
                measured.add(_faulty(item, site, change) if _is_meant(item, promise, recording) else item)
        tried, minimum = tried + 1, max(minimum, stated)
        found += _is_found(measured, promise, site)
    place = f"{promise.instrument} {promise.mode}".strip() + f" / {site}"
    return PromiseCell(place, shape, minimum, found, tried)


# ---------------------------------------------------------------------------------------------------------- recordings

_SETS = 4  # sets of prompts: more draws take other faults


@cache
def _recorded(dtype: str, seed: int) -> Recording:
    """A clean audit with the ladder of prompts of their own, in memory."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        kvdrift.audit(
            lively_model("llama", getattr(torch, dtype)), prompts=prompts_of(seed), span=SPAN, ladder="model", out=out
        )
        recording = open_recording(out)
        items = list(recording.pairs())
        recording.close()
    return replace(recording, pairs=lambda: iter(items))


INSTRUMENTS = (*dict.fromkeys(promise.instrument for promise in PROMISES), "directed")


# Whom an instrument asks before it judges.
_ASKED = {"native": ("products", "replay")}


def _measured(recording: Recording, items: Sequence[RecordedPair], instrument: str | None = None) -> Measured:
    """What an audit would measure of some pairs, for one instrument, or for all of them."""
    manifest = recording.manifest
    assert manifest is not None
    measured = Measured(manifest.plan, manifest.engine, list(manifest.prompts), created=manifest.created)
    if instrument is not None:
        wanted = {instrument, *_ASKED.get(instrument, ())}
        measured.instruments = tuple(item for item in measured.instruments if item.name in wanted)
    for item in items:
        measured.add(item)
    return measured


@cache
def _clean(identity: int) -> Measured:
    return _measured(_KNOWN[identity], list(_KNOWN[identity].pairs()))


_KNOWN: dict[int, Recording] = {}


def _evidence(recording: Recording, instrument: str, mode: str) -> Evidence:
    _KNOWN[id(recording)] = recording
    measured = _clean(id(recording))
    seen = Panel(measured, measured.instruments).seen("replay" if instrument == "directed" else instrument, mode)
    return next(item for item in seen.evidence if item.instrument == instrument)


def _is_meant(item: RecordedPair, promise: Stated, recording: Recording) -> bool:
    rungs = {"native": recording.facts.dtype, "upper": recording.facts.ladder.upper}
    is_of_mode = item.pair.mode == promise.mode
    is_pass = item.role in (PairRole.PAIR, PairRole.PERTURBED)
    return is_pass and is_of_mode and item.pair.decode.rung == rungs[promise.rung]


def _is_used(item: RecordedPair, promise: Stated, recording: Recording) -> bool:
    """Whether an instrument looks at a pair: the others cost time alone."""
    if item.role in (PairRole.PERTURBED, PairRole.SPECIFICATION):
        return promise.instrument == ("ladder" if item.role is PairRole.PERTURBED else "asymmetry")
    native = item.pair.decode.rung == recording.facts.dtype
    return item.role is PairRole.PAIR and item.pair.mode == promise.mode and (native or promise.instrument == "ladder")


@cache
def _without(seed: int, dtype: str, promise: Stated, prompt: int | None) -> Measured:
    """What an instrument measures of all prompts but one, None for all of them."""
    recording = _recorded(dtype, seed)
    items = [item for item in recording.pairs() if _is_used(item, promise, recording)]
    return _measured(recording, [i for i in items if not _is_of(i, recording, prompt)], promise.instrument)


def _shared(recording: Recording) -> dict[int, Any]:
    """What a copy shares with its original: recorded passes, which nobody changes, and whose pages have no copy."""
    return {id(trace): trace for item in recording.pairs() for trace in (item.pair.prefill, item.pair.decode)}


def _is_of(item: RecordedPair, recording: Recording, prompt: int | None) -> bool:
    return prompt is None or item.pair.decode.prompt == recording.prompts[prompt].name


def _is_found(measured: Measured, promise: Stated, site: Site) -> bool:
    seen = Panel(measured, measured.instruments).seen(promise.instrument, promise.mode)
    if isinstance(seen.found, Climb):
        beyond = seen.found.excess.where(seen.found.excess.beyond)
        return any(address.site is site for address in beyond.rows.addresses())
    says = any(item.supports == "H1" for item in seen.evidence if item.instrument == promise.instrument)
    places = [*seen.begins, *seen.beyond]
    return says and (not places or any(address.site is site for address in places))


# ------------------------------------------------------------------------------------------------------------- faults

RowChange = Callable[[Floats, Sequence[int]], Floats]


def _row_change(shape: str, size: float, draw: int) -> RowChange:
    """A change of rows [position, ...]: the same at each position wherever it was recorded, since perturbed passes have
    the fault as well."""

    def change(rows: Floats, positions: Sequence[int]) -> Floats:
        found = rows.copy()
        for index, position in enumerate(positions):
            seed = draw if shape in _ONE_FOR_ALL else 1000 * draw + position
            row = torch.from_numpy(rows[index].reshape(1, -1)).double()
            direction = SHAPES[shape](row, torch.Generator().manual_seed(seed)).double()
            found[index] = (row + size * row.norm() * direction).numpy().reshape(rows[index].shape)
        return found

    return change


def _faulty(item: RecordedPair, site: Site, change: RowChange) -> RecordedPair:
    decode = _changed_trace(item.pair.decode, site, change)
    return replace(item, pair=PassPair(item.pair.mode, item.pair.prefill, decode, item.pair.positions))


def _changed_trace(trace: Trace, site: Site, change: RowChange) -> Trace:
    """A copy of a trace whose rows of a site, in one layer or outside the layers, are changed."""
    found = copy.copy(trace)
    if site in CACHE_SITES:
        found.cache = [_with_slot(record, change) if _is_here(record, site) else record for record in trace.cache]
        return found
    found.rows = [
        RowRecord(
            r.layer,
            r.site,
            r.positions,
            _as(change(r.values.astype(np.float64), r.positions), r.values),
            r.slots,
            r.part,
        )
        if _is_here(r, site)
        else r
        for r in trace.rows
    ]
    return found


def _is_here(record: RowRecord | CacheRecord, site: Site) -> bool:
    return record.site is site and record.layer in (None, LAYER)


def _with_slot(record: CacheRecord, change: RowChange) -> CacheRecord:
    """A cache read whose first stored row is changed, in its first head."""
    if not len(record.rows):
        return record
    rows = record.rows.copy()
    rows[:1, 0] = _as(change(rows[:1, 0].astype(np.float64), (0,)), rows)
    return replace(record, rows=rows)


def _as(values: Floats, like: Any) -> Any:
    return values.astype(like.dtype)


# ---------------------------------------------------------------------------------------------------- directed tests


def _directed(draws: int, dtype: str) -> Iterator[PromiseCell]:
    """Causes with a size: the context of every layer moves by what the cause makes of it, rounded once more."""
    for cause in (item for item in ATTENTION_CAUSES if item.relative):
        found, minimum, tried = 0, 0.0, 0
        for draw in range(draws):
            recording = _recorded(dtype, draw % _SETS)
            sizes: Any = _evidence(recording, "directed", "kv_aligned").detail.get("minimum_by_cause", {})
            stated = sizes.get(cause.name)
            if stated is None:
                continue
            size = TIMES * stated * (1.0 if draw % 2 else -1.0)
            items = [_moved(item, recording, cause.direction, size) for item in recording.pairs()]
            measured = _measured(recording, items, "replay")
            seen = Panel(measured, measured.instruments).seen("replay", "kv_aligned")
            tried, minimum = tried + 1, max(minimum, stated)
            found += any(named.cause == cause.name for named in seen.causes)
        yield PromiseCell("directed kv_aligned / attn_ctx", str(cause.name), minimum, found, tried)


def _moved(item: RecordedPair, recording: Recording, direction: Any, size: float) -> RecordedPair:
    """A native aligned pair whose decode contexts are moved along a direction of float64 replay, in every layer."""
    pair = item.pair
    if item.role is not PairRole.PAIR or pair.mode != "kv_aligned" or pair.decode.rung != recording.facts.dtype:
        return item
    captured = CapturedAttention(pair.decode)
    decode = copy.copy(pair.decode)
    decode.rows = [_moved_row(record, captured, pair, direction, size) for record in pair.decode.rows]
    return replace(item, pair=PassPair(pair.mode, pair.prefill, decode, pair.positions))


def _moved_row(record: RowRecord, captured: Any, pair: PassPair, direction: Any, size: float) -> RowRecord:
    if record.site is not Site.ATTN_CTX or record.layer is None:
        return record
    rows = record.values.astype(np.float64)
    for index, position in enumerate(record.positions):
        operands = captured.operands(record.layer, position, pair.prefill.attention[record.layer])
        if isinstance(operands, str):
            continue
        attended = attend(operands)
        along = direction(operands, attended)
        # Made anew and rounded: the recorded context has the clean one's rounding.
        made = attended.context + size * along
        rows[index] = made.reshape(rows[index].shape)
    return replace(record, values=_as(rows, record.values))


__all__ = ["INSTRUMENTS", "PROMISES", "Stated", "run_recorded"]
