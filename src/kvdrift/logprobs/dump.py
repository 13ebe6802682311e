"""A dump of logprobs as columns: what one side said of the tokens of many sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvdrift.errors import TraceError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRecord:
    """One sequence as a file has it, before it becomes part of the columns.

    Attributes:
        name: of the sequence, None if the file gives none.
        tokens: ids, or texts where the file has no ids.
        logprobs: of each token in nats, None for one that has none.
        top: the likeliest tokens of each position with their logprobs, None where the file has none.
        experts: anything that names the experts of each token, None where the file has none.
        prompt: ids of the prompt, None where the file has none.
        dropped: whether the trainer's mask dropped it, None where the file does not say.
    """

    name: str | None
    tokens: Sequence[int | str]
    logprobs: Sequence[float | None]
    top: Sequence[Mapping[int | str, float] | None] | None = None
    experts: Sequence[Any] | None = None
    prompt: tuple[int, ...] | None = None
    dropped: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dump:
    """The columns of a dump. Sequence s has the tokens `starts[s]` to `starts[s + 1]`.

    Attributes:
        source: the file, as it was named.
        named: whether the file names its sequences; `names` [sequence] counts them otherwise.
        starts: [sequence + 1].
        token: [token] ids; with `texts`, places in that list.
        texts: texts of the tokens, None if the file has ids.
        logprob: [token] in nats; NaN for a value that is NaN, and where `present` says that there is none.
        present: [token], whether there was a logprob at all.
        best: [token], the likeliest token there, -1 where it is not known.
        gap: [token], by how much it leads the runner-up in nats, NaN where it is not known.
        experts: [token], equal numbers for equal experts by `expert_names`, None if the file has none.
        grain: half the step in which the logprobs were rounded when they were written, [token] in nats.
        grain_text: the same in words.
    """

    source: str
    named: bool
    names: tuple[str, ...]
    starts: Ints
    token: Ints
    texts: tuple[str, ...] | None
    logprob: Floats
    present: Bools
    best: Ints
    gap: Floats
    experts: tuple[str, ...] | None
    prompts: tuple[tuple[int, ...] | None, ...]
    dropped: tuple[bool | None, ...]
    grain: Floats
    grain_text: str

    @property
    def n_tokens(self) -> int:
        return int(self.token.size)

    def tokens_of(self, sequence: int) -> list[int | str]:
        """Return the tokens of one sequence, as ids or as texts."""
        part = self.token[self.starts[sequence] : self.starts[sequence + 1]]
        return [self.texts[i] for i in part] if self.texts is not None else [int(i) for i in part]


@dataclass(slots=True)
class _Columns:
    token: list[int | str] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    present: list[bool] = field(default_factory=list)
    best: list[int | str] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)


def as_columns(source: str, records: Sequence[SequenceRecord]) -> Dump:
    """Put records into columns.

    Raises:
        TraceError: there is none, a sequence has as many logprobs as tokens not, a logprob is above zero, or ids and
            texts are mixed.
    """
    if not records:
        raise TraceError(f"{source} holds no sequence; each line is one, with token_ids and logprobs")
    columns = _Columns()
    starts, names, seen = [0], [], {}  # type: list[int], list[str], dict[str, int]
    for number, record in enumerate(records):
        name = str(number) if record.name is None else record.name
        seen[name] = seen.get(name, 0) + 1
        # Samples of one prompt often share its id: the n-th of one file is the n-th of the other.
        names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
        _append(columns, record, f"{source}, sequence {names[-1]}")
        starts.append(len(columns.token))
    are_texts = {isinstance(token, str) for token in columns.token}
    if len(are_texts) > 1:
        raise TraceError(f"{source} has token ids in some sequences and texts in others; write ids in all of them")
    texts = tuple(dict.fromkeys(columns.token)) if are_texts == {True} else None
    place = None if texts is None else {text: i for i, text in enumerate(texts)}
    logprob = np.array(columns.logprob, dtype=np.float64)
    grain, grain_text = grain_of(logprob)
    return Dump(
        source=source,
        named=all(record.name is not None for record in records),
        names=tuple(names),
        starts=np.array(starts, dtype=np.int64),
        token=_ids(columns.token, place),
        texts=None if texts is None else tuple(str(text) for text in texts),
        logprob=logprob,
        present=np.array(columns.present, dtype=np.bool_),
        best=_ids(columns.best, place),
        gap=np.array(columns.gap, dtype=np.float64),
        experts=tuple(columns.experts) if any(columns.experts) else None,
        prompts=tuple(record.prompt for record in records),
        dropped=tuple(record.dropped for record in records),
        grain=grain,
        grain_text=grain_text,
    )


def _ids(tokens: Sequence[int | str], place: Mapping[int | str, int] | None) -> Ints:
    if place is None:
        return np.array([token if isinstance(token, int) else -1 for token in tokens], dtype=np.int64)
    return np.array([place.get(token, -1) for token in tokens], dtype=np.int64)


def _append(columns: _Columns, record: SequenceRecord, where: str) -> None:
    n = len(record.tokens)
    for what, values in (("logprobs", record.logprobs), ("top logprobs", record.top), ("experts", record.experts)):
        if values is not None and len(values) != n:
            raise TraceError(f"{where}: {n} tokens and {len(values)} {what}; write one for each token")
    for i, value in enumerate(record.logprobs):
        if value is not None and value > 1e-3:  # one a little above zero is rounding
            raise TraceError(
                f"{where}, token {i}: {value:.4g} is not the logarithm of a probability; write natural logarithms"
            )
        columns.logprob.append(math.nan if value is None else float(value))
        columns.present.append(value is not None)
    columns.token += record.tokens
    for i in range(n):
        best, gap = _lead(None if record.top is None else record.top[i])
        columns.best.append(best)
        columns.gap.append(gap)
    columns.experts += [""] * n if record.experts is None else [repr(item) for item in record.experts]


def _lead(top: Mapping[int | str, float] | None) -> tuple[int | str, float]:
    """Return the likeliest token and its lead over the runner-up in nats."""
    if not top:
        return -1, math.nan
    ordered = sorted(top.items(), key=lambda item: -item[1])
    return ordered[0][0], ordered[0][1] - ordered[1][1] if len(ordered) > 1 else math.nan


def grain_of(logprob: Floats) -> tuple[Floats, str]:
    """Return half the step in which logprobs [token] were rounded when they were written, in nats, and what it is.

    Values that are all bfloat16 or float16 numbers, or all have at most six decimals, were rounded to that. Others have
    the step of float32, in which softmax is computed. NaN and infinite values are left out, and have no step.

    >>> grain_of(np.array([-0.125, -0.251, -3.002]))[1]
    '3 decimals'
    """
    known = logprob[np.isfinite(logprob) & (logprob != 0.0)]
    size = np.where(np.isfinite(logprob), np.abs(logprob), 0.0)
    spacing = 2.0 ** np.floor(np.log2(np.maximum(size, 2.0**-24)))
    if known.size >= 8:
        for name, bits in (("bfloat16", 8), ("float16", 11)):
            mantissa, _ = np.frexp(known)
            if (np.ldexp(mantissa, bits) % 1.0 == 0.0).all():
                return spacing * 2.0**-bits, name
    if known.size:
        for decimals in range(1, 7):
            if (np.abs(known - np.round(known, decimals)) < 1e-12).all():
                return np.full(logprob.shape, 0.5 * 10.0**-decimals), f"{decimals} decimals"
    # The logits that a logprob is the difference of are of the order of 16, whatever the logprob is.
    return np.maximum(spacing, 16.0) * 2.0**-24, "float32"
