"""One forward call that is being recorded: what is wanted of it, and where its tokens are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvdrift.engines.torch.frames import Lane
from kvdrift.trace.model import Array, Slots
from kvdrift.vocabulary.facts import Plant


@dataclass(slots=True)
class Armed:
    """One forward call that is being recorded.

    `slot_offset` says, for a layer and its number of keys, which slot its first cached key holds: its logical position,
    were there no padding.
    `lanes` are the rows of the batch that are recorded; `held` is how many slots the cache held before the call.
    `overflow` is the first place at which a value is not finite, in a call at float16.
    Where the model runs a part of the tokens, or has others behind them, `n_before` of the call's tokens came before,
    and the first `n_real` of this part, in the given `row`, are its tokens; None: all are.
    `is_behind_layers` turns true when the last layer has run: a model may use its final norm before the first one as
    well.
    """

    start: int
    q_len: int
    lanes: tuple[Lane, ...]
    n_rows: int
    held: int
    replace: Mapping[int, Array]
    plant: Plant | None
    dtype: torch.dtype
    wide: torch.dtype
    slot_offset: Callable[[int, int], int]
    layers: frozenset[int] | None
    kv_len: int | None = None
    n_before: int = 0
    n_real: int | None = None
    row: int = 0
    kernels: set[str] | None = None
    is_behind_layers: bool = False
    was_planted: bool = False
    overflow: str | None = None
    # The layers whose context was read where it is handed on to an output projection.
    handed_on: set[int] = field(default_factory=set)
    # Slots of each number of keys, which most layers have in common.
    slots: dict[tuple[int, int, int, int], tuple[Slots, slice]] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """How many slots hold tokens behind this call, or this part of it."""
        return self.start + (self.q_len if self.n_real is None else self.n_real)

    def put_in(self, given: Tensor, hidden: Tensor) -> Tensor:
        """Return `given` [token, ...] of all tokens of the call in the place of those of `hidden` [row, token, ...]."""
        if self.n_real is None:
            return given.reshape(hidden.shape)
        value = hidden.clone()
        rows = given.reshape(-1, *hidden.shape[2:])[self.n_before : self.n_before + self.n_real]
        value[self.row, : self.n_real] = rows
        return value


__all__ = ["Armed"]
