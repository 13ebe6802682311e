"""Synthetic runs: traces built by hand, with noise of the size that rounding makes and faults where a test wants them.

No engine and no framework is involved. A value at an address is a fixed number; each pass adds noise in proportion to
the unit roundoff of its rung, so that a clean run drifts as rounding does and nothing else.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvdrift.instruments.control import SITES, planted_size
from kvdrift.instruments.ladder import climb
from kvdrift.measure.measured import Measured
from kvdrift.pairing.rows import COLUMNS, DriftRow
from kvdrift.trace.model import Array, PassPair, Trace
from kvdrift.trace.recording import RecordedPair
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.address import Place as At
from kvdrift.vocabulary.facts import Call, EngineFacts, Plant, Prompt
from kvdrift.vocabulary.plan import AuditPlan, Mode, ModeChoice, PairRole
from kvdrift.vocabulary.precision import LOWER, UNIT_ROUNDOFF, UPPER
from kvdrift.vocabulary.sites import AFTER_LAYERS, BEFORE_LAYERS, EXPECTED_SITES, Site, forward_rank

DTYPES: dict[str, np.dtype[np.generic]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
HEADS, DIM, WIDTH = 2, 4, 16
CREATED = "2026-01-02T03:04:05+00:00"
PROMPTS = (("p0_short", 1), ("p6_len_16", 16))

_CACHE = (Site.K_CACHE, Site.V_CACHE)
_SCORED = (Site.ATTN_SCORES, Site.ATTN_PROBS)
_ROW_WISE = (
    Site.EMBED_OUT,
    Site.LAYER_IN,
    Site.ATTN_NORM_OUT,
    Site.Q_NORM,
    Site.K_NORM,
    Site.Q_ROPE,
    Site.K_ROPE,
    Site.RESID_ATTN,
    Site.FFN_NORM_OUT,
    Site.LAYER_OUT,
    Site.FINAL_NORM_OUT,
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value is about to be recorded. `label` is the mode of a decode pass, "control", "full" or another."""

    pass_name: str
    label: str
    rung: str
    prompt: str
    position: int
    layer: int | None
    site: Site


Edit = Callable[[Place, Array], Array | None]  # None: the value is not recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthetic:
    """What a synthetic run is made of.

    Attributes:
        prompts: id and number of tokens of each prompt.
        edits: each sees every value before it is recorded, and may change or drop it.
        after: each sees every finished trace, and may change its calls or its tokens.
        rungs: those that are run; None for the native one and the two of the ladder.
        noise: noise in units of the unit roundoff; 0 makes all bits equal.
        pinned: relative noise that stays in the float64 run, by site.
        extra_sites: recorded beside those of a plain decoder.
        control: whether a fault is planted; `control_edit` changes its values after planting.
    """

    mode: ModeChoice = "both"
    native: str = "bfloat16"
    prompts: Sequence[tuple[str, int]] = PROMPTS
    n_layers: int = 2
    span: int = 2
    edits: Sequence[Edit] = ()
    after: Sequence[Callable[[Trace], None]] = ()
    rungs: Sequence[str] | None = None
    noise: float = 1.0
    pinned: Mapping[Site, float] = field(default_factory=dict)
    extra_sites: Sequence[Site] = ()
    control: bool = True
    control_layer: int = 1
    can_rewind: bool = True
    seed: int = 0
    rung_failures: Mapping[str, str] = field(default_factory=dict)
    command: str | None = "kvdrift audit tiny/synthetic"


def synthetic_run(**options: object) -> Measured:
    """Return the run of a `Synthetic` with these options, captured and ready to be judged."""
    plan = Synthetic(**options)  # type: ignore[arg-type]
    run = Measured(
        AuditPlan(mode=plan.mode, span=plan.span),
        _info(plan),
        [prompt_tokens(name, n, plan.span) for name, n in plan.prompts],
        created=CREATED,
        command=plan.command,
        rung_failures=dict(plan.rung_failures),
    )
    for rung in plan.rungs if plan.rungs is not None else dict.fromkeys([plan.native, LOWER, UPPER]):
        for prompt in run.prompts:
            for item in capture(plan, prompt, run.modes, rung):
                run.add(item)
    if plan.control:
        _add_control(plan, run)
    return run


def prompt_tokens(name: str, n_tokens: int, span: int) -> Prompt:
    """Return a prompt of `n_tokens` token ids that depend on its name."""
    ids = tuple(zlib.crc32(f"{name}/{i}".encode()) % 1000 for i in range(n_tokens + span))
    return Prompt(name, ids[:n_tokens], ids[n_tokens:])


def capture(plan: Synthetic, prompt: Prompt, modes: Sequence[Mode], rung: str) -> list[RecordedPair]:
    """Return all traces of one prompt at one rung."""
    last = len(prompt.prompt) - 1
    prefill = _prefill(plan, prompt, rung, "full", len(prompt.tokens), (last, *prompt.probed))
    items = [
        RecordedPair(PairRole.PAIR, PassPair(mode, prefill, _decode(plan, prompt, rung, str(mode)), prompt.probed))
        for mode in modes
    ]
    alone = _prefill(plan, prompt, rung, "prompt_alone", len(prompt.prompt), (last,))
    return [*items, RecordedPair(PairRole.SELF_NOISE, PassPair(Mode.AS_DESIGNED, prefill, alone, (last,)))]


