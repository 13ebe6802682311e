"""A model of mlx-lm as an engine: its own forward and its own caches, watched."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from kvdrift.engines.base import OpenEngine, Sink, require_layers
from kvdrift.engines.mlx.arrays import DTYPES, dtype_name, function_error, is_floating, to_numpy
from kvdrift.engines.mlx.caches import KINDS, new_cache, trim, why_no_rewind, windows_of
from kvdrift.engines.mlx.products import MLXProducts
from kvdrift.engines.mlx.recorder import MLXCall, MLXRecorder, ProbedRow
from kvdrift.engines.mlx.routes import Batching, MLXRoutes
from kvdrift.errors import CaptureError, KvdriftError, NotApplicable, UsageError
from kvdrift.trace.model import Array, Trace
from kvdrift.vocabulary.facts import Call, EngineFacts, Plant, sites_by_layer
from kvdrift.vocabulary.plan import AuditPlan
from kvdrift.vocabulary.precision import MEASURED_PRODUCTS, RUNGS
from kvdrift.vocabulary.sites import Site

_SURVEY_TOKENS = 5
_BATCHING = Batching()
# Products with packed rows or weights exist in no wider dtype than float32.
_PACKED_RUNGS = ("bfloat16", "float32")


class DrawsOfMLX:
    """Whether calls drew random numbers, by the state of the generator that all share."""

    def __init__(self) -> None:
        self._before = _random_state()

    @property
    def draws(self) -> bool:
        """Whether the state is another one now."""
        return _random_state() != self._before


def _random_state() -> bytes:
    state: Any = mx.random.state
    return b"".join(np.array(each).tobytes() for each in state)


class MLXModel:
    """A model of mlx-lm for `kvdrift.audit`: `cache` is the kind of cache that takes the place of plain ones, and
    `batching` how scenarios feed rows of a batch."""

    def __init__(
        self, model: Any, *, cache: str = "default", name: str | None = None, batching: Batching = _BATCHING
    ) -> None:
        if cache not in KINDS:
            raise UsageError(f"unknown cache kind {cache!r}; use --cache with one of {', '.join(KINDS)}")
        self.model, self.cache, self.name = model, cache, name or str(getattr(model, "model_type", "mlx"))
        self.batching = batching

    @contextmanager
    def opened(self, plan: AuditPlan) -> Iterator[OpenEngine]:
        """Watch the model while the context is open, and leave it as it was."""
        with MLXEngine(
            self.model, name=self.name, cache=self.cache, layers=plan.layers, batching=self.batching
        ) as engine:
            yield OpenEngine(engine, None)


class MLXEngine:
    """One model; use as a context manager. It runs on the CPU, where mlx has float64."""

    def __init__(
        self, model: Any, *, name: str, cache: str, layers: Sequence[int] | None, batching: Batching = _BATCHING
    ) -> None:
        self.model, self._name, self._cache_kind, self._batching = model, name, cache, batching
        self._layers = list(model.layers)
        n_layers = len(self._layers)
        require_layers(layers, name, n_layers)
        recorded = frozenset(range(n_layers) if layers is None else layers)
        self.recorder = MLXRecorder(model, self._layers, recorded)
        self._products = MLXProducts(model, self._layers, self.recorder)
        self._native = _native(model)
        self._rung = self._native
        self._stack, self._watch = ExitStack(), ExitStack()
        self._is_free = False  # while passes run unobserved
        self._info: EngineFacts | None = None

    @property
    def info(self) -> EngineFacts:
        if self._info is None:
            raise CaptureError("the engine is not open; use it as a context manager: with MLXEngine(...) as engine")
        return self._info

    def __enter__(self) -> MLXEngine:
        try:
            self._stack.callback(mx.set_default_device, mx.default_device())
            mx.set_default_device(mx.cpu)
            self._stack.callback(lambda: self._watch.close())
            self._start_watching()
            self._info = self._describe()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @contextmanager
    def at(self, rung: str) -> Iterator[None]:
        """Run with the same weights at another precision; they come back as the same arrays."""
        if rung not in DTYPES:
            raise UsageError(f"unknown dtype {rung!r}; known: {', '.join(DTYPES)}")
        if rung == self._native:
            yield
            return
        before, parameters = self._rung, self.model.parameters()
        dtype = DTYPES[rung]
        self.model.update(tree_map(lambda p: p.astype(dtype) if is_floating(p) else p, parameters))
        self._rung = rung
        try:
            yield
        finally:
            self.model.update(parameters)
            self._rung = before

    def function_error(self, n_positions: int) -> float:
        """Return the largest error of the elementary functions of mlx; at float64 on a CPU it is that of float32."""
        return function_error(DTYPES[self._rung], n_positions)

    def weight_values(self) -> Iterator[tuple[str, Array]] | None:
        """Yield the name and the values of each parameter; None for packed ones."""
        parameters = tree_flatten(self.model.parameters())
        if not all(is_floating(value) for _, value in parameters):
            return None
        return ((name, to_numpy(value)) for name, value in parameters)

    def shifted(self, shift: float) -> AbstractContextManager[None]:
        """See `kvdrift.engines.base.Shifting`."""
        return self.recorder.shifted(shift)

    def exact_products(self, *, whatever_dtype: bool = False) -> AbstractContextManager[None]:
        """Record every product with a weight of the model beside its exact result, at the native dtype, up to float32.

        With `whatever_dtype` none is recorded: products at float64 are compared by what comes out of them.
        """
        is_wanted = not whatever_dtype and self._rung == self._native and self._native in MEASURED_PRODUCTS
        in_parts = self._native == "float32"
        return self._products.recorded(in_parts=in_parts) if is_wanted else nullcontext()

    def _start_watching(self) -> None:
        self._watch = ExitStack()
        self._watch.enter_context(self.recorder.attached())

    @contextmanager
    def unobserved(self, *, watched: bool = False) -> Iterator[DrawsOfMLX]:
        """Run as callers of mlx-lm do while the context is open; see `kvdrift.engines.base.CanGoUnobserved`.

        Raises:
            NotApplicable: the engine runs at float64, where kvdrift computes norms for mlx.
        """
        if self._rung == "float64" and not watched:
            raise NotApplicable("norms are computed for mlx in float64, so that what mlx runs there is another thing")
        self._is_free = True
        draws = DrawsOfMLX()
        if not watched:
            self._watch.close()
        try:
            yield draws
        finally:
            self._is_free = False
            if not watched:
                self._start_watching()

    @property
    def routes(self) -> MLXRoutes:
        """The other routes to a token."""
        return MLXRoutes(self.run, self.model, self._cache_kind, self._batching)

    def new_sequence(self, max_length: int, *, keep_past: bool = False) -> MLXSequence:
        """Return an empty sequence; caches of mlx-lm grow as they need."""
        return MLXSequence(self, new_cache(self.model, self._cache_kind))

    def run(self, rows: Sequence[Sequence[int]], call: MLXCall) -> list[int]:
        """Run one forward call on rows of one length; return the most likely next token of each."""
        for lane in call.lanes:
            if self._is_free and call.columns(lane) not in ([], [call.q_len - 1]):
                raise UsageError(
                    f"an unobserved call gives the logits of its last token, and {list(lane.positions)} was asked for"
                )
            if any(column < max(0, lane.pad - call.start) or column >= call.q_len for column in call.columns(lane)):
                raise UsageError(
                    f"probe {list(lane.positions)} is not inside the fed positions from {call.start - lane.pad} on"
                )
        try:
            with self.recorder.armed(call):
                logits = self.model(mx.array([list(tokens) for tokens in rows]), cache=call.cache)
                mx.eval(logits, [getattr(each, "keys", None) for each in call.cache if _has_rows(each)])
        except KvdriftError:
            raise
        except Exception as error:
            raise CaptureError(
                f"{self._name} failed at {self._rung} on a call of {call.q_len} tokens on {call.start} cached ones "
                f"with a {self._cache_kind} cache: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            ) from error
        if call.plant is not None and call.plant.site is Site.LOGITS:
            logits = logits * call.plant.factor
        kernels = tuple(sorted(call.kernels))
        for lane in call.lanes:
            if lane.positions:
                values = to_numpy(logits[lane.row][mx.array(call.columns(lane))])
                lane.sink.add_rows(None, Site.LOGITS, lane.positions, values)
            self.recorder.put_states(call, lane)
            start = call.start - lane.pad
            proof = Call(start, call.q_len, call.start, call.kv_len, "mlx", kernels, n_rows=len(call.pads))
            lane.sink.calls.append(proof)
        return [int(mx.argmax(row[-1].astype(mx.float32))) for row in logits]

    def _describe(self) -> EngineFacts:
        tokens = tuple(range(1, _SURVEY_TOKENS + 1))
        self.recorder.windows = windows_of(self.model, self._layers)
        trace = Trace("survey", "prefill", "survey", self._native, tokens)
        sequence = self.new_sequence(_SURVEY_TOKENS)
        self.recorder.is_surveying = True
        sequence.extend(tokens, probe=(_SURVEY_TOKENS - 1,), sink=trace)
        self.recorder.is_surveying = False
        sites: dict[int | None, list[Site]] = {None: [], **{layer: [] for layer in range(len(self._layers))}}
        for layer, site in sorted(trace.places(), key=lambda place: list(Site).index(place[1])):
            sites[layer].append(site)
        parameters = tree_flatten(self.model.parameters())
        vocab = next(record.values.shape[-1] for record in trace.rows if record.site is Site.LOGITS)
        why = why_no_rewind(sequence.cache)
        packed = self._cache_kind == "quantized" or any(value.dtype == mx.uint32 for _, value in parameters)
        return EngineFacts(
            engine="mlx",
            model=self._name,
            model_hash=_hash(parameters),
            dtype=self._native,
            device="cpu",
            attention="mlx",
            cache=self._cache_kind,
            n_layers=len(self._layers),
            vocab_size=int(vocab),
            parameters=sum(int(value.size) for _, value in parameters),
            can_rewind=why is None,
            why_no_rewind=why,
            sites=sites_by_layer(sites),
            notes=(
                f"caches: {', '.join(dict.fromkeys(type(each).__name__ for each in sequence.cache))}",
                "on the CPU: what runs is the Python of mlx-lm and the CPU kernels of mlx, not those of Metal",
            ),
            rungs=_PACKED_RUNGS if packed else (RUNGS.lower, RUNGS.upper),
            perturbable=not packed and all(Site.LAYER_IN in sites[layer] for layer in range(len(self._layers))),
            versions={name: version(name) for name in ("kvdrift", "mlx", "mlx-lm", "numpy")}
            | {"python": platform.python_version()},
        )


class MLXSequence:
    """A token sequence and its caches of mlx-lm."""

    def __init__(self, engine: MLXEngine, cache: list[Any]) -> None:
        self._engine, self.cache, self.length = engine, cache, 0

    def extend(
        self,
        tokens: Sequence[int],
        *,
        probe: Sequence[int] = (),
        sink: Sink | None = None,
        replace: Mapping[int, Array] | None = None,
        plant: Plant | None = None,
    ) -> int:
        lanes = () if sink is None else (ProbedRow(0, 0, tuple(probe), sink),)
        call = MLXCall(self.length, len(tokens), (0,), lanes, replace or {}, plant, self.cache)
        token = self._engine.run([tokens], call)[0]
        self.length += len(tokens)
        return token

    def rewind(self, n_tokens: int) -> None:
        if not 0 <= n_tokens <= self.length:
            raise UsageError(f"cannot rewind {n_tokens} tokens of a sequence of {self.length}")
        trim(self.cache, n_tokens)
        self.length -= n_tokens

    def close(self) -> None:
        self.cache = []


def _has_rows(cache: Any) -> bool:
    return isinstance(getattr(cache, "keys", None), mx.array)


def _native(model: Any) -> str:
    """The dtype of most floating-point numbers of a model."""
    counts: dict[str, int] = {}
    for _, value in tree_flatten(model.parameters()):
        if is_floating(value):
            counts[dtype_name(value.dtype)] = counts.get(dtype_name(value.dtype), 0) + int(value.size)
    return max(counts, key=lambda name: counts[name])


def _hash(parameters: Sequence[tuple[str, Any]]) -> str:
    """Return the SHA-256 of all parameters, names included, in name order.

    Raises:
        CaptureError: a weight is NaN or infinite.
    """
    digest = hashlib.sha256()
    for name, value in sorted(parameters, key=lambda item: item[0]):
        values = to_numpy(value)
        if is_floating(value) and not np.isfinite(values.astype(np.float64).sum()):
            raise CaptureError(f"weights of {name} are NaN or infinite; every pass would be too. Check the checkpoint.")
        digest.update(f"{name}:{dtype_name(value.dtype)}:{values.shape}".encode())
        digest.update(np.ascontiguousarray(values).view(np.uint8).data)
    return digest.hexdigest()


__all__ = ["DrawsOfMLX", "MLXEngine", "MLXModel", "MLXSequence"]
