"""What an engine of a caller's own turns out to do in a few short calls: its layers, sites and dtype, and whether it
goes on with what `see` returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from kvdrift.engines.own.watched import Key, WatchedCall
from kvdrift.errors import UsageError
from kvdrift.trace.model import Array, Trace
from kvdrift.vocabulary.facts import Plant
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF
from kvdrift.vocabulary.sites import Site

# Tokens of a short call: a number that no other axis is likely to have.
_TOKENS = (1, 2, 3, 4, 5)
# Where the positive control may be planted.
_PLANTED = (
    Site.Q_ROPE,
    Site.ATTN_OUT,
    Site.LAYER_OUT,
    Site.ATTN_NORM_OUT,
    Site.K_CACHE,
    Site.V_CACHE,
    Site.MLP_OUT,
)
# What an engine may be able to do beside `extend`, and what is not known of one that cannot.
COSTS: Mapping[str, str] = {
    "rewind": "kv_aligned is not run, so that a fault of the cache and one of the computation cannot be told apart",
    "cast": "no finer precision is run, so that nothing tells rounding from a fault by its size; without equal bits, "
    "float32 stays INCONCLUSIVE",
    "weights": "the model has no hash, and nothing says that its weights are finite or were left as they are",
    "see": "nothing but the logits is compared, so that no verdict is reached and no fault has an address",
    "inputs": "layer inputs are not replaced: layers are not isolated, and noise is stated and not measured",
    "plants": "the positive control is planted in what was recorded there, and not in what the engine computes",
    "attends": "attention is not computed again from what it read",
}

# Values that have another input differ by more than this, relative, and those of the same one by less.
_SAME = 1e-2


class Written(Protocol):
    """What a caller wrote, as far as it is run: `kvdrift.Engine`, which says what each method does."""

    name: str | None
    dtype: str | None
    max_length: int | None
    versions: Mapping[str, str]
    _seen: WatchedCall | None

    def extend(self, tokens: list[int], cache: Any, start: int) -> Any: ...

    def new_cache(self, max_length: int) -> Any: ...

    def rewind(self, cache: Any, length: int) -> Any: ...

    def copy(self, cache: Any) -> Any: ...

    def cast(self, dtype: str) -> None: ...

    def weights(self) -> Mapping[str, Any]: ...

    def record(self) -> Mapping[tuple[int | None, str], Any]: ...

    def can(self, ability: str) -> bool: ...


class Runs(Protocol):
    """As much of an open engine as short calls need."""

    given: Written
    name: str

    def watch(self, tokens: tuple[int, ...], cache: object, seen: WatchedCall) -> tuple[Array, object]: ...

    def new_cache(self, max_length: int) -> object: ...


@dataclass(slots=True)
class Abilities:
    """What was found.

    Attributes:
        isolates: whether each layer computes from the input that is put in its place, and from nothing else below.
        why_not_isolated: why not, in words.
        unused: sites at which the engine does not go on with what `see` returns.
        attends: whether it says how it attends.
    """

    n_layers: int
    vocab_size: int
    dtype: str
    places: frozenset[Key]
    isolates: bool = False
    why_not_isolated: str = ""
    unused: set[Site] = field(default_factory=set)
    attends: bool = False


def find_abilities(engine: Runs) -> Abilities:
    """Run a few short calls, and return what they show.

    Raises:
        UsageError: what `extend` returns or hands over has not the shape that it must have.
        CaptureError: it failed, or gives other values the second time.
    """
    seen, trace, logits = _call(engine)
    if len(logits) != len(_TOKENS):
        raise UsageError(
            f"extend returned the logits of {len(logits)} of {len(_TOKENS)} tokens; prefill is compared at every "
            "token, so it must return those of all"
        )
    layers = {layer for layer, _ in seen.found if layer is not None}
    n_layers = max(layers, default=0) + 1
    if gaps := sorted(set(range(n_layers)) - layers) if layers else []:
        raise UsageError(f"{engine.name} hands over nothing of layer {gaps[0]}, and has values of layer {n_layers - 1}")
    found = Abilities(
        n_layers=n_layers,
        vocab_size=int(logits.shape[1]),
        dtype=_dtype(engine, seen, logits),
        places=frozenset(seen.found),
        attends=seen.attended,
    )
    found.why_not_isolated = _why_not_isolated(engine, found, trace)
    found.isolates = not found.why_not_isolated
    for site in _PLANTED:
        layer = next((layer for layer in range(n_layers) if (layer, site) in seen.found), None)
        if layer is not None and not _differs(_call(engine, plant=Plant(layer, site, 2.0))[2], logits):
            found.unused.add(site)
    return found


def _call(
    engine: Runs, *, replace: Mapping[int, Array] | None = None, plant: Plant | None = None
) -> tuple[WatchedCall, Trace, Array]:
    trace = Trace("survey", "prefill", "survey", "native", _TOKENS)
    probe = tuple(range(len(_TOKENS)))
    seen = WatchedCall(start=0, q_len=len(_TOKENS), probe=probe, sink=trace, replace=replace or {}, plant=plant)
    logits, _ = engine.watch(_TOKENS, engine.new_cache(len(_TOKENS) + 1), seen)
    return seen, trace, logits


def _dtype(engine: Runs, seen: WatchedCall, logits: Array) -> str:
    """The dtype that the engine names, or that most of what it hands over has."""
    counts = Counter(seen.found.values()) or Counter([logits.dtype.name])
    found = engine.given.dtype or counts.most_common(1)[0][0]
    if found not in UNIT_ROUNDOFF:
        raise UsageError(f"{engine.name} computes in {found!r}; say dtype = one of {', '.join(UNIT_ROUNDOFF)}")
    return found


def _why_not_isolated(engine: Runs, found: Abilities, clean: Trace) -> str:
    """Say why layer inputs cannot be replaced, "" if they can.

    All inputs are replaced by others, then those of every second layer by yet others: what belongs to these layers
    must change, and what belongs to the layers between must not.
    """
    inputs = {
        record.layer: record.values
        for record in clean.rows
        if record.site is Site.LAYER_IN and record.layer is not None
    }
    if missing := [layer for layer in range(found.n_layers) if layer not in inputs]:
        return f"layer_in of layer {missing[0]} was not handed over"
    rng = np.random.default_rng(0)
    one, two = ({layer: _shuffled(values, rng) for layer, values in inputs.items()} for _ in range(2))
    base = _values(_call(engine, replace=one)[1])
    if bare := [layer for layer in range(found.n_layers) if not any(place[0] == layer for place in base)]:
        return f"nothing but layer_in was handed over of layer {bare[0]}"
    for odd in (0, 1):
        mixed = {layer: (two if layer % 2 == odd else one)[layer] for layer in inputs}
        after = _values(_call(engine, replace=mixed)[1])
        for layer in range(found.n_layers):
            moved = [_differs(after[place], base[place]) for place in base if place[0] == layer]
            if layer % 2 == odd and not any(moved):
                return f"layer {layer} does not go on with what see returns for its layer_in"
            if layer % 2 != odd and any(moved):
                return f"layer {layer} reads what the layer below computed beside what see returns for its layer_in"
    return ""


def _shuffled(values: Array, rng: np.random.Generator) -> Array:
    """Other inputs [token, feature] of the same size."""
    wide = values.astype(np.float64)
    size = float(np.sqrt(np.mean(wide * wide))) or 1.0
    return np.asarray(size * rng.standard_normal(wide.shape)).astype(values.dtype)


def _values(trace: Trace) -> dict[Key, Array]:
    """Values by place, but for layer inputs; a layer that shows nothing else cannot be isolated."""
    found: dict[Key, Array] = {}
    for record in trace.rows:
        if record.site is not Site.LAYER_IN:
            found[record.layer, record.site] = record.values
    for read in trace.cache_reads():
        found[read.layer, read.site] = read.rows
    return found


def _differs(one: Array, two: Array) -> bool:
    if one.shape != two.shape:
        return True
    x, y = one.astype(np.float64), two.astype(np.float64)
    with np.errstate(invalid="ignore"):
        moved = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, x - y)
    size = float(np.linalg.norm(np.where(np.isfinite(y), y, 0.0)))
    return not float(np.linalg.norm(moved)) <= _SAME * size


__all__ = ["COSTS", "Abilities", "Runs", "Written", "find_abilities"]
