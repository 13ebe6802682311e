"""Any model of torch that decodes with a cache, as an engine: a caller says how a step is made."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kvdrift.engines.base import OpenEngine, Sink, require_layers
from kvdrift.engines.own.named import Names, container_of, named_sites, with_named
from kvdrift.engines.own.parts import FedIn, OwnRows, calls_of, in_parts
from kvdrift.engines.torch.armed import Armed
from kvdrift.engines.torch.computed import with_dtypes
from kvdrift.engines.torch.engine import WatchedModel
from kvdrift.engines.torch.facts import describe_versions, hash_weights, sites_of
from kvdrift.engines.torch.precision import native_dtype
from kvdrift.engines.torch.products import ProductRecorder
from kvdrift.engines.torch.recorder import TorchRecorder
from kvdrift.engines.torch.roles import ModelRoles, Survey
from kvdrift.engines.torch.seen import AttentionSeen, BatchRow
from kvdrift.engines.torch.unwatched import caveats_of, compiled_in, eager, evaluating, unwrapped
from kvdrift.errors import CaptureError, EngineUnavailable, UsageError
from kvdrift.trace.model import Array
from kvdrift.vocabulary.facts import EngineFacts, Plant, sites_by_layer
from kvdrift.vocabulary.plan import AuditPlan
from kvdrift.vocabulary.sites import EXPECTED_SITES, Site

# Tokens fed to find the roles. More than one, so that the token axis is seen; a number that no axis is likely to have.
_SURVEY_TOKENS = 5

Step = Callable[[Tensor, Any, int], Any]
NewCache = Callable[[int], Any]
Rewind = Callable[[Any, int], Any]


class TorchEngine:
    """A model of torch, with what of its decoding only its author knows.

    Args:
        model: holds the weights; its modules are watched, its precision is changed for the ladder and put back.
        step: `step(tokens, cache, start)` runs the model on `tokens` [1, n] on top of a cache that holds `start`
            tokens, and returns the logits [1, n, vocabulary] of all of them, or (logits, cache) where each call makes
            a new cache.
        new_cache: `new_cache(max_length)` returns an empty cache for so many tokens, in the dtype that the model has
            at that moment (the ladder changes it). Two of them must not share memory.
        rewind: `rewind(cache, length)` keeps the first `length` tokens of a cache, and returns the cache to go on with,
            or None for the same one. Without it the mode kv_aligned is not run, so that a fault of the cache and one
            of the computation cannot be told apart.
        sites: names of sites by the paths of modules, {i} for the number of the layer; what is not named is found by
            what modules read and write, as far as that goes.
        name: what reports call it; default: the class of the model.
        max_length: most tokens that a cache may hold; None for no limit.

    Raises:
        UsageError: an argument is of another kind, or a site is misspelt.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        step: Step,
        new_cache: NewCache,
        rewind: Rewind | None = None,
        sites: Mapping[str, Names] | None = None,
        name: str | None = None,
        max_length: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UsageError(f"the model of a TorchEngine is of type {type(model).__name__}; pass a torch.nn.Module")
        wanted = {"step": step, "new_cache": new_cache, **({} if rewind is None else {"rewind": rewind})}
        for argument, function in wanted.items():
            if not callable(function):
                raise UsageError(f"{argument}= is of type {type(function).__name__}; pass a function")
        self.model, self.step, self.new_cache, self.rewind = model, step, new_cache, rewind
        self.name = name or type(unwrapped(model)).__name__
        self.max_length = max_length
        self.container = container_of(sites or {})
        self.named = named_sites(unwrapped(model), sites or {})

    @contextmanager
    def opened(self, plan: AuditPlan) -> Iterator[OpenEngine]:
        """Watch the model while the context is open, and leave it as it was."""
        with OwnTorchEngine(self, layers=plan.layers, by_layer=plan.ladder == "layer") as engine:
            yield OpenEngine(engine, None)


