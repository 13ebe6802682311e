"""An engine of a caller's own while it is open: its passes, its precisions, and what it turned out to be able to do."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from kvdrift.engines.base import Shifts, Sink, require_layers
from kvdrift.engines.own.abilities import COSTS, Abilities, Written, find_abilities
from kvdrift.engines.own.arrays import to_numpy
from kvdrift.engines.own.watched import WatchedCall
from kvdrift.errors import CaptureError, KvdriftError, NotApplicable, UsageError
from kvdrift.trace.model import Array
from kvdrift.vocabulary.facts import Call, EngineFacts, Plant, sites_by_layer
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF
from kvdrift.vocabulary.sites import EXPECTED_SITES, STATE_SITES, Site

# Of these, one at least is asked for in every layer; a recurrent one has its state.
_SHOWS_ATTENTION = frozenset({Site.ATTN_CTX, Site.ATTN_OUT, Site.RESID_ATTN}) | STATE_SITES

_SEED = 20262  # of what layer inputs are changed by; any fixed number does


@dataclass(frozen=True, slots=True)
class Told:
    """What unobserved calls said of themselves: nothing here knows of random numbers."""

    draws: bool = False


class RunningEngine(Shifts):
    """A `kvdrift.Engine` that is open; use as a context manager."""

    def __init__(self, given: Written, layers: Sequence[int] | None) -> None:
        self.given = given
        self.name = given.name or type(given).__name__
        self._wanted = layers
        self._layers = None if layers is None else frozenset(layers)
        self._rung = ""
        self._is_free = False
        self._abilities: Abilities | None = None
        self._hash: str | None = None
        self._info: EngineFacts | None = None

    @property
    def info(self) -> EngineFacts:
        if self._info is None:
            raise CaptureError("the engine is not open; use it as a context manager")
        return self._info

    def __enter__(self) -> RunningEngine:
        weights = self._weights()
        if weights is not None:
            self._hash = _hash(weights)
        found = find_abilities(self)
        require_layers(self._wanted, self.name, found.n_layers)
        self._abilities, self._rung = found, found.dtype
        self._info = self._describe(found, weights)
        return self

    def __exit__(self, *exc: object) -> None:
        self.given._seen = None

    @contextmanager
    def at(self, rung: str) -> Iterator[None]:
        """Compute in another dtype while the context is open; weights that are told come back as the same bits.

        Raises:
            CaptureError: the engine has no `cast`, it failed, or the weights are others afterwards.
        """
        native = self.info.dtype
        if rung not in UNIT_ROUNDOFF:
            raise UsageError(f"unknown dtype {rung!r}; known: {', '.join(UNIT_ROUNDOFF)}")
        if rung == native:
            yield
            return
        if not self.given.can("cast"):
            raise CaptureError(
                f"{self.name} computes in {native} alone; write cast(dtype), which has it compute in another dtype"
            )
        with self.errors(f"cast({rung!r})"):
            self.given.cast(rung)
        self._rung = rung
        try:
            yield
        finally:
            self._rung = native
            with self.errors(f"cast({native!r})"):
                self.given.cast(native)
            weights = self._weights()
            if weights is not None and _hash(weights) != self._hash:
                raise CaptureError(
                    f"{self.name} has other weights after cast({rung!r}) and cast({native!r}) than before; keep the "
                    "original ones and take them up again"
                )

    def weight_values(self) -> Iterator[tuple[str, Array]] | None:
        """Yield the name and the values of each weight that the caller tells; None if it tells none."""
        weights = self._weights()
        return None if weights is None else iter(weights.items())

    @contextmanager
    def unobserved(self, *, watched: bool = False) -> Iterator[Told]:
        """Run while `see` hands everything back; see `kvdrift.engines.base.CanGoUnobserved`.

        Raises:
            NotApplicable: the engine keeps what it computes by itself, and knows no other way to run.
        """
        if self.given.can("record"):
            raise NotApplicable("it records by itself")
        self._is_free = not watched
        try:
            yield Told()
        finally:
            self._is_free = False

    def new_sequence(self, max_length: int, *, keep_past: bool = False) -> RunningSequence:
        """Return an empty sequence in a cache of its own.

        Raises:
            CaptureError: the cache cannot hold so many tokens, or `new_cache` failed.
        """
        most = self.given.max_length
        if most is not None and max_length > most:
            raise CaptureError(f"{max_length} tokens are wanted, and a cache of {self.name} holds {most}")
        return RunningSequence(self, max_length)

    def new_cache(self, max_length: int) -> Any:
        with self.errors(f"new_cache({max_length})"):
            return self.given.new_cache(max_length)

    def call(
        self,
        tokens: Sequence[int],
        cache: Any,
        start: int,
        *,
        probe: Sequence[int] = (),
        sink: Sink | None = None,
        replace: Mapping[int, Array] | None = None,
        plant: Plant | None = None,
    ) -> tuple[int, Any]:
        """Run one call, and return the most likely next token and the cache to go on with."""
        if any(not start <= position < start + len(tokens) for position in probe):
            raise UsageError(f"probe {list(probe)} is not inside the fed positions from {start} on")
        isolates = self._abilities is not None and self._abilities.isolates
        seen = WatchedCall(
            start=start,
            q_len=len(tokens),
            probe=tuple(probe),
            sink=sink,
            replace=replace if replace and isolates else {},
            plant=plant,
            change=self._change(start, len(tokens)) if self.shift and isolates else None,
            layers=self._layers,
            n_layers=None if self._abilities is None else self._abilities.n_layers,
        )
        logits, cache = self.watch(tokens, cache, seen)
        seen.finish()
        if plant is not None and plant.site is Site.LOGITS:
            logits = (logits.astype(np.float64) * plant.factor).astype(logits.dtype)
        if sink is not None:
            if probe:
                sink.add_rows(None, Site.LOGITS, tuple(probe), _probed(logits, [p - start for p in probe], len(tokens)))
            sink.calls.append(Call(start, len(tokens), start, seen.kv_len, "own"))
        return int(np.argmax(logits[-1].astype(np.float64))), cache

    def watch(self, tokens: Sequence[int], cache: Any, seen: WatchedCall) -> tuple[Array, Any]:
        """Run `extend` while `seen` hears what it hands over; logits [token, vocabulary] and the cache."""
        self.given._seen = None if self._is_free else seen
        try:
            with self.errors(f"a call of {seen.q_len} tokens on {seen.start} cached ones"):
                given = self.given.extend([int(token) for token in tokens], cache, seen.start)
                if self.given.can("record") and not self._is_free:
                    for (layer, site), values in self.given.record().items():
                        seen.see(layer, site, values, None)
        finally:
            self.given._seen = None
        if isinstance(given, tuple) and len(given) == 2:
            given, cache = given
        self._check_dtype(seen)
        return _logits(given, seen.q_len), cache

    def _check_dtype(self, seen: WatchedCall) -> None:
        """Refuse a rung at which nothing that the engine hands over has the dtype of the rung.

        Raises:
            CaptureError: it goes on in another dtype.
        """
        dtypes = set(seen.found.values())
        is_cast = self._info is not None and self._rung != self._info.dtype
        if is_cast and dtypes and self._rung not in dtypes:
            raise CaptureError(
                f"after cast({self._rung!r}) {self.name} hands over {', '.join(sorted(dtypes))}; cast weights and "
                "caches, and compute in that dtype"
            )

    def _change(self, start: int, q_len: int) -> Any:
        shift = self.shift

        def change(tokens: Array) -> Array:
            xi = np.random.default_rng((_SEED, start, q_len)).standard_normal(tokens.shape)
            return tokens.astype(np.float64) * (1.0 + shift * xi)

        return change

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Report what the caller's own code raises, of whatever type, as a failed capture."""
        try:
            yield
        except KvdriftError:
            raise
        except Exception as error:
            said = next(iter(str(error).splitlines()), "")
            at = f" at {self._rung}" if self._rung else ""
            raise CaptureError(f"{self.name} failed{at} in {what}: {type(error).__name__}: {said}") from error

    def _weights(self) -> dict[str, Array] | None:
        if not self.given.can("weights"):
            return None
        with self.errors("weights()"):
            return {str(name): to_numpy(values) for name, values in self.given.weights().items()}

    def _describe(self, found: Abilities, weights: Mapping[str, Array] | None) -> EngineFacts:
        given = self.given
        goes_back = given.can("rewind") or given.can("copy")
        sites: dict[int | None, list[Site]] = {None: [], **{layer: [] for layer in range(found.n_layers)}}
        for layer, site in sorted(found.places, key=lambda place: list(Site).index(place[1])):
            sites[layer].append(site)
        for layer, shown in sites.items():
            # What is not handed over is not shown, which is not the same as a model that does not have it.
            if layer is not None and not _SHOWS_ATTENTION & {*shown}:
                shown.append(Site.ATTN_CTX)
        return EngineFacts(
            engine="own",
            model=self.name,
            model_hash=self._hash,
            dtype=found.dtype,
            attention="own",
            cache="own",
            n_layers=found.n_layers,
            vocab_size=found.vocab_size,
            max_positions=given.max_length,
            parameters=None if weights is None else sum(int(values.size) for values in weights.values()),
            can_rewind=goes_back,
            why_no_rewind=None if goes_back else "it has no rewind; write rewind(cache, length) or copy(cache)",
            sites=sites_by_layer(sites),
            notes=_notes(given, found),
            caveats=_costs(given, found),
            perturbable=found.isolates,
            versions={**{name: version(name) for name in ("kvdrift", "numpy")}, **given.versions}
            | {"python": platform.python_version()},
        )


