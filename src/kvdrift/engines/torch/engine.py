"""A model of torch that is watched while it runs: rungs, hooks, positive control and exact products.

What a call of the model is, and what its cache is, is the affair of an engine on top: that of transformers, and that of
a caller's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kvdrift.engines.base import Sink
from kvdrift.engines.torch.armed import Armed
from kvdrift.engines.torch.arrays import to_array
from kvdrift.engines.torch.attention import AttentionTap
from kvdrift.engines.torch.failures import first_line, is_ours
from kvdrift.engines.torch.frames import Lane
from kvdrift.engines.torch.packed import KeptLayers
from kvdrift.engines.torch.precision import DTYPES, at_dtype
from kvdrift.engines.torch.products import ProductRecorder
from kvdrift.engines.torch.recorder import TorchRecorder
from kvdrift.engines.torch.state import ModelState
from kvdrift.engines.torch.streaming import streamed
from kvdrift.engines.torch.unwatched import (
    Draws,
    caveats_of,
    compiled_parts,
    compilers_noticed,
    eager,
    may_compile,
    unwrapped,
)
from kvdrift.engines.torch.weights import device_of, is_wrapped
from kvdrift.errors import CaptureError, EngineUnavailable, KvdriftError, NotApplicable, UsageError
from kvdrift.trace.model import Array
from kvdrift.vocabulary.facts import Call, EngineFacts, Plant
from kvdrift.vocabulary.precision import MEASURED_PRODUCTS
from kvdrift.vocabulary.sites import Site


class HeldCache(Protocol):
    """The cache of one sequence, as far as a call on it is watched."""

    def watched(self, watcher: Any) -> AbstractContextManager[None]: ...

    def slot_offsets(self, q_len: int) -> Callable[[int, int], int]: ...

    def states(self, row: int = 0) -> Iterator[tuple[int, Site, Tensor]]: ...


def _refuse_script(model: nn.Module) -> None:
    """Refuse modules of TorchScript, which neither show what they compute nor follow to another precision.

    Raises:
        EngineUnavailable: the model has one.
    """
    found = next((name for name, part in model.named_modules() if isinstance(part, torch.jit.ScriptModule)), None)
    if found is not None:
        raise EngineUnavailable(
            f"{found or 'the model'} is a module of TorchScript (torch.jit), which cannot be watched; pass the model "
            "as it was before torch.jit.trace or torch.jit.script"
        )


class WatchedModel:
    """A model of torch with the hooks of one recorder.

    `by_layer` asks `at` to hold one layer at a time at the other precision instead of the whole model. An engine on top
    fills `_recorder`, `_products`, `_layer_modules` and `_info` when it is entered.
    """

    def __init__(
        self, given: Any, model: nn.Module, *, name: str, native: str, layers: Sequence[int] | None, by_layer: bool
    ) -> None:
        _refuse_script(model)
        self.model: Any = model
        # As callers call it: what torch.compile returned is not the model itself.
        self._whole: Any = given if model is unwrapped(given) else model
        self._name = name
        self._compiled = compiled_parts(given)
        self._caveats = dict(caveats_of(given, self._compiled))
        self._layers = None if layers is None else frozenset(layers)
        self._native = native
        self._rung = native
        self._by_layer = by_layer
        self._layer_modules: list[nn.Module] = []
        self._weights: AbstractContextManager[Any] = nullcontext()
        self._kept: KeptLayers | None = None
        self._tap = AttentionTap(unpin=False)
        self._stack, self._watch = ExitStack(), ExitStack()
        self._draws: Draws | None = None  # set while passes run unobserved
        self._recorder: TorchRecorder | None = None
        self._state = ModelState(model)
        self._products: ProductRecorder | None = None
        self._info: EngineFacts | None = None

    @property
    def info(self) -> EngineFacts:
        if self._info is None:
            kind = type(self).__name__
            raise CaptureError(f"the engine is not open; use it as a context manager: with {kind}(...) as engine")
        return self._info

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def forget(self) -> None:
        """Put back what earlier calls left in the model: attributes, and at the native dtype buffers."""
        self._state.restore(with_buffers=self._rung == self._native)

    def weight_values(self) -> Iterator[tuple[str, Array]] | None:
        """Yield the name and the values of each parameter; None for packed or quantised ones."""
        if not all(p.is_floating_point() and not p.is_meta and not is_wrapped(p) for p in self.model.parameters()):
            return None
        return ((name, to_array(p.detach())) for name, p in self.model.named_parameters())

    def _notice_compilers(self, run: Callable[[], object], *more: Any) -> None:
        """Find out whether the model compiles modules when it runs, by a short run in which nothing watches, if its own
        code or that of `more` names a compiler. What goes wrong there will go wrong again where it is reported."""
        if self._compiled or not may_compile(self.model, *more):
            return
        parts: list[str] = []
        with suppress(Exception), compilers_noticed(parts):
            run()
        self.forget()
        if parts:
            self._compiled = parts
            self._caveats |= dict(caveats_of(self.model, parts))

    def _start_watching(self) -> None:
        assert self._recorder is not None
        self._watch = ExitStack()
        self._watch.enter_context(self._recorder.attached())
        self._watch.enter_context(self._watching_around())

    def _watching_around(self) -> AbstractContextManager[None]:
        """Watch what is not a module of the model while the context is open."""
        return nullcontext()

    @contextmanager
    def unobserved(self, *, watched: bool = False) -> Iterator[Draws]:
        """Run as callers of the model do while the context is open; see `CanGoUnobserved`."""
        if self._rung != self._native and (self._compiled or self._by_layer):
            raise NotApplicable("compiled code runs at its own dtype, and weights are streamed by hooks")
        tap = self._tap
        self._draws = draws = Draws(self._device)
        if watched:
            self._use(AttentionTap(unpin=False, throughout=True))
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

    def unobserved_call(
        self,
        cache: HeldCache,
        call: Callable[[Any], Tensor],
        what: str,
        *,
        start: int,
        q_len: int,
        probe: Sequence[int],
        sink: Sink | None,
    ) -> int:
        """Make one call while passes run unobserved; see `EngineSequence.extend` and `CanGoUnobserved`.

        `call` runs the model that it is handed, and returns the logits [row, vocabulary] of which the last row is that
        of the last token; `what` names it in messages.
        """
        if list(probe) not in ([], [start + q_len - 1]):
            raise UsageError(f"an unobserved call gives the logits of its last token, and {list(probe)} was asked for")
        assert self._draws is not None
        is_watched = self._recorder is not None and self._recorder.is_attached
        watching: AbstractContextManager[Any] = nullcontext()
        if is_watched:
            watching = self.recording(cache, start=start, q_len=q_len, lanes=(), n_rows=1)
        with self.model_errors(what), watching, self._draws:
            logits = call(self.model if is_watched else self._whole)[-1:]
        if sink is not None and probe:
            sink.add_rows(None, Site.LOGITS, tuple(probe), to_array(logits))
            sink.calls.append(Call(start, q_len, start, attention=self._attention))
        return int(torch.argmax(logits[0].float()))

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

    def exact_products(self, *, whatever_dtype: bool = False) -> AbstractContextManager[None]:
        """Record every product with a weight of the model beside its exact result, at the native dtype, up to float32.

        With `whatever_dtype` at any: results are kept in float32, so that less than its rounding is not seen.
        """
        wanted = whatever_dtype or (self._rung == self._native and self._native in MEASURED_PRODUCTS)
        if self._products is None or not wanted:
            return nullcontext()
        in_parts = self._native == "float32" and not whatever_dtype
        return self._products.recorded(in_parts=in_parts)

    @contextmanager
    def recording(
        self,
        cache: HeldCache,
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
            self._tap.during(),
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

    def finish(self, lanes: tuple[Lane, ...], call: Armed, cache: HeldCache, logits: Sequence[torch.Tensor]) -> None:
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

    def _record_states(self, cache: HeldCache, call: Armed, lane: Lane) -> None:
        """Recurrent state exists only after the last token of a call, so only that position has it."""
        last = call.start + call.q_len - 1 - lane.pad
        if last not in lane.positions:
            return
        for layer, site, state in cache.states(lane.row):
            if self._layers is None or layer in self._layers:
                lane.sink.add_rows(layer, site, (last,), to_array(state.reshape(1, -1)))

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
                f"{self._name} failed at {self._rung} on {what}{self._with_cache()}: "
                f"{type(error).__name__}: {first_line(error)}. {self._what_to_check(self._rung == self._native)}"
            ) from error

    def _with_cache(self) -> str:
        """Which kind of cache a call had, for messages."""
        return ""

    def _what_to_check(self, is_native: bool) -> str:
        """What to say behind an error of the model itself; away from its own dtype, it need not run at all."""
        if is_native:
            return "Check that the model runs by itself on these prompts."
        return (
            "It runs at its own dtype, and something in it cannot compute at this one; --ladder off leaves the rung "
            "out (ladder='off')."
        )

    @property
    def _attention(self) -> str:
        """What the model calls its way to attend."""
        return "unknown"

    @property
    def _device(self) -> torch.device:
        return device_of(self.model)


__all__ = ["HeldCache", "WatchedModel"]
