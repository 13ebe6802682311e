"""What a planted fault is, what a clean twin is, and the counter that proves that a fault was really committed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvdrift.address import Address
from kvdrift.faults.history import SequenceLog
from kvdrift.sites import AFTER_LAYERS, BEFORE_LAYERS, Site

# What a diagnosis says where no cause of its catalogue explains enough.
UNEXPLAINED = "unexplained"

ALL_DTYPES = ("bfloat16", "float16", "float32", "float64")
HALF_DTYPES = ("bfloat16", "float16")
ABOVE_BF16 = ("float16", "float32", "float64")
FULL_DTYPES = ("float32", "float64")

# Tokens fed in one call on top of a cache: up to this many are a decode step (one token, or a few to be verified).
FEW_TOKENS = 8


class Commits:
    """Where a model is in its run while something is planted in it, and how often that was committed.

    Attributes:
        count: how often the fault was committed.
        changed: how often that changed a tensor. Where the two differ, the fault was there and had no effect.
        decoding: whether the forward pass now running is a decode step.
        past: tokens in the cache before this pass.
        q_len: tokens of this pass.
        layer: the layer whose attention is running, None outside.
        log: the calls of the sequence that runs, this one included.
        memory: what a fault keeps from one pass to the next; empty when planted.
    """

    __slots__ = ("changed", "count", "decoding", "layer", "log", "memory", "past", "q_len")

    def __init__(self) -> None:
        self.count = 0
        self.changed = 0
        self.decoding = False
        self.past = 0
        self.q_len = 0
        self.layer: int | None = None
        self.log = SequenceLog()
        self.memory: dict[Any, Any] = {}

    def take(self, before: object, after: Any) -> Any:
        """Count one commit that puts `after` in the place of `before`, and return `after`."""
        self.count += 1
        self.changed += differs(before, after)
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
FindLayer = Callable[[nn.Module], int]


def anywhere(model: nn.Module) -> str | None:
    """Every model can carry it."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A bug that is committed on decode steps.

    Attributes:
        name: unique, in words of its mechanism.
        mechanism: class of the catalogue, M01 to M25.
        reference: a real bug of the class, owner/repository#number.
        where: one sentence that says where it is planted.
        sites: sites at which it may first show: where it is planted, and the one right after it.
        cause: key of the diagnosis; faults with the same cause share it.
        also: causes that do the same to the values at the true address, so that no trace can tell them from `cause`;
            why is said where they are given.
        undiagnosable: what a diagnosis would need that no trace holds, None if its cause can be told. The right answer
            to such a fault is "unexplained".
        plant: puts it into a model; the context yields its `Commits`.
        layer: the first layer that it touches, None for the first layer of the model.
        find_layer: finds that layer where it depends on the model, such as the first one with a sliding window.
        dtypes: native dtypes at which it has any effect.
        keyed_to_dtype: whether it exists only at a half-precision native dtype and vanishes at float32 and float64.
        needs: the scenario without which it cannot be committed, None if prefill and decode suffice.
        applies: says why a model cannot carry it, None if it can.
        amount: by how much the cause is too large, relatively, for faults that are a factor; None for others.
        size: its relative effect by tensor, filled in by `kvdrift.faults.size.measured`.
    """

    name: str
    mechanism: str
    reference: str
    where: str
    sites: tuple[Site, ...]
    cause: str
    plant: Plant
    layer: int | None = None
    find_layer: FindLayer | None = None
    dtypes: tuple[str, ...] = ALL_DTYPES
    keyed_to_dtype: bool = False
    needs: str | None = None
    applies: Applies = anywhere
    size: Mapping[str, float] = field(default_factory=dict, compare=False)
    also: tuple[str, ...] = ()
    amount: float | None = None
    undiagnosable: str | None = None

    def is_cause(self, cause: str) -> bool | None:
        """Whether a diagnosis is right; None if it names nothing where nothing could be named."""
        if self.undiagnosable is not None and cause == UNEXPLAINED:
            return None
        return cause in (self.cause, *self.also)

    def first_layer(self, model: nn.Module) -> int:
        """Return the number of the first layer that it touches in `model`."""
        if self.find_layer is not None:
            return self.find_layer(model)
        return self.layer or 0

    def is_at(self, address: Address | None, model: nn.Module) -> bool:
        """Whether `address` is a true first address of this fault in `model`: the layer and the site."""
        if address is None or address.site not in self.sites:
            return False
        outside = address.site in BEFORE_LAYERS | AFTER_LAYERS
        return address.layer == (None if outside else self.first_layer(model))


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanTwin:
    """A harmless change: another way to compute the same function, which must pass.

    Attributes:
        name: unique, in words of what is computed otherwise.
        reference: a report that took such a difference for a bug, or the kernel that does it.
        why: why the function stays the same.
        plant: puts it into a model; the context yields its `Commits`.
        applies: says why a model cannot carry it, None if it can.
    """

    name: str
    reference: str
    why: str
    plant: Plant
    applies: Applies = anywhere
