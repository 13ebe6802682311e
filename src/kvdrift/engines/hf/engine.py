"""A causal language model of transformers as an engine: its own forward, its own cache, watched."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from torch import nn

from kvdrift.engines.base import Sink, require_layers
from kvdrift.engines.hf.beside import BesideTokens
from kvdrift.engines.hf.caches import CacheAdapter, OwnCache, cache_kind, open_cache
from kvdrift.engines.hf.facts import PACKAGES, experts_per_token, what_to_check
from kvdrift.engines.hf.interface import watched_interface
from kvdrift.engines.hf.kinds import (
    asks_for_cache,
    cache_argument,
    language_model,
    logits_of,
    parameters_taken,
    refuse_tuples,
    returning_objects,
    text_config,
    why_no_logits,
)
from kvdrift.engines.hf.routes import HFRoutes
from kvdrift.engines.hf.sequence import HFSequence
from kvdrift.engines.hf.versions import require_transformers
from kvdrift.engines.torch.attention import AttentionTap
from kvdrift.engines.torch.computed import with_dtypes
from kvdrift.engines.torch.engine import WatchedModel
from kvdrift.engines.torch.facts import describe_versions, hash_weights, sites_of
from kvdrift.engines.torch.failures import first_line
from kvdrift.engines.torch.packed import (
    InputsSeen,
    KeptLayers,
    PackedLayer,
    describe_fixed,
    fixed_layers,
    packed_layers,
)
from kvdrift.engines.torch.positions import PositionTables, first_position, positions_taken
from kvdrift.engines.torch.precision import DTYPES, native_dtype
from kvdrift.engines.torch.products import ProductRecorder
from kvdrift.engines.torch.recorder import TorchRecorder
from kvdrift.engines.torch.roles import ModelRoles, Survey
from kvdrift.engines.torch.unwatched import eager, evaluating, unwrapped
from kvdrift.errors import CaptureError, EngineUnavailable
from kvdrift.trace.model import Array
from kvdrift.vocabulary.facts import EngineFacts, Plant, sites_by_layer
from kvdrift.vocabulary.precision import UPPER
from kvdrift.vocabulary.sites import Site

# Tokens fed to find the roles. More than one, so that the token axis is seen; a number that no axis is likely to have.
_SURVEY_TOKENS = 5
# They lie apart, so that the rows of positions are told from theirs, and above most special tokens: some models do not
# count those of the padding.
_SURVEY_IDS = range(11, 11 + 3 * _SURVEY_TOKENS, 3)
# Options that say how many tokens a text may have.
_POSITIONS = ("max_position_embeddings", "max_target_positions", "max_seq_len")


class HFEngine(WatchedModel):
    """One transformers model; use as a context manager, which hooks the model and leaves it as it was."""

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
        inner, self._around = language_model(unwrapped(model))
        self._config: Any = text_config(inner)
        super().__init__(
            model,
            inner,
            name=name or str(getattr(inner.config, "_name_or_path", "") or type(inner).__name__),
            native=native_dtype(inner),
            layers=layers,
            by_layer=by_layer,
        )
        self.beside = BesideTokens(self.model.config, inputs)
        if self.beside.caveat is not None:
            self._caveats["TEXT_ALONE"] = self.beside.caveat
        self._forward_parameters = parameters_taken(self.model)
        self._asks_for_cache = asks_for_cache(self._forward_parameters)
        self.cache_argument = cache_argument(self.model, self._config, self._forward_parameters)
        self._seen_dtypes: set[torch.dtype] = set()
        self._tables = PositionTables(_SURVEY_TOKENS)
        self._first_position = 0

    def __enter__(self) -> HFEngine:
        try:
            self._stack.enter_context(torch.no_grad())
            self._stack.enter_context(evaluating(self.model))
            self._stack.enter_context(returning_objects(self.model))
            self._stack.callback(self.forget)
            weights_hash = hash_weights(self.model)
            roles, adapter = self._survey()
            self._layer_modules = [layer.module for layer in roles.layers]
            self._recorder = TorchRecorder(roles, self._tap)
            self._products = ProductRecorder(self.model, roles, self._recorder, self._config.vocab_size)
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

    def new_sequence(self, max_length: int, *, keep_past: bool = False) -> HFSequence:
        """Return an empty sequence that may grow to `max_length` tokens; `keep_past` prepares it to be rewound."""
        return HFSequence(self, open_cache(self._cache_kind, self._config, max_length, keep_past=keep_past))

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
            return self._unobserved_call(cache, tokens, probe, sink)
        sinks = {} if sink is None else {0: sink}
        return self.forward_rows(cache, [tokens], (0,), probes={0: probe}, sinks=sinks, replace=replace, plant=plant)[0]

    def _unobserved_call(
        self, cache: CacheAdapter, tokens: Sequence[int], probe: Sequence[int], sink: Sink | None
    ) -> int:
        """Call the model as `generate` does, which asks for the logits of the last token alone."""
        start, q_len = cache.length, len(tokens)
        ids = torch.tensor([list(tokens)], dtype=torch.long, device=self._device)
        arguments: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in self._forward_parameters else {}
        arguments |= self.beside.for_call(start, [tokens], DTYPES[self._rung], self._device)

        def call(model: Any) -> torch.Tensor:
            output = model(ids, **{self.cache_argument: cache.object}, **self._asks_for_cache, **arguments)
            logits = logits_of(output, self._config.vocab_size)
            assert logits is not None
            return logits[0]

        what = f"an unobserved call of {q_len} tokens on {start} cached ones"
        following = self.unobserved_call(cache, call, what, start=start, q_len=q_len, probe=probe, sink=sink)
        cache.advance(q_len)
        return following

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
        places = sorted({q_len - 1, *(at for lane in lanes for at in lane.row_index.tolist())})
        wanted = torch.tensor(places, device=self._device)
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
                **self._asks_for_cache,
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

    def _padding(self, pads: Sequence[int], start: int, q_len: int) -> dict[str, Any]:
        """The arguments of a call on a batch that is padded on the left, with positions as the model itself counts."""
        before = torch.tensor(pads, device=self._device)[:, None]
        slots = torch.arange(start + q_len, device=self._device)[None]
        arguments = {"attention_mask": (slots >= before).long()}
        if "position_ids" in self._forward_parameters:
            arguments["position_ids"] = (slots[:, start:] - before).clamp(min=0) + self._first_position
        return arguments

    def _first_cache(self, max_length: int) -> CacheAdapter:
        try:
            return open_cache(self._cache_kind, self._config, max_length)
        except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
            if isinstance(self._cache_kind, OwnCache):
                raise  # whose own words say more
            raise EngineUnavailable(
                f"transformers makes no {self._cache_kind} cache for {type(self.model).__name__}: "
                f"{type(error).__name__}: {first_line(error)}. Pass a cache of your own (cache=lambda: MyCache())."
            ) from error

    def _survey(self) -> tuple[ModelRoles, CacheAdapter]:
        """Watch a short forward pass and work out which module plays which role."""
        n_tokens = _SURVEY_TOKENS
        vocab = int(self._config.vocab_size)
        ids = torch.tensor([_SURVEY_IDS], device=self._device) % vocab
        packed = packed_layers(self.model)
        self._notice_compilers(lambda: self._run_unwatched(ids))
        cache = self._first_cache(n_tokens + 1)
        survey = Survey(self.model, n_tokens)
        inputs = InputsSeen(packed)
        handles = survey.hooks()
        try:
            with (
                eager(self._compiled),
                inputs.watching(),
                self._tables,
                watched_interface(lambda: self._tap, survey.attention_called),
                cache.watched(survey),
                self.model_errors(f"a first forward call of {n_tokens} tokens"),
            ):
                output = self.model(ids, **{self.cache_argument: cache.object}, **self._asks_for_cache)
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
        if "position_ids" in self._forward_parameters:
            self._first_position = first_position(
                self._tables, lambda positions: self.model(ids, position_ids=positions), n_tokens, ids.device
            )
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
        require_layers(self._layers, self._name, len(roles.layers))
        return roles, cache

    def _run_unwatched(self, ids: torch.Tensor) -> None:
        """Run a prefill and a step as they are."""
        cache = self._first_cache(ids.shape[1] + 1)
        for tokens in (ids, ids[:, :1]):
            self.model(tokens, **{self.cache_argument: cache.object}, **self._asks_for_cache)

    def _keep(self, fixed: Sequence[PackedLayer]) -> None:
        """Leave layers at their dtype on the upper rungs, and say so."""
        if not fixed:
            return
        self._kept = KeptLayers([layer.module for layer in fixed], DTYPES[self._native], lambda on: self._tap.rest(on))
        self._caveats["QUANTISED_LAYERS"] = describe_fixed(fixed, self._native)

    def _watching_around(self) -> AbstractContextManager[None]:
        return watched_interface(lambda: self._tap)

    def _with_cache(self) -> str:
        return f" with a {self._cache_kind} cache"

    def _what_to_check(self, is_native: bool) -> str:
        return what_to_check(is_native)

    @property
    def _attention(self) -> str:
        return str(getattr(self.model.config, "_attn_implementation", None) or "unknown")

    def _describe(self, roles: ModelRoles, adapter: CacheAdapter, weights_hash: str) -> EngineFacts:
        notes = self._around
        if getattr(self.model, "get_experts_implementation", None) and self.model._can_set_experts_implementation():
            notes = (*notes, "experts ran one by one (eager) on the fp32 and fp64 rungs")
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
            max_positions=positions_taken([getattr(self._config, name, None) for name in _POSITIONS], self._tables),
            parameters=sum(p.numel() for p in self.model.parameters()),
            can_rewind=adapter.why_no_rewind is None,
            why_no_rewind=adapter.why_no_rewind,
            rewinds_once=adapter.rewinds_once,
            sites=sites_by_layer(sites_of(roles, adapter.states())),
            notes=notes,
            caveats=self._caveats,
            experts_per_token=experts_per_token(self._config),
            perturbable=all(any(tap.site is Site.LAYER_IN for tap in layer.taps) for layer in roles.layers),
            versions={**describe_versions(PACKAGES), "python": platform.python_version()},
        )


__all__ = ["HFEngine", "HFSequence"]
