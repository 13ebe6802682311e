"""What an audit is asked to do: frozen options, each default written once, with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from kvdrift.errors import UsageError


class Mode(StrEnum):
    """The two ways to compare a decode step with the prefill of the same token."""

    AS_DESIGNED = "as_designed"  # each route as the engine itself runs it
    KV_ALIGNED = "kv_aligned"  # decode on exactly the K/V bytes that prefill wrote, layers isolated


ModeChoice = Literal["as_designed", "kv_aligned", "both"]
LadderChoice = Literal["model", "layer", "off"]
Prompts = Mapping[str, str | Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditPlan:
    """The options of one audit.

    Attributes:
        mode: one mode or both; a conclusion needs both, since drift that is gone in kv_aligned came through the cache.
        span: how many tokens after the prompt are probed. The first decode step alone hides faults that grow.
        layers: layers to record, None for all of them. Fewer layers mean less coverage, which the report says.
        alpha: chance of a false alarm that the whole audit may have.
        ladder: how the upper rungs of the precision ladder run: "model" holds the whole model in float64, "layer" one
            layer at a time, "off" leaves them out and the verdict rests on the native instruments alone.
        seed: picks where the positive control is planted, nothing else.
        keep_traces: write the recorded tensors, so that the run can be judged again.
    """

    mode: ModeChoice = "both"
    span: int = 4
    layers: tuple[int, ...] | None = None
    alpha: float = 1e-3
    ladder: LadderChoice = "model"
    seed: int = 0
    keep_traces: bool = True

    def __post_init__(self) -> None:
        if self.mode not in ("as_designed", "kv_aligned", "both"):
            raise UsageError(f"unknown mode {self.mode!r}; use --mode as_designed, kv_aligned or both (mode=...)")
        if self.ladder not in ("model", "layer", "off"):
            raise UsageError(f"unknown ladder {self.ladder!r}; use --ladder model, layer or off (ladder=...)")
        if self.span < 1:
            raise UsageError(
                f"span is {self.span}, and at least 1 token after the prompt must be probed; use --span 4 (span=4)"
            )
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise UsageError(
                f"layers is {self.layers}, and must name at least one layer from 0 up; use --layers 0,3,10-12"
            )
        if not 0.0 < self.alpha < 1.0:
            raise UsageError(f"alpha is {self.alpha}, and must lie between 0 and 1; use --alpha 0.001 (alpha=1e-3)")

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes to run, in the order in which they are run."""
        return tuple(Mode) if self.mode == "both" else (Mode(self.mode),)


def _is_layer(text: str) -> bool:
    """Whether text is a number, and not one that would fill the memory with a range of layers."""
    return text.isascii() and text.isdigit() and len(text) <= 5


def parse_layers(text: str) -> tuple[int, ...]:
    """Return the layer numbers that a --layers SPEC names.

    >>> parse_layers("0,3,10-12")
    (0, 3, 10, 11, 12)
    """
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not _is_layer(first) or (dash and not _is_layer(last)):
            raise UsageError(f"cannot read {part!r} in --layers {text!r}; write layers as 0,3,10-12")
        start, stop = int(first), int(last) if dash else int(first)
        if stop < start:
            raise UsageError(f"the range {part!r} in --layers {text!r} runs backwards; write it as {stop}-{start}")
        layers.update(range(start, stop + 1))
    return tuple(sorted(layers))