class OwnTorchEngine(WatchedModel):
    """A `TorchEngine` that is open."""

    def __init__(self, given: TorchEngine, *, layers: Sequence[int] | None, by_layer: bool) -> None:
        model = unwrapped(given.model)
        super().__init__(
            given.model, model, name=given.name, native=native_dtype(model), layers=layers, by_layer=by_layer
        )
        self.given, self._n_survey = given, _SURVEY_TOKENS
        self._rows = OwnRows()
        self._is_counted = False  # whether what the model is called with tells how many tokens it runs
        if parts := [f"{name} in step=" for name in compiled_in(given.step) if not self._compiled]:
            self._compiled = parts
            self._caveats |= dict(caveats_of(model, parts))

    def __enter__(self) -> OwnTorchEngine:
        try:
            self._stack.enter_context(torch.no_grad())
            self._stack.enter_context(evaluating(self.model))
            self._stack.callback(self.forget)
            weights_hash = hash_weights(self.model)
            roles, vocab_size, seen_dtypes = self._survey()
            self._layer_modules = [layer.module for layer in roles.layers]
            if self._by_layer and any(layer.enters is not None for layer in roles.layers):
                raise UsageError(
                    f"--ladder layer converts a layer when it is called, and the layers of {self._name} are lists of "
                    "modules that are called one by one; use --ladder model (ladder='model')"
                )
            self._recorder = TorchRecorder(roles, self._tap)
            self._products = ProductRecorder(self.model, roles, self._recorder, vocab_size)
            self._stack.callback(lambda: self._watch.close())
            self._start_watching()
            facts = self._describe(roles, vocab_size, weights_hash)
            self._info = with_dtypes(facts, seen_dtypes, self.new_sequence, self._n_survey)
        except BaseException:
            self._stack.close()
            raise
        return self

    def new_sequence(self, max_length: int, *, keep_past: bool = False) -> OwnSequence:
        """Return an empty sequence in a cache of its own."""
        most = self.given.max_length
        if most is not None and max_length > most:
            raise CaptureError(f"{max_length} tokens are wanted, and a cache of {self._name} holds {most}")
        with self.model_errors(f"new_cache({max_length})"):
            return OwnSequence(self, self.given.new_cache(max_length))

    def run(
        self,
        sequence: OwnSequence,
        tokens: Sequence[int],
        *,
        probe: Sequence[int],
        sink: Sink | None,
        replace: Mapping[int, Array],
        plant: Plant | None,
    ) -> int:
        """Run one step of a sequence; see `EngineSequence.extend`."""
        start, q_len = sequence.length, len(tokens)
        if self._draws is not None:
            what = f"an unobserved step of {q_len} tokens on {start} cached ones"
            return self.unobserved_call(
                _Slots(start),
                lambda _model: self._step(sequence, tokens),
                what,
                start=start,
                q_len=q_len,
                probe=probe,
                sink=sink,
            )
        lanes = () if sink is None else (self.lane(0, 0, probe, sink, start, q_len),)
        holder = _Slots(start)
        with (
            self.model_errors(f"a step of {q_len} tokens on {start} cached ones"),
            self.recording(
                holder, start=start, q_len=q_len, lanes=lanes, n_rows=1, replace=replace, plant=plant
            ) as call,
            self._in_parts(call, tokens),
        ):
            logits = self._step(sequence, tokens)
        if plant is not None and plant.site is Site.LOGITS:
            logits = logits * plant.factor
        self.finish(lanes, call, holder, [_probed(logits, lane.row_index, q_len) for lane in lanes])
        return int(torch.argmax(logits[-1].float()))

    def _in_parts(self, call: Armed, tokens: Sequence[int]) -> AbstractContextManager[None]:
        """Record each call of the model as a part of the step, where its tokens can be counted."""
        if not self._is_counted:
            return nullcontext()
        return in_parts(
            self.model, call, lambda start, n_tokens: _Slots(start).slot_offsets(n_tokens), tokens, self._rows
        )

    def _step(self, sequence: OwnSequence, tokens: Sequence[int]) -> Tensor:
        """Return the logits [token, vocabulary] of a step, which may be those of the last token alone."""
        ids = torch.tensor([list(tokens)], dtype=torch.long, device=self._device)
        given = self.given.step(ids, sequence.cache, sequence.length)
        if isinstance(given, tuple) and len(given) == 2:
            given, sequence.cache = given
        if not isinstance(given, Tensor):
            raise UsageError(
                f"step= returned {type(given).__name__}; it must return logits [1, token, vocabulary], or (logits, "
                "cache)"
            )
        logits = given[self._rows.known(len(given)) if len(given) > 1 else 0] if given.ndim == 3 else given
        if logits.ndim != 2 or len(logits) not in (1, len(tokens)):
            raise UsageError(
                f"step= returned a tensor of shape {list(given.shape)} for {len(tokens)} tokens; it must return logits "
                "[1, token, vocabulary]"
            )
        sequence.length += len(tokens)
        return logits

    @property
    def _attention(self) -> str:
        return "torch"

    def _survey(self) -> tuple[ModelRoles, int, set[torch.dtype]]:
        """Watch a short step and work out which module plays which role.

        A step that runs its model on more or fewer tokens is watched once more, with so many that all are in one call.
        """
        self._notice_compilers(self._run_unwatched, self.given.step)
        survey, logits, fed = self._surveyed(_SURVEY_TOKENS)
        batch = fed[0].batch if fed else None
        first = fed[0].n_tokens if fed else None
        if first is not None and first != _SURVEY_TOKENS and survey.is_in_parts(self.given.container):
            n_fed = sum(each.n_tokens or 0 for each in fed)
            self._n_survey = first if first > 1 and n_fed >= _SURVEY_TOKENS else _SURVEY_TOKENS
        if self._n_survey != _SURVEY_TOKENS or batch is not None:
            survey, logits, fed = self._surveyed(self._n_survey, batch)
        self._is_counted = bool(fed) and fed[0].n_tokens == self._n_survey
        if (looped := survey.looped()) is not None:
            raise EngineUnavailable(
                f"{self._name} runs its layer {looped[0]} {looped[1]} times in one step, and an address has no place "
                "for that; models whose layers run once can be audited."
            )
        roles = survey.roles(self.given.container)
        if roles is None and not any(True for _ in self.model.children()):
            raise CaptureError(
                f"{self._name} is one module without parts, and nothing inside of it can be watched from outside: give "
                "its layers modules of their own, or pass a kvdrift.Engine, whose extend hands over the values by see "
                "(docs/engines/own.md)"
            )
        if roles is None:
            raise CaptureError(
                f"no stack of layers was found in {self._name}: no module in a ModuleList called attention; name the "
                "layers by sites={'path.{i}': ...}. Layers that are no modules cannot be watched from outside: pass a "
                "kvdrift.Engine, whose step hands over the values itself (docs/engines/own.md)"
            )
        with_named(roles, self.model, self.given.named)
        require_layers(self._layers, self._name, len(roles.layers))
        return roles, logits.shape[-1], survey.dtypes()

    def _run_unwatched(self) -> None:
        """Run a prefill and a step as they are."""
        sequence = self.new_sequence(_SURVEY_TOKENS + 1)
        for n_tokens in (_SURVEY_TOKENS, 1):
            self._step(sequence, [1 + at % _SURVEY_TOKENS for at in range(n_tokens)])

    def _surveyed(self, n_tokens: int, batch: Tensor | None = None) -> tuple[Survey, Tensor, list[FedIn]]:
        """Watch a step of so many tokens, in its row of a `batch` that is known; return its logits as well, and what
        each call of the model was given."""
        tokens = [1 + at % _SURVEY_TOKENS for at in range(n_tokens)]
        row = None if batch is None else self._rows.of(batch, tokens)
        at = BatchRow() if batch is None or row is None else BatchRow(row, len(batch))
        survey = Survey(self.model, n_tokens, at)
        sequence = self.new_sequence(n_tokens + 1)
        handles = survey.hooks()
        try:
            with (
                calls_of(self.model) as fed,
                eager(self._compiled),
                AttentionSeen(n_tokens, survey.kernel_called, at),
                self.model_errors(f"a first step of {n_tokens} tokens"),
            ):
                logits = self._step(sequence, tokens)
        finally:
            for handle in handles:
                handle.remove()
        if len(logits) != n_tokens:
            raise UsageError(
                f"step= returned the logits of {len(logits)} of {n_tokens} tokens; prefill is compared at every "
                "token, so it must return those of all"
            )
        return survey, logits, fed

    def _describe(self, roles: ModelRoles, vocab_size: int, weights_hash: str) -> EngineFacts:
        sites = sites_of(roles, ())
        no_way_back = "it has no rewind; pass rewind=... to TorchEngine"
        return EngineFacts(
            engine="own",
            model=self._name,
            model_hash=weights_hash,
            dtype=self._native,
            device=str(self._device),
            attention=self._attention,
            cache="own",
            n_layers=len(roles.layers),
            vocab_size=vocab_size,
            max_positions=self.given.max_length,
            parameters=sum(p.numel() for p in self.model.parameters()),
            can_rewind=self.given.rewind is not None,
            why_no_rewind=None if self.given.rewind is not None else no_way_back,
            sites=sites_by_layer(sites),
            notes=(self._found(sites),),
            caveats=self._caveats,
            perturbable=all(any(tap.site is Site.LAYER_IN for tap in layer.taps) for layer in roles.layers),
            versions={**describe_versions(("kvdrift", "torch", "numpy")), "python": platform.python_version()},
        )

    def _found(self, sites: Mapping[int | None, Sequence[Site]]) -> str:
        """Say which sites the caller named, which were found, and which were not."""
        offered = {site for found in sites.values() for site in found}
        named = {item.site for item in self.given.named}
        parts = (
            ("named by the caller", [site for site in Site if site in named]),
            ("found by what modules read and write", [site for site in Site if site in offered - named]),
            ("not found", [site for site in EXPECTED_SITES if site not in offered]),
        )
        return "sites " + "; ".join(f"{text}: {', '.join(found)}" for text, found in parts if found)