class RunningSequence:
    """A token sequence in a cache of the caller's own."""

    def __init__(self, engine: RunningEngine, max_length: int) -> None:
        self._engine, self._max_length = engine, max_length
        self.cache = engine.new_cache(max_length)
        self._tokens: tuple[int, ...] = ()
        self._kept: dict[tuple[int, ...], Any] = {}  # caches of prefills, to be copied

    @property
    def length(self) -> int:
        return len(self._tokens)

    def extend(
        self,
        tokens: Sequence[int],
        *,
        probe: Sequence[int] = (),
        sink: Sink | None = None,
        replace: Mapping[int, Array] | None = None,
        plant: Plant | None = None,
    ) -> int:
        token, self.cache = self._engine.call(
            tokens, self.cache, self.length, probe=probe, sink=sink, replace=replace, plant=plant
        )
        self._tokens += tuple(tokens)
        return token

    def rewind(self, n_tokens: int) -> None:
        """Drop the last tokens; an engine that can only copy gets a copy of what a prefill of the others wrote.

        Raises:
            CaptureError: the engine can do neither, or it failed.
        """
        if not 0 <= n_tokens <= self.length:
            raise UsageError(f"cannot rewind {n_tokens} tokens of a sequence of {self.length}")
        given, left = self._engine.given, self._tokens[: self.length - n_tokens]
        if given.can("rewind"):
            with self._engine.errors(f"rewind to {len(left)} tokens"):
                after = given.rewind(self.cache, len(left))
            self.cache = self.cache if after is None else after
        elif given.can("copy"):
            self.cache = self._copied(left)
        else:
            raise CaptureError("cannot rewind: the engine has neither rewind nor copy")
        self._tokens = left

    def _copied(self, tokens: tuple[int, ...]) -> Any:
        if tokens not in self._kept:
            cache = self._engine.new_cache(self._max_length)
            self._kept[tokens] = self._engine.call(tokens, cache, 0)[1] if tokens else cache
        with self._engine.errors(f"copy of a cache of {len(tokens)} tokens"):
            return self._engine.given.copy(self._kept[tokens])

    def close(self) -> None:
        self.cache = None
        self._kept.clear()


