"""Steps that run their model in parts: chunk by chunk, or with tokens that fill up a tile.

An engine of one's own may feed a prefill in chunks, or with as many tokens as its kernels want; a decode step may run
as the verification of several tokens. The model is then called with other tokens than the step was asked for. Each call
of it is recorded as the part that it is: its first tokens are the next ones of the step. What lies behind them, once
all of these have come, is padding, and nothing is recorded of it. Neither is anything of the other rows of a batch:
other sequences, or what fills it up to as many rows as a kernel wants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvdrift.engines.torch.armed import Armed
from kvdrift.engines.torch.frames import Lane
from kvdrift.engines.torch.residual import first_tensor

# slot_offset of a call of so many tokens on so many cached ones; see `Armed`
Offsets = Callable[[int, int], Callable[[int, int], int]]


class FedIn(NamedTuple):
    """What a model is called with: how many tokens a row has, None where that is not clear, and the tokens [row,
    token] of a batch of several rows."""

    n_tokens: int | None
    batch: Tensor | None = None


def fed_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> FedIn:
    """Return what a model is called with."""
    given = first_tensor(args, kwargs)
    given = next((each for each in kwargs.values() if isinstance(each, Tensor)), None) if given is None else given
    if given is None or given.ndim == 0:
        return FedIn(None)
    if not given.is_floating_point():
        if given.numel() == given.shape[-1]:
            return FedIn(given.numel())
        return FedIn(given.shape[1], given) if given.ndim == 2 else FedIn(None)
    return FedIn(given.shape[1] if given.ndim == 3 and given.shape[0] == 1 else None)


@dataclass(slots=True)
class OwnRows:
    """Which row of a batch belongs to a step, by the number of rows: the one that holds its tokens.

    Where several rows do, as where padding repeats a token, it is the row of the step before, or else the first.
    """

    _known: dict[int, int] = field(default_factory=dict)

    def of(self, batch: Tensor, tokens: Sequence[int]) -> int | None:
        """Return the row whose first tokens are these, None if none has them."""
        wanted = torch.tensor([*tokens], dtype=batch.dtype, device=batch.device)
        found = (batch[:, : len(wanted)] == wanted).all(1).nonzero()[:, 0].tolist()
        n_rows = len(batch)
        if not found:
            return None
        if len(found) == 1 or self._known.get(n_rows) not in found:
            self._known[n_rows] = int(found[0])
        return self._known[n_rows]

    def known(self, n_rows: int) -> int:
        """Return the row of the last batch of so many rows, the first one if there was none."""
        return self._known.get(n_rows, 0)


@contextmanager
def calls_of(model: nn.Module) -> Iterator[list[FedIn]]:
    """Collect what a model is called with, call by call, while the context is open."""
    found: list[FedIn] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(fed_in(args, kwargs))

    handle = model.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def in_parts(model: nn.Module, call: Armed, offsets: Offsets, tokens: Sequence[int], rows: OwnRows) -> Iterator[None]:
    """Record each call of a model as a part of the step that feeds `tokens` while the context is open."""
    start, q_len, lanes, slot_offset, n_done = call.start, call.q_len, call.lanes, call.slot_offset, 0

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal n_done
        n_tokens, batch = fed_in(args, kwargs)
        if n_tokens is None or (n_tokens == q_len and batch is None):
            return
        first, n_real = n_done, min(n_tokens, q_len - n_done)
        row = 0 if batch is None else rows.of(batch, tokens[first : first + n_real])
        if row is None:
            return
        n_done += n_real
        call.row, call.n_rows = row, 1 if batch is None else len(batch)
        call.start, call.q_len, call.n_real, call.n_before = start + first, n_tokens, n_real, first
        call.lanes = tuple(replace(_within(lane, first, n_real), row=row) for lane in lanes)
        call.lanes = tuple(lane for lane in call.lanes if lane.positions or lane.sink.inputs is not None)
        call.slot_offset, call.kv_len, call.is_behind_layers = offsets(call.start, n_real), None, False
        call.slots.clear()
        call.handed_on.clear()

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


__all__ = ["FedIn", "OwnRows", "calls_of", "fed_in", "in_parts"]
