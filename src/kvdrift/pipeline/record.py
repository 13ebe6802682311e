"""The passes of an engine that can only run, written as traces that are judged elsewhere. Only composes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvdrift.capture.modes import capture_prompt, continue_greedily
from kvdrift.capture.prompts import tokenize
from kvdrift.engines.base import CanBeOpened, LiveEngine
from kvdrift.engines.own.engine import Engine
from kvdrift.errors import UsageError
from kvdrift.trace.model import Trace
from kvdrift.trace.writer import Writer
from kvdrift.vocabulary.facts import Prompt
from kvdrift.vocabulary.plan import AuditPlan, Mode, PairRole
from kvdrift.vocabulary.precision import UPPER

_MODES = (Mode.AS_DESIGNED, Mode.KV_ALIGNED)


def record(
    step: Any,
    directory: str | Path,
    *,
    prompts: Mapping[str, Sequence[int]],
    span: int = 4,
    new_cache: Callable[[int], Any] | None = None,
    rewind: Callable[[Any, int], Any] | None = None,
    cast: Callable[[str], None] | None = None,
    name: str | None = None,
) -> Path:
    """Run prefill and decode of each prompt, and write what was seen of them as traces: `kvdrift judge DIRECTORY`.

    Args:
        step: `step(tokens, cache, start, see)` runs the model as `kvdrift.Engine.extend` does, and hands values over by
            `x = see(layer, site, x)`; or a `kvdrift.Engine`, to which the functions below belong then.
        directory: is created; it may exist if it is empty.
        prompts: token ids by name.
        span: how many tokens after each prompt are decoded: the engine's own most likely ones.
        new_cache: `new_cache(max_length)` returns an empty cache; without it the first cache is None.
        rewind: as in `kvdrift.Engine`; without it kv_aligned is not recorded.
        cast: as in `kvdrift.Engine`; without it nothing is recorded at float64.
        name: what the engine is called.

    Raises:
        UsageError: an argument is of another kind, or the directory holds something.
        CaptureError: the engine failed.
    """
    engine = _engine_of(step, {"new_cache": new_cache, "rewind": rewind, "cast": cast}, name)
    with engine.opened(AuditPlan(span=span)) as opened:
        live = opened.engine
        info = live.info
        ids = tokenize(prompts, opened.encode, vocab_size=info.vocab_size, max_positions=info.max_positions, span=span)
        writer = Writer(
            directory,
            engine=info.engine,
            model=info.model,
            dtype=info.dtype,
            n_layers=info.n_layers,
            model_hash=info.model_hash,
            vocab_size=info.vocab_size,
            max_positions=info.max_positions,
            parameters=info.parameters,
            versions=dict(info.versions),
            notes=list(info.notes),
        )
        fixed = [Prompt(each, tokens, continue_greedily(live, tokens, span)) for each, tokens in ids.items()]
        for prompt in fixed:
            _write(live, writer, prompt, info.dtype)
        if info.dtype != UPPER and _can_cast(engine):
            with live.at(UPPER):
                for prompt in fixed:
                    _write(live, writer, prompt, UPPER)
        writer.finish()
    return writer.directory


def _can_cast(engine: CanBeOpened) -> bool:
    return not isinstance(engine, Engine) or engine.can("cast")


def _write(engine: LiveEngine, writer: Writer, prompt: Prompt, rung: str) -> None:
    """Write the passes of one prompt: a prefill once, however many pairs it is in."""
    written: set[int] = set()

    def add(trace: Trace, **kind: Any) -> None:
        if id(trace) not in written:
            written.add(id(trace))
            writer.add(trace, **kind)

    for item in list(capture_prompt(engine, prompt, _MODES, rung)):
        if item.role is PairRole.PAIR:
            add(item.pair.prefill)
            add(item.pair.decode, mode=item.pair.mode)
        elif item.role is PairRole.SELF_NOISE:
            add(item.pair.decode, again=True)


def _engine_of(step: Any, functions: Mapping[str, Any], name: str | None) -> CanBeOpened:
    """Return the engine whose `extend` is `step`."""
    given = {key: value for key, value in {**functions, "name": name}.items() if value is not None}
    if isinstance(step, CanBeOpened):
        if given:
            raise UsageError(f"{next(iter(given))}= goes with a function, and {step!r} is an engine; leave it out")
        return step
    for key, function in {"step": step, **functions}.items():
        if function is not None and not callable(function):
            raise UsageError(f"{key}= is of type {type(function).__name__}; pass a function")
    if not callable(step):
        raise UsageError("step= is missing; pass step(tokens, cache, start, see)")

    def extend(self: Engine, tokens: list[int], cache: Any, start: int) -> Any:
        return step(tokens, cache, start, self.see)

    def bound(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda _self, *arguments: function(*arguments)

    methods = {key: bound(function) for key, function in functions.items() if function is not None}
    made = type(getattr(step, "__name__", "engine"), (Engine,), {"extend": extend, "name": name, **methods})()
    assert isinstance(made, Engine)
    return made


__all__ = ["record"]