def _notes(given: Written, found: Abilities) -> tuple[str, ...]:
    offered = {site for _, site in found.places}
    missing = ", ".join(site for site in EXPECTED_SITES if site not in offered and site is not Site.LOGITS)
    notes = [f"sites handed over: {', '.join(site for site in Site if site in offered) or 'none'}"]
    if missing:
        notes.append(f"sites not handed over: {missing}")
    if given.can("copy") and not given.can("rewind"):
        notes.append(
            "it copies caches and does not rewind them: in kv_aligned a step reads the rows of a prefill of the tokens "
            "before it"
        )
    return tuple(notes)


def _costs(given: Written, found: Abilities) -> dict[str, str]:
    """What is not known because the engine cannot do something, by code; each text says what to write."""
    costs = {}
    if not (given.can("rewind") or given.can("copy")):
        costs["NO_REWIND"] = f"no rewind and no copy: {COSTS['rewind']}; write rewind(cache, length)"
    if not given.can("cast"):
        costs["NO_CAST"] = f"no cast: {COSTS['cast']}; write cast(dtype)"
    if not given.can("weights"):
        costs["NO_WEIGHTS"] = f"no weights: {COSTS['weights']}; write weights()"
    if not found.places:
        costs["NO_SITES"] = f"no sites: {COSTS['see']}; hand values over with see(layer, site, values)"
        return costs
    if not found.isolates:
        costs["NOT_ISOLATED"] = f"{found.why_not_isolated}: {COSTS['inputs']}"
    if found.unused:
        names = ", ".join(site for site in Site if site in found.unused)
        costs["CONTROL_IN_VALUES"] = (
            f"the engine does not go on with what see returns for {names}: {COSTS['plants']}; write x = self.see(...)"
        )
    if not found.attends:
        costs["NOT_REPLAYED"] = (
            f"attends was not called: {COSTS['attends']}; call attends(layer, scale=...) and hand over q_rope, "
            "k_cache, v_cache and attn_ctx"
        )
    return costs