class OwnSequence:
    """A token sequence in a cache of the caller's own."""

    def __init__(self, engine: OwnTorchEngine, cache: Any) -> None:
        self._engine = engine
        self.cache = cache
        self.length = 0

    def extend(
        self,
        tokens: Sequence[int],
        *,
        probe: Sequence[int] = (),
        sink: Sink | None = None,
        replace: Mapping[int, Array] | None = None,
        plant: Plant | None = None,
    ) -> int:
        return self._engine.run(self, tokens, probe=probe, sink=sink, replace=replace or {}, plant=plant)

    def rewind(self, n_tokens: int) -> None:
        if not 0 <= n_tokens <= self.length:
            raise UsageError(f"cannot rewind {n_tokens} tokens of a sequence of {self.length}")
        back = self._engine.given.rewind
        if back is None:
            raise CaptureError("cannot rewind: the engine has no rewind")
        with self._engine.model_errors(f"rewind to {self.length - n_tokens} tokens"):
            after = back(self.cache, self.length - n_tokens)
        self.cache = self.cache if after is None else after
        self.length -= n_tokens

    def close(self) -> None:
        self.cache = None


class _Slots:
    """Which slots the keys of a call have: the first ones of a buffer that is larger, or the last ones of all."""

    def __init__(self, start: int) -> None:
        self._start = start

    @contextmanager
    def watched(self, watcher: Any) -> Iterator[None]:
        yield

    def slot_offsets(self, q_len: int) -> Callable[[int, int], int]:
        return lambda _layer, n_keys: max(0, self._start + q_len - n_keys)

    def states(self, row: int = 0) -> Iterator[tuple[int, Site, Tensor]]:
        return iter(())


def _probed(logits: Tensor, index: Tensor, q_len: int) -> Tensor:
    """The logits of the probed tokens; a step may return those of its last token alone, if no other is probed."""
    if len(logits) == q_len:
        return logits[index]
    if index.tolist() not in ([], [q_len - 1]):
        raise UsageError("step= returned the logits of its last token alone, and those of others are compared")
    return logits[-1:] if len(index) else logits[:0]


__all__ = ["NewCache", "OwnSequence", "OwnTorchEngine", "Rewind", "Step", "TorchEngine"]