# ------------------------------------------------------------------------------------------------------------ edits


def touches(
    site: Site | None = None,
    *,
    layer: int | None = None,
    position: int | None = None,
    prompt: str | None = None,
    label: str | None = None,
    rungs: Iterable[str] | None = None,
    pass_name: str | None = "decode",
    control: bool = False,
) -> Callable[[Place], bool]:
    """Return a filter of places; the positive control is left alone unless asked for."""
    wanted = None if rungs is None else set(rungs)

    def matches(place: Place) -> bool:
        return (
            (site is None or place.site is site)
            and (layer is None or place.layer == layer)
            and (position is None or place.position == position)
            and (prompt is None or place.prompt == prompt)
            and (label is None or place.label == label)
            and (wanted is None or place.rung in wanted)
            and (pass_name is None or place.pass_name == pass_name)
            and (control or place.label != "control")
        )

    return matches


def change(matches: Callable[[Place], bool], how: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Edit:
    """Return an edit that computes matching values anew, in float64 and back."""

    def edit(place: Place, values: Array) -> Array | None:
        return how(values.astype(np.float64)).astype(values.dtype) if matches(place) else values

    return edit


def scaled(matches: Callable[[Place], bool], size: float) -> Edit:
    """Return an edit that makes matching values wrong by the relative `size`."""
    return change(matches, lambda values: values * (1.0 + size))


def with_first(matches: Callable[[Place], bool], value: float) -> Edit:
    """Return an edit that writes `value` into the first element of matching values."""

    def how(values: NDArray[np.float64]) -> NDArray[np.float64]:
        values = values.copy()
        values.reshape(-1)[0] = value
        return values

    return change(matches, how)


def dropped(matches: Callable[[Place], bool]) -> Edit:
    """Return an edit that leaves matching values unrecorded."""
    return lambda place, values: None if matches(place) else values


# ---------------------------------------------------------------------------------------------------------- building


def _info(plan: Synthetic) -> EngineFacts:
    return EngineFacts(
        engine="synthetic",
        model="tiny/synthetic",
        model_hash="0" * 64,
        dtype=plan.native,
        device="cpu",
        attention="sdpa",
        cache="dynamic",
        n_layers=plan.n_layers,
        vocab_size=1000,
        max_positions=64,
        parameters=1234,
        can_rewind=plan.can_rewind,
        why_no_rewind=None if plan.can_rewind else "a recurrent state cannot go back",
        versions={"kvdrift": "0.0.0", "numpy": "2.0.0"},
    )


def _places(plan: Synthetic) -> list[tuple[int | None, Site]]:
    sites = (*EXPECTED_SITES, *plan.extra_sites)
    places: list[tuple[int | None, Site]] = []
    for site in sites:
        outside = site in BEFORE_LAYERS | AFTER_LAYERS
        places += [(None, site)] if outside else [(layer, site) for layer in range(plan.n_layers)]
    return sorted(places, key=lambda place: forward_rank(*place))


def _values(plan: Synthetic, place: Place, shape: tuple[int, ...], source: str, at: int) -> Array:
    size = plan.noise * UNIT_ROUNDOFF[place.rung]
    if place.rung == UPPER:
        size = max(size, plan.pinned.get(place.site, 0.0))
    if place.site in _ROW_WISE and place.label == str(Mode.KV_ALIGNED):
        source = "full"  # with aligned inputs, an operation on single rows gives the same bits whatever the batch
    where = (place.prompt, at, place.layer, str(place.site))
    return _noisy(plan.seed, where, shape, source, place.rung, size)


@lru_cache(maxsize=100_000)
def _noisy(
    seed: int, where: tuple[str, int, int | None, str], shape: tuple[int, ...], source: str, rung: str, size: float
) -> Array:
    """The true value at an address, with the noise of the pass named `source` at this rung; read-only."""
    true = _generator(seed, where).normal(size=shape)
    if where[-1] == Site.ATTN_PROBS:
        weights = np.exp(true)
        true = weights / weights.sum(axis=-1, keepdims=True)
    noise = _generator(seed, where, source, rung).normal(size=shape)
    values = np.asarray((true * (1.0 + size * noise)).astype(DTYPES[rung]))
    values.flags.writeable = False
    return values


def _generator(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def _prefill(plan: Synthetic, prompt: Prompt, rung: str, label: str, length: int, probed: tuple[int, ...]) -> Trace:
    trace = Trace(prompt.name, "prefill", label, rung, prompt.tokens[:length])
    trace.calls.append(Call(0, length, 0, length, "sdpa", ("sdpa:math",)))
    for layer, site in _places(plan):
        _record(plan, trace, layer, site, probed, length, label)
    return _finished(plan, trace)


def _decode(plan: Synthetic, prompt: Prompt, rung: str, label: str) -> Trace:
    trace = Trace(prompt.name, "decode", label, rung, prompt.tokens)
    for position in prompt.probed:
        trace.calls.append(Call(position, 1, position, position + 1, "sdpa", ("sdpa:flash",)))
        for layer, site in _places(plan):
            _record(plan, trace, layer, site, (position,), position + 1, label)
    return _finished(plan, trace)


def _finished(plan: Synthetic, trace: Trace) -> Trace:
    trace.release()
    for hook in plan.after:
        hook(trace)
    return trace


def _record(
    plan: Synthetic, trace: Trace, layer: int | None, site: Site, positions: tuple[int, ...], n_keys: int, source: str
) -> None:
    place = Place(trace.pass_name, trace.label, trace.rung, trace.prompt, positions[0], layer, site)
    if site in _CACHE:
        _record_cache(plan, trace, place, positions, n_keys, source)
        return
    kept, rows = [], []
    for position in positions:
        here = Place(trace.pass_name, trace.label, trace.rung, trace.prompt, position, layer, site)
        values: Array | None = _one_row(plan, here, n_keys, source)
        for edit in plan.edits:
            values = None if values is None else edit(here, values)
        if values is not None:
            kept.append(position)
            rows.append(values)
    slots = np.arange(n_keys) if site in _SCORED else None
    if kept:
        trace.add_rows(layer, site, tuple(kept), np.stack(rows), slots)


def _one_row(plan: Synthetic, place: Place, n_keys: int, source: str) -> Array:
    if place.site not in _SCORED:
        return _values(plan, place, (WIDTH,), source, place.position)
    visible = place.position + 1
    values = _values(plan, place, (HEADS, visible), source, place.position)
    absent = -np.inf if place.site is Site.ATTN_SCORES else 0.0
    full = np.full((HEADS, n_keys), absent, dtype=values.dtype)
    full[:, :visible] = values
    return full


def _record_cache(
    plan: Synthetic, trace: Trace, place: Place, positions: tuple[int, ...], n_keys: int, source: str
) -> None:
    assert place.layer is not None
    # Rows that prefill wrote are the same bits in every pass; as_designed computes those of the continuation anew.
    first_decoded = trace.calls[0].start if trace.label == str(Mode.AS_DESIGNED) else n_keys
    rows: Array | None = np.stack(
        [_values(plan, place, (HEADS, DIM), "full" if slot < first_decoded else source, slot) for slot in range(n_keys)]
    )
    for edit in plan.edits:
        rows = None if rows is None else edit(place, rows)
    if rows is not None:
        trace.add_cache_read(place.layer, place.site, positions, np.arange(len(rows)), rows)


def _add_control(plan: Synthetic, run: Measured) -> None:
    mode = Mode.KV_ALIGNED if Mode.KV_ALIGNED in run.modes else Mode.AS_DESIGNED
    bounds = climb(run.table, str(mode), run.info.dtype).bounds
    place = At(plan.control_layer, SITES[0])
    if place not in bounds:
        return
    plant = Plant(plan.control_layer, place.site, 1.0 + planted_size(bounds[place]))
    prompt = run.prompts[0]
    position = prompt.probed[0]
    short = Prompt(prompt.name, prompt.tokens[:position], prompt.tokens[position : position + 1])
    prefill = _prefill(plan, short, UPPER, "control", position + 1, (position,))
    factor = plant.factor - 1.0
    planted = scaled(touches(place.site, layer=place.layer, label="control", control=True), factor)
    planting = Synthetic(**{**_fields(plan), "edits": (planted, *plan.edits)})  # type: ignore[arg-type]
    pair = PassPair(mode, prefill, _decode(planting, short, UPPER, "control"), (position,))
    run.add(RecordedPair(PairRole.CONTROL, pair, plant=plant))


def _fields(plan: Synthetic) -> dict[str, object]:
    return {name: getattr(plan, name) for name in Synthetic.__dataclass_fields__}


# ------------------------------------------------------------------------------------------------------- drift tables


def drift_row(
    mode: str = "kv_aligned",
    rung: str = "float64",
    *,
    address: Address | None = None,
    rel_l2: float = 0.0,
    **changes: object,
) -> DriftRow:
    """Return a row of the drift table, of one healthy pair unless `changes` say otherwise."""
    where = address or Address("p", 3, 0, Site.ATTN_OUT)
    # Columns that no test here is about are those of a pair without a difference.
    nothing: dict[type[np.generic], object] = {np.object_: None, np.void: None, np.bool_: False, np.float64: 0.0}
    figures: dict[str, object] = {name: nothing.get(kind, 0) for name, kind in COLUMNS.items()}
    figures |= {
        "dtype": "",
        "mode": mode,
        "rung": rung,
        "prompt": where.prompt,
        "position": where.position,
        "layer": where.layer,
        "site": where.site,
        "n_elements": WIDTH,
        "equal": rel_l2 == 0.0,
        "max_abs": rel_l2,
        "rel_l2": rel_l2,
        "p99_abs": rel_l2,
        "cosine": 1.0,
        "worst_slot": -1,
    }
    return DriftRow(**{**figures, **changes})  # type: ignore[arg-type]
