"""Steps that run their model in parts: chunk by chunk, or with tokens that fill up a tile.

An engine of one's own may feed a prefill in chunks, or with as many tokens as its kernels want; a decode step may run
as the verification of several tokens. The model is then called with other tokens than the step was asked for. Each call
of it is recorded as the part that it is: its first tokens are the next ones of the step. What lies behind them, once
all of these have come, is padding, and nothing is recorded of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from kvdrift.engines.torch.frames import Lane
from kvdrift.engines.torch.recorder import Armed, first_tensor

# slot_offset of a call of so many tokens on so many cached ones; see `Armed`
Offsets = Callable[[int, int], Callable[[int, int], int]]


def tokens_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """How many tokens of one row a model is called with; None where that is not clear."""
    given = first_tensor(args, kwargs)
    given = next((each for each in kwargs.values() if isinstance(each, Tensor)), None) if given is None else given
    if given is None or given.ndim == 0:
        return None
    if not given.is_floating_point():
        return given.numel() if given.numel() == given.shape[-1] else None
    return given.shape[1] if given.ndim == 3 and given.shape[0] == 1 else None


@contextmanager
def calls_of(model: nn.Module) -> Iterator[list[int | None]]:
    """Collect how many tokens a model is called with, call by call, while the context is open."""
    found: list[int | None] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(tokens_in(args, kwargs))

    handle = model.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def in_parts(model: nn.Module, call: Armed, offsets: Offsets) -> Iterator[None]:
    """Record each call of a model as a part of the step while the context is open."""
    start, q_len, lanes, slot_offset, n_done = call.start, call.q_len, call.lanes, call.slot_offset, 0

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal n_done
        n_tokens = tokens_in(args, kwargs)
        if n_tokens is None or n_tokens == q_len:
            return
        first, n_real = n_done, min(n_tokens, q_len - n_done)
        n_done += n_real
        call.start, call.q_len, call.n_real, call.n_before = start + first, n_tokens, n_real, first
        call.lanes = tuple(_within(lane, first, n_real) for lane in lanes)
        call.lanes = tuple(lane for lane in call.lanes if lane.positions or lane.sink.inputs is not None)
        call.slot_offset, call.kv_len, call.is_behind_layers = offsets(call.start, n_real), None, False
        call.slots.clear()

    handle = model.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()
        if call.n_real is not None and call.kv_len is not None:
            call.kv_len = min(call.kv_len, call.end)
        call.start, call.q_len, call.lanes, call.slot_offset = start, q_len, lanes, slot_offset


def _within(lane: Lane, first: int, n_tokens: int) -> Lane:
    """What of a lane is recorded of tokens from the `first` on."""
    places = lane.row_index.tolist()
    chosen = [at for at, place in enumerate(places) if first <= place < first + n_tokens]
    return replace(lane, positions=tuple(lane.positions[at] for at in chosen), row_index=lane.row_index[chosen] - first)


__all__ = ["calls_of", "in_parts", "tokens_in"]
