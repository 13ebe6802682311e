"""The options of an audit: frozen, each default written once, with its reason."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from itertools import pairwise
from typing import Literal

import msgspec

from kvdrift.errors import UsageError


class Mode(StrEnum):
    """The two ways to compare a decode step with the prefill of the same token."""

    AS_DESIGNED = "as_designed"  # each pass as the engine itself runs it
    KV_ALIGNED = "kv_aligned"  # decode on exactly the K and V bytes that prefill wrote, layers isolated


class PairRole(StrEnum):
    """The purpose of a recorded pair of passes."""

    PAIR = "pair"  # a prefill and a decode of the same tokens
    SELF_NOISE = "self_noise"  # two prefills of one token at two lengths
    CONTROL = "control"  # a clean prefill, and a decode step with the planted fault
    SPECIFICATION = "specification"  # a prefill at float64 that starts every layer from the native layer inputs
    UNOBSERVED = "unobserved"  # a pass as it was recorded, and the same pass while nothing watches; logits alone
    REPEAT = "repeat"  # one pass twice, while nothing watches; logits alone
    PERTURBED = "perturbed"  # both passes on layer inputs that were changed a little: they show how both round


# Two runs of one pass: they are compared by an instrument of their own and are no part of the drift table.
REPEATED = frozenset({PairRole.UNOBSERVED, PairRole.REPEAT})

SELF_NOISE, CONTROL, SPECIFICATION = PairRole.SELF_NOISE, PairRole.CONTROL, PairRole.SPECIFICATION


def control_label(index: int) -> str:
    """Return what the drift table calls the pairs of the control with this number.

    >>> control_label(0), control_label(1)
    ('control', 'control 1')
    """
    return str(CONTROL) if index == 0 else f"{CONTROL} {index}"


# Tokens of a row of a batch at most: its scenarios run at the length of the longest prompt up to here, since each runs
# three such rows at every precision.
LONGEST_ROW = 256

ModeChoice = Literal["as_designed", "kv_aligned", "both"]
LadderChoice = Literal["model", "layer", "off"]
Prompts = Mapping[str, str | Sequence[int]]


class AuditPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The options of one audit.

    Attributes:
        mode: one mode or both; a conclusion needs both, since drift that is gone in kv_aligned came through the cache.
        span: number of tokens probed after the prompt. The first decode step alone hides faults that grow.
        layers: layers to record, None for all. Fewer layers mean less coverage, and the report says so.
        alpha: chance of a false alarm that the whole audit may have.
        ladder: how the upper rungs of the precision ladder run. "model" holds the whole model in float64, "layer" one
            layer at a time. "off" leaves the rungs out, and the verdict rests on the native instruments alone.
        seed: chooses where the positive control is planted, and nothing else.
        keep_traces: whether the recorded tensors are written, so that the run can be judged again.
        lengths: ascending prompt lengths in tokens: one text is cut or repeated to each of them. None for the prompts
            as given.
    """

    mode: ModeChoice = "both"
    span: int = 4
    layers: tuple[int, ...] | None = None
    alpha: float = 1e-3
    ladder: LadderChoice = "model"
    seed: int = 0
    keep_traces: bool = True
    lengths: tuple[int, ...] | None = None

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
        if self.lengths is not None and self.lengths != sort_lengths(self.lengths):
            raise UsageError(f"lengths is {self.lengths}, and must ascend; use --lengths 64,128 (lengths=[64, 128])")

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes, in the order in which they run."""
        return tuple(Mode) if self.mode == "both" else (Mode(self.mode),)


def _is_number(text: str) -> bool:
    """Whether text is a number that is small enough to be the end of a range in memory."""
    return text.isascii() and text.isdigit() and len(text) <= 5


def parse_layers(text: str) -> tuple[int, ...]:
    """Return the layer numbers that a --layers SPEC names.

    >>> parse_layers("0,3,10-12")
    (0, 3, 10, 11, 12)
    """
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            raise UsageError(f"cannot read {part!r} in --layers {text!r}; write layers as 0,3,10-12")
        start, stop = int(first), int(last) if dash else int(first)
        if stop < start:
            raise UsageError(f"the range {part!r} in --layers {text!r} runs backwards; write it as {stop}-{start}")
        layers.update(range(start, stop + 1))
    return tuple(sorted(layers))


# Each length is a prompt, captured in both passes at every rung.
_MOST_LENGTHS = 1000
_LENGTH = re.compile(r"(\d{1,7})(?:-(\d{1,7})(?::(\d{1,7}))?)?", re.ASCII)


def parse_lengths(text: str) -> tuple[int, ...]:
    """Return the prompt lengths that a --lengths SPEC names, ascending. A range may have a step.

    >>> parse_lengths("128,62-65,256-1024:256")
    (62, 63, 64, 65, 128, 256, 512, 768, 1024)
    """
    lengths: list[int] = []
    for part in text.split(","):
        match = _LENGTH.fullmatch(part.strip())
        if match is None or (match[3] is not None and not int(match[3])):
            raise UsageError(f"cannot read {part!r} in --lengths {text!r}; write lengths as 64,128,250-260,512-1024:64")
        start, stop, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if stop < start:
            raise UsageError(f"the range {part!r} in --lengths {text!r} runs backwards; write it as {stop}-{start}")
        named = range(start, stop + 1, step)
        if len(lengths) + len(named) > _MOST_LENGTHS:
            raise UsageError(_too_many(len(lengths) + len(named)))
        lengths += named
    return sort_lengths(lengths)


def sort_lengths(lengths: Iterable[int]) -> tuple[int, ...]:
    """Return prompt lengths in ascending order, as whole numbers.

    Raises:
        UsageError: there is none, one is not a whole number from 1 up or is named twice, or they are too many.
    """
    example = "use --lengths 64,128 (lengths=[64, 128])"
    try:
        found = sorted(operator.index(length) for length in lengths)
    except TypeError as error:
        raise UsageError(f"the lengths are not a list of whole numbers: {error}; {example}") from error
    if not found:
        raise UsageError(f"no length was named; {example}")
    if found[0] < 1:
        raise UsageError(f"{found[0]} is not the length of a prompt, which has at least 1 token; {example}")
    if len(found) > _MOST_LENGTHS:
        raise UsageError(_too_many(len(found)))
    twice = next((length for length, following in pairwise(found) if length == following), None)
    if twice is not None:
        raise UsageError(f"the length {twice} is named twice; {example}")
    return tuple(found)


def name_of_length(length: int) -> str:
    """Return the name of the prompt that is cut to `length` tokens."""
    return f"length_{length}"


def _too_many(n_lengths: int) -> str:
    return (
        f"{n_lengths} lengths are named, and an audit takes at most {_MOST_LENGTHS}, each a prompt of its own; a range "
        "may have a step: --lengths 64-4096:64"
    )
