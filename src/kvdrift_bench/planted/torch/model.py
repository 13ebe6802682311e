"""What is planted in a torch model: a fault or a clean twin, and the counter that proves that it was committed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvdrift.vocabulary.address import Address
from kvdrift_bench.planted.facts import ALL_DTYPES, FaultFacts, Tally, TwinFacts, anywhere
from kvdrift_bench.planted.torch.history import SequenceLog

# Tokens fed in one call on top of a cache: up to this many are a decode step (one token, or a few to be verified).
FEW_TOKENS = 8


class Commits(Tally):
    """Where a model is in its run while something is planted in it, and how often that was committed.

    Attributes:
        decoding: whether what is planted is at work in the forward pass now running: in a decode step, or in any pass
            if it is planted everywhere.
        everywhere: whether it is planted in every pass.
        past: tokens in the cache before this pass.
        q_len: tokens of this pass.
        layer: the layer whose attention is running, None outside.
        log: the calls of the sequence that runs, this one included.
    """

    __slots__ = ("decoding", "everywhere", "layer", "log", "past", "q_len")

    def __init__(self) -> None:
        super().__init__()
        self.decoding = False
        self.everywhere = False
        self.past = 0
        self.q_len = 0
        self.layer: int | None = None
        self.log = SequenceLog()

    def take(self, before: object, after: Any) -> Any:
        """Count one commit that puts `after` in the place of `before`, and return `after`."""
        self.note(changed=differs(before, after))
        return after


def differs(before: object, after: object) -> bool:
    """Whether two values are anything but the same bits."""
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        same = before.shape == after.shape and before.dtype == after.dtype
        return not (same and bool(torch.equal(before, after)))
    if isinstance(before, tuple | list) and isinstance(after, tuple | list):
        return len(before) != len(after) or any(differs(b, a) for b, a in zip(before, after, strict=True))
    if isinstance(before, Tensor) or isinstance(after, Tensor):
        return True
    return bool(before != after)


Plant = Callable[[nn.Module], AbstractContextManager[Commits]]
Applies = Callable[[nn.Module], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault(FaultFacts):
    """A bug that is committed on decode steps of a torch model.

    Attributes:
        plant: puts it into a model; the context yields its `Commits`.
        dtypes: native dtypes at which it has any effect.
        needs: the scenario without which it cannot be committed, None if prefill and decode suffice.
        applies: says why a model cannot carry it, None if it can.
        size: its relative effect by tensor, filled in by `kvdrift_bench.planted.torch.size.measured`.
    """

    plant: Plant
    dtypes: tuple[str, ...] = ALL_DTYPES
    needs: str | None = None
    applies: Applies = anywhere
    size: Mapping[str, float] = field(default_factory=dict, compare=False)

    def is_at(self, address: Address | None, model: nn.Module) -> bool:
        """Whether `address` is a true first address of this fault in `model`: the layer and the site."""
        return address is not None and (address.layer, address.site) in self.places(model)


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanTwin(TwinFacts):
    """A harmless change of a torch model.

    Attributes:
        plant: puts it into a model; the context yields its `Commits`.
        applies: says why a model cannot carry it, None if it can.
    """

    plant: Plant
    applies: Applies = anywhere
