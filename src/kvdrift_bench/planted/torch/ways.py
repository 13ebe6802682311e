"""The ways in which something is planted in a transformers model, decode steps only.

Each way goes through a seam that the model already has: the look-up of its attention function, the cache's `update`,
the rotation function of its modeling file, hooks and attributes of its modules. A way is opened on a model with the
`Commits` of one planting, and leaves nothing behind when it closes. Dynamic caches only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kvdrift_bench.planted.torch.history import History
from kvdrift_bench.planted.torch.model import FEW_TOKENS, Commits, Plant
from kvdrift_bench.planted.torch.parts import attention_modules, rotaries

Way = Callable[[nn.Module, Commits], AbstractContextManager[None]]


def planted(*ways: Way, fault_layer: int | None = None, everywhere: bool = False) -> Plant:
    """Return the context manager that opens `ways` together on a model and yields their `Commits`.

    Those of one layer are planted in `fault_layer`. With `everywhere` they are at work in every pass, prefill included.
    """

    @contextmanager
    def plant(model: nn.Module) -> Iterator[Commits]:
        commits = Commits()
        commits.fault_layer, commits.everywhere = fault_layer, everywhere
        with ExitStack() as stack:
            stack.enter_context(_steps(model, commits))
            for way in ways:
                stack.enter_context(way(model, commits))
            yield commits

    return plant


def beside(*others: Way) -> Callable[[Way], Way]:
    """Return the decorator of a way that opens `others` with it, before it: what notes what the way needs to know."""

    def together(way: Way) -> Way:
        @wraps(way)
        @contextmanager
        def all_of_them(model: nn.Module, commits: Commits) -> Iterator[None]:
            with ExitStack() as stack:
                for each in (*others, way):
                    stack.enter_context(each(model, commits))
                yield

        return all_of_them

    return together


@contextmanager
def _steps(model: nn.Module, commits: Commits) -> Iterator[None]:
    """Keep `commits` informed of the pass that runs: what is in the cache, how many tokens come, which layer."""
    history = History()

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values", kwargs.get("cache_params"))
        ids = kwargs.get("input_ids", args[0] if args else None)
        commits.q_len = 0 if ids is None else int(ids.shape[1])
        commits.past = cached_tokens(cache)
        commits.log = history.enter(cache, commits.past, commits.q_len, 1 if ids is None else int(ids.shape[0]))
        commits.decoding = commits.everywhere or (commits.past > 0 and 0 < commits.q_len <= FEW_TOKENS)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        commits.decoding = False

    def entering(layer: int) -> Callable[..., None]:
        def enter_attention(module: nn.Module, args: Any) -> None:
            commits.layer = layer

        return enter_attention

    def leave_attention(module: nn.Module, args: Any, output: Any) -> None:
        commits.layer = None

    handles: list[Any] = [
        model.register_forward_pre_hook(enter, with_kwargs=True),
        model.register_forward_hook(leave, always_call=True),
    ]
    for layer, module in attention_modules(model).items():
        handles.append(module.register_forward_pre_hook(entering(layer)))
        handles.append(module.register_forward_hook(leave_attention, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cached_tokens(cache: Any) -> int:
    """Return how many tokens a cache holds; 1 for a recurrent state, which does not know."""
    longest = 0
    for layer in getattr(cache, "layers", ()):
        if hasattr(layer, "get_seq_length"):
            longest = max(longest, int(layer.get_seq_length()))
        elif any(getattr(layer, "has_previous_state", {}).values()):
            longest = max(longest, 1)
    return longest


@dataclass(slots=True)
class AttentionCall:
    """What one attention function is about to be called with on a decode step.

    `query` is [1, head, token, dim], `key` and `value` are [1, kv head, key, dim].
    """

    layer: int
    module: Any
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    options: dict[str, Any]
    commits: Commits

    @property
    def operands(self) -> tuple[object, ...]:
        return self.query, self.key, self.value, self.mask, self.scale, dict(self.options)


# Changes the call in place and returns True, or returns the context [1, token, head, dim] to be used instead of what
# the model's own function would compute, or None if it has nothing to do here.
AttentionChange = Callable[[AttentionCall], Tensor | bool | None]


def in_attention(change: AttentionChange) -> Way:
    """Change what attention works with, or the attention function itself."""

    @wraps(change)
    @contextmanager
    def way(model: nn.Module, commits: Commits) -> Iterator[None]:
        from transformers import AttentionInterface

        name = "get_interface"
        original = AttentionInterface.__dict__[name]

        def get_interface(self: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
            function = original(self, *args, **kwargs)

            def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
                if not commits.decoding or commits.layer is None:
                    return function(module, query, key, value, mask, **options)
                scale = options.pop("scaling", None) or query.shape[-1] ** -0.5
                call = AttentionCall(commits.layer, module, query, key, value, mask, scale, options, commits)
                before = call.operands
                result = change(call)
                if isinstance(result, Tensor):
                    return commits.take(query, result), None
                if result:
                    commits.take(before, call.operands)
                options = {**call.options, "scaling": call.scale}
                return function(module, call.query, call.key, call.value, call.mask, **options)

            return attention

        setattr(AttentionInterface, name, get_interface)
        try:
            yield
        finally:
            setattr(AttentionInterface, name, original)

    return way


@dataclass(slots=True)
class CacheCall:
    """One cache update on a decode step: the rows that come in, or, once they are in, all rows that are handed back.

    `keys` and `values` are [1, kv head, row, dim]; `layers` are the layers of the cache.
    """

    layer: int
    keys: Tensor
    values: Tensor
    layers: Any
    commits: Commits


CacheChange = Callable[[CacheCall], tuple[Tensor, Tensor] | None]


def in_writes(change: CacheChange) -> Way:
    """Change the new rows before they are stored."""
    return _in_cache(change, stored=True)


def in_reads(change: CacheChange) -> Way:
    """Change what the cache hands back, and not what is stored."""
    return _in_cache(change, stored=False)


def _in_cache(change: CacheChange, *, stored: bool) -> Way:
    @wraps(change)
    @contextmanager
    def way(model: nn.Module, commits: Commits) -> Iterator[None]:
        from transformers.cache_utils import Cache

        name = "update"
        original = Cache.__dict__[name]

        def update(self: Any, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
            if commits.decoding and stored:
                new = change(CacheCall(layer, keys, values, self.layers, commits))
                keys, values = (keys, values) if new is None else commits.take((keys, values), new)
            result = original(self, keys, values, layer, *args, **kwargs)
            if commits.decoding and not stored:
                new = change(CacheCall(layer, result[0], result[1], self.layers, commits))
                return result if new is None else commits.take(result, new)
            return result

        setattr(Cache, name, update)
        try:
            yield
        finally:
            setattr(Cache, name, original)

    return way


def in_positions(change: Callable[[Tensor, Commits], Tensor | None]) -> Way:
    """Change the positions [1, token] that the model is called with."""

    @wraps(change)
    @contextmanager
    def way(model: Any, commits: Commits) -> Iterator[None]:
        def shift(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if not commits.decoding or ids is None:
                return None
            right = torch.arange(commits.past, commits.past + commits.q_len, device=ids.device)[None]
            wrong = change(right, commits)
            if wrong is None:
                return None
            return args, {**kwargs, "position_ids": commits.take(right, wrong)}

        handle = model.base_model.register_forward_pre_hook(shift, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    return way


@dataclass(slots=True)
class Rotation:
    """One call of the function that rotates new queries and keys: its operands, its result, and the function.

    `module` computed `cos` and `sin` for `positions`; `tables` computes them for other positions.
    """

    layer: int
    q: Tensor
    k: Tensor
    cos: Tensor
    sin: Tensor
    rotated: tuple[Tensor, Tensor]
    rotate: Callable[..., tuple[Tensor, Tensor]]
    commits: Commits
    module: nn.Module
    positions: Tensor
    tables: Callable[[Tensor], tuple[Tensor, Tensor]]


RotationChange = Callable[[Rotation], tuple[Tensor, Tensor] | None]
_Tables = tuple[Tensor, nn.Module, Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]


def in_rotation(change: RotationChange) -> Way:
    """Change the rotated queries and keys of the new tokens."""

    @wraps(change)
    @contextmanager
    def way(model: nn.Module, commits: Commits) -> Iterator[None]:
        made: list[_Tables] = []
        name = "apply_rotary_pos_emb"

        def after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            rest = list(args)
            positions = kwargs["position_ids"] if "position_ids" in kwargs else rest[1]

            def tables(at: Tensor) -> tuple[Tensor, Tensor]:
                if "position_ids" in kwargs:
                    found = type(module).forward(module, *rest, **{**kwargs, "position_ids": at})
                else:
                    found = type(module).forward(module, rest[0], at, *rest[2:], **kwargs)
                return found[0], found[1]

            made.append((output[0], module, positions, tables))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            made.clear()

        with ExitStack() as stack:
            for rotary in rotaries(model):
                stack.callback(rotary.register_forward_hook(after, with_kwargs=True).remove)
            stack.callback(model.register_forward_hook(leave, always_call=True).remove)
            for source in {type(module).__module__ for module in attention_modules(model).values()}:
                original = getattr(sys.modules[source], name)
                stack.enter_context(_set(sys.modules[source], name, _rotating(original, change, commits, made)))
            yield

    return way


def _rotating(
    original: Callable[..., Any], change: RotationChange, commits: Commits, made: list[_Tables]
) -> Callable[..., Any]:
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        rotated = original(q, k, cos, sin, *args, **kwargs)
        found = next((tables for tables in made if tables[0] is cos), None)
        if not commits.decoding or commits.layer is None or found is None:
            return rotated
        wrong = change(Rotation(commits.layer, q, k, cos, sin, rotated, original, commits, *found[1:]))
        return rotated if wrong is None else commits.take(rotated, wrong)

    return apply


Call = TypeVar("Call", AttentionCall, CacheCall, Rotation)
Result = TypeVar("Result")


def in_one_layer(change: Callable[[Call], Result | None]) -> Callable[[Call], Result | None]:
    """Make a change in the layer that faults of one layer are planted in, and in no other."""

    @wraps(change)
    def here(call: Call) -> Result | None:
        return change(call) if call.layer == call.commits.fault_layer else None

    return here


@contextmanager
def _set(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
