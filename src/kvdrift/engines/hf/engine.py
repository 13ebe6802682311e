"""A causal language model of transformers as an engine: its own forward, its own cache, watched."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import transformers
from torch import nn

from kvdrift.engines.base import Sink
from kvdrift.engines.hf.arrays import to_array
from kvdrift.engines.hf.attention import AttentionTap, Lane, watched_interface
from kvdrift.engines.hf.beside import BesideTokens, attributes_kept
from kvdrift.engines.hf.caches import CacheAdapter, OwnCache, cache_kind, open_cache
from kvdrift.engines.hf.computed import with_dtypes
from kvdrift.engines.hf.facts import describe_versions, experts_per_token, hash_weights, sites_of, what_to_check
from kvdrift.engines.hf.failures import first_line, is_ours
from kvdrift.engines.hf.kinds import (
    cache_argument,
    language_model,
    logits_of,
    native_dtype,
    parameters_taken,
    refuse_tuples,
    returning_objects,
    text_config,
    why_no_logits,
)
from kvdrift.engines.hf.packed import InputsSeen, KeptLayers, PackedLayer, describe_fixed, fixed_layers, packed_layers
from kvdrift.engines.hf.precision import DTYPES, at_dtype
from kvdrift.engines.hf.products import ProductRecorder
from kvdrift.engines.hf.recorder import Armed, TorchRecorder
from kvdrift.engines.hf.roles import ModelRoles, Survey
from kvdrift.engines.hf.routes import HFRoutes
from kvdrift.engines.hf.sequence import HFSequence
from kvdrift.engines.hf.state import ModelState
from kvdrift.engines.hf.streaming import streamed
from kvdrift.engines.hf.unwatched import Draws, caveats_of, compiled_parts, eager, evaluating, unwrapped
from kvdrift.engines.hf.versions import require_transformers
from kvdrift.engines.hf.weights import device_of
from kvdrift.errors import CaptureError, EngineUnavailable, KvdriftError, NotApplicable, UsageError
from kvdrift.trace.model import Array
from kvdrift.vocabulary.facts import Call, EngineFacts, Plant, sites_by_layer
from kvdrift.vocabulary.precision import HALF, UPPER
from kvdrift.vocabulary.sites import Site

# Tokens fed to find the roles. More than one, so that the token axis is seen; a number that no axis is likely to have.
_SURVEY_TOKENS = 5


class HFEngine:
    """One transformers model; use as a context manager, which hooks the model and leaves it as it was.

    `by_layer` asks `at` to hold one layer at a time at the other precision instead of the whole model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str | None = None,
        cache: str | Callable[[], Any] = "dynamic",
        layers: Sequence[int] | None = None,
        by_layer: bool = False,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        self._cache_kind = cache_kind(cache)
        require_transformers(transformers.__version__)
        self.model: Any
        self.model, self._around = language_model(unwrapped(model))
        # As callers call it: what torch.compile returned is not the model itself.
        self._whole: Any = model if self.model is unwrapped(model) else self.model
        self._compiled = compiled_parts(model)
        self._caveats = dict(caveats_of(model, self._compiled))
        self._config: Any = text_config(self.model)
        self.beside = BesideTokens(self.model.config, inputs)
        if self.beside.caveat is not None:
            self._caveats["TEXT_ALONE"] = self.beside.caveat
        self._layers = None if layers is None else frozenset(layers)
        self._native = native_dtype(self.model)
        self._rung = self._native
        self._by_layer = by_layer
        self._layer_modules: list[nn.Module] = []
        self._weights: AbstractContextManager[Any] = nullcontext()
        self._kept: KeptLayers | None = None
        self._tap = AttentionTap(unpin=False)
        self._stack, self._watch = ExitStack(), ExitStack()
        self._draws: Draws | None = None  # set while passes run unobserved
        self._forward_parameters = parameters_taken(self.model)
        self.cache_argument = cache_argument(self.model, self._config, self._forward_parameters)
        self._name = name or str(getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__)
        self._recorder: TorchRecorder | None = None
        self._state = ModelState(self.model)
        self._seen_dtypes: set[torch.dtype] = set()
        self._products: ProductRecorder | None = None
        self._info: EngineFacts | None = None

    @property
    def info(self) -> EngineFacts:
        if self._info is None:
            raise CaptureError("the engine is not open; use it as a context manager: with HFEngine(model) as engine")
        return self._info

    def __enter__(self) -> HFEngine:
        try:
            self._stack.enter_context(torch.no_grad())
            self._stack.enter_context(evaluating(self.model))
            self._stack.enter_context(returning_objects(self.model))
            self._stack.enter_context(attributes_kept(self.model))
            self._stack.callback(self.forget)
            weights_hash = hash_weights(self.model)
            roles, adapter = self._survey()
            self._layer_modules = [layer.module for layer in roles.layers]
            self._recorder = TorchRecorder(roles, self._tap)
            self._products = ProductRecorder(self.model, roles, self._recorder)
            self._stack.callback(lambda: self._watch.close())
            self._start_watching()
            if isinstance(self._cache_kind, OwnCache) and adapter.why_no_rewind is None:
                adapter.try_back()
            facts = self._describe(roles, adapter, weights_hash)
            self._info = with_dtypes(facts, self._seen_dtypes, self.new_sequence, _SURVEY_TOKENS)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def forget(self) -> None:
        """Put back what earlier calls left in the model: attributes, and at the native dtype buffers."""
        self._state.restore(with_buffers=self._rung == self._native)

    def _start_watching(self) -> None:
        assert self._recorder is not None
        self._watch = ExitStack()
        self._watch.enter_context(self._recorder.attached())
        self._watch.enter_context(watched_interface(lambda: self._tap))

    @contextmanager
    def unobserved(self, *, watched: bool = False) -> Iterator[Draws]:
        """Run as callers of the model do while the context is open; see `CanGoUnobserved`."""
        if self._rung != self._native and (self._compiled or self._by_layer):
            raise NotApplicable("compiled code runs at its own dtype, and weights are streamed by hooks")
        tap = self._tap
        self._draws = draws = Draws(self._device)
        if watched:
            self._use(AttentionTap(unpin=False))
        else:
            self._watch.close()
        try:
            yield draws
        finally:
            self._draws = None
            if watched:
                self._use(tap)
            else:
                self._start_watching()

    def _use(self, tap: AttentionTap) -> None:
        self._tap = tap
        if self._recorder is not None:
            self._recorder.tap = tap

    @contextmanager
    def at(self, rung: str) -> Iterator[None]:
        """Run at another precision while the context is open; parameters come back as the same bits."""
        if rung not in DTYPES:
            raise UsageError(f"unknown dtype {rung!r}; known: {', '.join(DTYPES)}")
        before, tap = self._rung, self._tap
        self._rung = rung
        self._use(AttentionTap(unpin=rung == "float64"))
        try:
            if rung == self._native:
                yield
            elif self._by_layer:
                with streamed(self.model, DTYPES[rung], self._layer_modules, self._kept) as self._weights:
                    yield
            else:
                with at_dtype(self.model, DTYPES[rung], self._kept):
                    yield
        finally:
            self._rung = before
            self._use(tap)
            self._weights = nullcontext()

    def shifted(self, shift: float) -> AbstractContextManager[None]:
        """See `kvdrift.engines.base.Shifting`."""
        assert self._recorder is not None
        return self._recorder.shifted(shift)

    def new_sequence(self, max_length: int, *, keep_past: bool = False) -> HFSequence:
        """Return an empty sequence that may grow to `max_length` tokens; `keep_past` prepares it to be rewound."""
        return HFSequence(self, open_cache(self._cache_kind, self._config, max_length, keep_past=keep_past))

    def exact_products(self) -> AbstractContextManager[None]:
        """Record every product with a weight of the model beside its exact result, at the native half dtype."""
        if self._products is None or self._rung != self._native or self._native not in HALF:
            return nullcontext()
        return self._products.recorded()

    @property
    def routes(self) -> HFRoutes:
        """What scenarios need: rows of a batch, other caches, facts about lengths."""
        return HFRoutes(self, self._config, self._cache_kind, self._forward_parameters)

    def forward(
        self,
        cache: CacheAdapter,
        tokens: Sequence[int],
        *,
        probe: Sequence[int],
        sink: Sink | None,
        replace: Mapping[int, Array],
        plant: Plant | None,
    ) -> int:
        """Run one forward call on top of `cache`; see `EngineSequence.extend`."""
        if self._draws is not None:
            return self._unobserved_call(cache, tokens, probe, sink, self._draws)
        sinks = {} if sink is None else {0: sink}
        return self.forward_rows(cache, [tokens], (0,), probes={0: probe}, sinks=sinks, replace=replace, plant=plant)[0]

    def _unobserved_call(
        self, cache: CacheAdapter, tokens: Sequence[int], probe: Sequence[int], sink: Sink | None, draws: Draws
    ) -> int:
        """Call the model as `generate` does, which asks for the logits of the last token alone."""
        start, q_len = cache.length, len(tokens)
        if list(probe) not in ([], [start + q_len - 1]):
            raise UsageError(f"an unobserved call gives the logits of its last token, and {list(probe)} was asked for")
        ids = torch.tensor([list(tokens)], dtype=torch.long, device=self._device)
        arguments: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in self._forward_parameters else {}
        arguments |= self.beside.for_call(start, [tokens], DTYPES[self._rung], self._device)
        call: AbstractContextManager[Any] = nullcontext()
        if is_watched := self._recorder is not None and self._recorder.is_attached:
            call = self.recording(cache, start=start, q_len=q_len, lanes=(), n_rows=1)
        model = self.model if is_watched else self._whole
        with self.model_errors(f"an unobserved call of {q_len} tokens on {start} cached ones"), call, draws:
            output = model(ids, **{self.cache_argument: cache.object}, use_cache=True, **arguments)
        cache.advance(q_len)
        found = logits_of(output, self._config.vocab_size)
        assert found is not None
        logits = found[:, -1]
        if sink is not None and probe:
            sink.add_rows(None, Site.LOGITS, tuple(probe), to_array(logits))
            sink.calls.append(Call(start, q_len, start, attention=self._attention))
        return int(torch.argmax(logits[0].float()))

    def forward_rows(
        self,
        cache: CacheAdapter,
        rows: Sequence[Sequence[int]],
        pads: Sequence[int],
        *,
        probes: Mapping[int, Sequence[int]],
        sinks: Mapping[int, Sink],
        replace: Mapping[int, Array] | None = None,
        plant: Plant | None = None,
    ) -> list[int]:
        """Run one forward call of several rows on top of `cache`; see `EngineRows.extend`.

        `rows` have one length; row r begins with `pads[r]` slots of padding, part of which may be fed by this call.
        """
        start, q_len = cache.length, len(rows[0])
        lanes = tuple(self.lane(row, pads[row], probes[row], sink, start, q_len) for row, sink in sinks.items())
        # The last token gives the next one. Each is asked for once, so that a decode step gets the logits of a single
        # row, as in a generation loop.
        last = torch.tensor([q_len - 1], device=self._device)
        wanted = torch.unique(torch.cat([*(lane.row_index for lane in lanes), last]))
        arguments: dict[str, Any] = {"logits_to_keep": wanted} if "logits_to_keep" in self._forward_parameters else {}
        ids = torch.tensor([list(row) for row in rows], dtype=torch.long, device=self._device)
        several = "" if len(rows) == 1 else f"{len(rows)} rows of "
        with (
            self.model_errors(f"a forward call of {several}{q_len} tokens on {start} cached ones"),
            self.recording(
                cache, start=start, q_len=q_len, lanes=lanes, n_rows=len(rows), replace=replace, plant=plant
            ) as call,
        ):
            output = self.model(
                ids,
                **{self.cache_argument: cache.object},
                **self.beside.for_call(start, rows, DTYPES[self._rung], self._device),
                **(self._padding(pads, start, q_len) if any(pads) else {}),
                use_cache=True,
                **arguments,
            )
        cache.advance(q_len)
        logits = logits_of(output, self._config.vocab_size)
        assert logits is not None
        logits = logits if arguments else logits[:, wanted]
        if plant is not None and plant.site is Site.LOGITS:
            logits = logits * plant.factor
        self.finish(
            lanes, call, cache, [logits[lane.row, torch.searchsorted(wanted, lane.row_index)] for lane in lanes]
        )
        return [int(row) for row in torch.argmax(logits[:, -1].float(), dim=-1)]

    @contextmanager
    def recording(
        self,
        cache: CacheAdapter,
        *,
        start: int,
        q_len: int,
        lanes: tuple[Lane, ...],
        n_rows: int,
        held: int | None = None,
        replace: Mapping[int, Array] | None = None,
        plant: Plant | None = None,
    ) -> Iterator[Armed]:
        """Record the forward call that is made inside the context, at the precision that the engine now has."""
        assert self._recorder is not None
        call = Armed(
            start=start,
            q_len=q_len,
            lanes=tuple(lane for lane in lanes if lane.positions),
            n_rows=n_rows,
            held=start if held is None else held,
            replace=replace or {},
            plant=plant,
            dtype=DTYPES[self._rung],
            wide=torch.float64 if self._rung == "float64" else torch.float32,
            slot_offset=cache.slot_offsets(q_len),
            layers=self._layers,
            kernels=set(),
        )
        with (
            eager(self._compiled),
            self._recorder.armed(call),
            cache.watched(self._recorder),
            self._weights,
            self._tap,
        ):
            yield call

    def lane(self, row: int, pad: int, probe: Sequence[int], sink: Sink, start: int, q_len: int) -> Lane:
        """Say how positions of one row of a call are recorded.

        Raises:
            UsageError: a position is not among the fed ones.
        """
        places = [position + pad - start for position in probe]
        if any(place < 0 or place >= q_len for place in places):
            fed = f"{start - pad}..{start - pad + q_len - 1}"
            raise UsageError(f"probe {list(probe)} is not inside the fed positions {fed}")
        return Lane(row, pad, tuple(probe), torch.tensor(places, dtype=torch.long, device=self._device), sink)

    def _padding(self, pads: Sequence[int], start: int, q_len: int) -> dict[str, Any]:
        """The arguments with which `generate` calls a model on a batch that is padded on the left."""
        before = torch.tensor(pads, device=self._device)[:, None]
        slots = torch.arange(start + q_len, device=self._device)[None]
        arguments = {"attention_mask": (slots >= before).long()}
        if "position_ids" in self._forward_parameters:
            arguments["position_ids"] = (slots[:, start:] - before).clamp(min=0)
        return arguments

    def finish(self, lanes: tuple[Lane, ...], call: Armed, cache: CacheAdapter, logits: Sequence[torch.Tensor]) -> None:
        """Record what is known only after the call: states, the proof of the route, and the `logits` [position, token]
        of each lane."""
        for lane, rows in zip(lanes, logits, strict=True):
            if lane.positions:
                lane.sink.add_rows(None, Site.LOGITS, lane.positions, to_array(rows))
            self._record_states(cache, call, lane)
            lane.sink.calls.append(
                Call(
                    start=call.start - lane.pad,
                    q_len=call.q_len,
                    cache_len_before=call.held,
                    kv_len=call.kv_len,
                    attention=self._attention,
                    kernels=tuple(sorted(call.kernels or ())),
                    n_rows=call.n_rows,
                    overflow=call.overflow,
                )
            )

    def _record_states(self, cache: CacheAdapter, call: Armed, lane: Lane) -> None:
        """Recurrent state exists only after the last token of a call, so only that position has it."""
        last = call.start + call.q_len - 1 - lane.pad
        if last not in lane.positions:
            return
        for layer, site, state in cache.states(lane.row):
            if self._layers is None or layer in self._layers:
                lane.sink.add_rows(layer, site, (last,), to_array(state.reshape(1, -1)))

    def _survey(self) -> tuple[ModelRoles, CacheAdapter]:
        """Watch a short forward pass and work out which module plays which role."""
        n_tokens = _SURVEY_TOKENS
        vocab = int(self._config.vocab_size)
        ids = torch.arange(1, n_tokens + 1, device=self._device)[None] % vocab
        cache = open_cache(self._cache_kind, self._config, n_tokens + 1)
        survey = Survey(self.model, n_tokens)
        packed = packed_layers(self.model)
        inputs = InputsSeen(packed)
        handles = survey.hooks()
        try:
            with (
                eager(self._compiled),
                inputs.watching(),
                watched_interface(lambda: self._tap, survey.attention_called),
                cache.watched(survey),
                self.model_errors(f"a first forward call of {n_tokens} tokens"),
            ):
                output = self.model(ids, **{self.cache_argument: cache.object}, use_cache=True)
        except CaptureError:
            refuse_tuples(self.model, ids)
            raise
        finally:
            for handle in handles:
                handle.remove()
        why = why_no_logits(self.model, logits_of(output, vocab), n_tokens, vocab)
        if why is not None:
            raise EngineUnavailable(why)
        if not cache.was_used():
            refuse_tuples(self.model, ids)
            raise EngineUnavailable(
                f"{type(self.model).__name__} left the cache empty after a forward call, so it has no decode step on "
                "a cache to audit. Use a decoder-only model that supports past_key_values."
            )
        cache.advance(n_tokens)
        if (looped := survey.looped()) is not None:
            raise EngineUnavailable(
                f"{type(self.model).__name__} runs its layer {looped[0]} {looped[1]} times in one forward call, and "
                "an address has no place for that; models whose layers run once can be audited."
            )
        self._keep(fixed_layers(packed, inputs, DTYPES[UPPER], lambda: AttentionTap(unpin=True)))
        self._seen_dtypes = survey.dtypes()
        roles = survey.roles()
        if roles is None:
            raise CaptureError(f"no stack of decoder layers was found in {type(self.model).__name__}")
        if self._layers is not None and max(self._layers) >= len(roles.layers):
            raise UsageError(
                f"--layers names layer {max(self._layers)}, and {self._name} has layers 0 to {len(roles.layers) - 1}"
            )
        return roles, cache

    def _keep(self, fixed: Sequence[PackedLayer]) -> None:
        """Leave layers at their dtype on the upper rungs, and say so."""
        if not fixed:
            return
        self._kept = KeptLayers([layer.module for layer in fixed], DTYPES[self._native], lambda on: self._tap.rest(on))
        self._caveats["QUANTISED_LAYERS"] = describe_fixed(fixed, self._native)

    @contextmanager
    def model_errors(self, what: str) -> Iterator[None]:
        """Report what the model raises, of whatever type, as a failed capture; what kvdrift raises stays as it is."""
        try:
            yield
        except KvdriftError:
            raise
        except Exception as error:
            if is_ours(error) and not isinstance(error, torch.OutOfMemoryError):
                raise
            raise CaptureError(
                f"{self._name} failed at {self._rung} on {what} with a {self._cache_kind} cache: "
                f"{type(error).__name__}: {first_line(error)}. {what_to_check(self._rung == self._native)}"
            ) from error

    @property
    def _device(self) -> torch.device:
        return device_of(self.model)

    @property
    def _attention(self) -> str:
        return str(getattr(self.model.config, "_attn_implementation", None) or "unknown")

    def _describe(self, roles: ModelRoles, adapter: CacheAdapter, weights_hash: str) -> EngineFacts:
        notes = self._around
        if getattr(self.model, "get_experts_implementation", None) and self.model._can_set_experts_implementation():
            notes = (*notes, "experts ran one by one (eager) on the fp32 and fp64 rungs")
        positions = getattr(self._config, "max_position_embeddings", None)
        return EngineFacts(
            engine="hf",
            model=self._name,
            model_hash=weights_hash,
            dtype=self._native,
            device=str(self._device),
            attention=self._attention,
            cache=str(self._cache_kind),
            n_layers=len(roles.layers),
            vocab_size=int(self._config.vocab_size),
            max_positions=int(positions) if isinstance(positions, int) else None,
            parameters=sum(p.numel() for p in self.model.parameters()),
            can_rewind=adapter.why_no_rewind is None,
            why_no_rewind=adapter.why_no_rewind,
            rewinds_once=adapter.rewinds_once,
            sites=sites_by_layer(sites_of(roles, adapter)),
            notes=notes,
            caveats=self._caveats,
            experts_per_token=experts_per_token(self._config),
            perturbable=all(any(tap.site is Site.LAYER_IN for tap in layer.taps) for layer in roles.layers),
            versions={**describe_versions(), "python": platform.python_version()},
        )


__all__ = ["HFEngine", "HFSequence"]
