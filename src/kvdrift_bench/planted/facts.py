"""What is known of a fault and of a clean twin, whatever engine they are planted in. Loads no framework."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import AFTER_LAYERS, BEFORE_LAYERS, Site

ALL_DTYPES = ("bfloat16", "float16", "float32", "float64")


def fault_layer_of(n_layers: int) -> int:
    """Return the layer that faults of one layer are planted in: two thirds up."""
    return (2 * n_layers) // 3


def anywhere(host: object) -> str | None:
    """Everything can carry it."""
    return None


class Tally:
    """How often something that is planted was committed.

    Attributes:
        count: how often it was committed.
        changed: how often that changed a tensor. Where the two differ, it was there and had no effect.
        memory: what it keeps from one pass to the next; empty when planted.
        fault_layer: the layer that faults of one layer are planted in; None where nothing of one layer is planted.
    """

    __slots__ = ("changed", "count", "fault_layer", "memory")

    def __init__(self) -> None:
        self.count = 0
        self.changed = 0
        self.memory: dict[Any, Any] = {}
        self.fault_layer: int | None = None

    def note(self, *, changed: bool) -> None:
        """Count one commit."""
        self.count += 1
        self.changed += changed


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultFacts:
    """A bug that is committed on decode steps.

    Attributes:
        name: unique in its corpus, in words of its mechanism.
        mechanism: class of the catalogue, M01 to M25.
        reference: a real bug of the class, owner/repository#number.
        where: one sentence that says where it is planted.
        sites: sites at which it may first show: where it is planted, and the one right after it.
        cause: key of the diagnosis; faults with the same cause share it.
        also: causes that do the same to the values at the true address, so that no trace can tell them from `cause`;
            the catalogue says why.
        undiagnosable: what a diagnosis would need that no trace holds, None if its cause can be told. The right answer
            to such a fault is "unexplained".
        layer: the first layer that it touches, None for the first layer of the model.
        keyed_to_dtype: whether it exists only at the native dtype and vanishes at the fine rungs of the ladder.
        amount: by how much the cause is too large, relatively, for faults that are a factor; None for others.
        find_layer: finds the first layer that it touches where that depends on the model, such as the first one with a
            sliding window; what it is given is the engine's affair.
    """

    name: str
    mechanism: str
    reference: str
    where: str
    sites: tuple[Site, ...]
    cause: str
    layer: int | None = None
    keyed_to_dtype: bool = False
    also: tuple[str, ...] = ()
    amount: float | None = None
    undiagnosable: str | None = None
    find_layer: Callable[[Any], int] | None = None

    @property
    def in_all_layers(self) -> bool:
        """Whether it is committed in every layer."""
        return self.layer is None and self.find_layer is None

    def first_layer(self, model: Any) -> int:
        """Return the number of the first layer that it touches in what it is planted in."""
        return self.find_layer(model) if self.find_layer is not None else self.layer or 0

    def places(self, model: Any) -> list[tuple[int | None, Site]]:
        """Return its true first places, layer and site, in what it is planted in."""
        layer, outside = self.first_layer(model), BEFORE_LAYERS | AFTER_LAYERS
        return [(None if site in outside else layer, site) for site in self.sites]

    def is_cause(self, cause: str) -> bool | None:
        """Whether a diagnosis is right; None if it names nothing where nothing could be named."""
        if self.undiagnosable is not None and cause == Cause.UNEXPLAINED:
            return None
        return cause in (self.cause, *self.also)


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinFacts:
    """A harmless change: another way to compute the same function, which must pass.

    Attributes:
        name: unique, in words of what is computed otherwise.
        reference: a report that took such a difference for a bug, or the kernel that does it.
        why: why the function stays the same.
    """

    name: str
    reference: str
    why: str