def _logits(given: Any, q_len: int) -> Array:
    """Logits [token, vocabulary] of a call; an engine may give those of the last token alone.

    Raises:
        UsageError: they are none.
    """
    try:
        array = to_numpy(given)
    except UsageError as error:
        raise UsageError(f"extend returned no logits: {error}") from error
    rows = array[0] if array.ndim == 3 and len(array) == 1 else array[None] if array.ndim == 1 else array
    if rows.ndim != 2 or len(rows) not in (1, q_len):
        raise UsageError(
            f"extend returned an array of shape {list(array.shape)} for {q_len} tokens; it must return logits [token, "
            "vocabulary], or (logits, cache)"
        )
    return rows


def _probed(logits: Array, rows: Sequence[int], q_len: int) -> Array:
    if len(logits) == q_len:
        return logits[list(rows)].copy()
    if list(rows) != [q_len - 1]:
        raise UsageError("extend returned the logits of its last token alone, and those of others are compared")
    return logits.copy()


def _hash(weights: Mapping[str, Array]) -> str:
    """Return the SHA-256 of all weights, names included, in name order.

    Raises:
        CaptureError: a weight is NaN or infinite.
    """
    digest = hashlib.sha256()
    for name, values in sorted(weights.items()):
        if not np.isfinite(values.astype(np.float64)).all():
            raise CaptureError(f"weights of {name} are NaN or infinite; every pass would be too. Check the checkpoint.")
        digest.update(f"{name}:{values.dtype.name}:{values.shape}".encode())
        digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


__all__ = ["RunningEngine", "RunningSequence", "Told"]
