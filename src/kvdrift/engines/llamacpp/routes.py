"""Other routes through llama.cpp: rows of tokens in one unified cache, rewound and emptied together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kvdrift.engines.base import Ability, CallProbe, Generated, Generation, RouteFacts, Sink
from kvdrift.engines.llamacpp.sequence import Feed, LlamaSequence, extend_together
from kvdrift.errors import UsageError
from kvdrift.vocabulary.facts import Plant

NewBatch = Callable[[int, int], list[LlamaSequence]]

_LACKING: dict[Ability, str] = {
    "padding": "llama.cpp feeds rows of different length as they are, without padding",
    "reorder": "cells that rows share after a copy (llama_memory_seq_cp) cannot be told apart from outside",
    "select": "rows that are dropped leave a gap in the cache, and the rows behind it keep their numbers",
    "copy": "a llama.cpp context cannot be copied with its cache",
    "move": "kvdrift does not export llama.cpp's cache yet",
    "generate": "libllama has no generation loop of its own; kvdrift's calls are those of any loop around it",
    "drafts": "libllama has no generation loop of its own; `verify` feeds several tokens at once",
    "draft_model": "libllama has no generation loop of its own; `verify` feeds several tokens at once",
}


class LlamaRoutes:
    """What one file can do beyond `extend`."""

    def __init__(self, new_batch: NewBatch, facts: RouteFacts, why_no_rewind: str | None) -> None:
        self._new_batch, self._facts, self._why_no_rewind = new_batch, facts, why_no_rewind

    @property
    def facts(self) -> RouteFacts:
        return self._facts

    def why_not(self, ability: Ability, cache: str | None = None) -> str | None:
        return self._why_no_rewind if ability in ("rewind", "reset") else _LACKING.get(ability)

    def why_no_cache(self, cache: str) -> str | None:
        return f"llama.cpp has one kind of cache, and no {cache} one; --kv-type chooses what it holds"

    def honest_cache(self, cache: str) -> str | None:
        return None

    def new_rows(self, n_rows: int, max_length: int, *, cache: str | None = None, keep_past: bool = False) -> LlamaRows:
        if cache is not None:
            raise UsageError(str(self.why_no_cache(cache)))
        return LlamaRows(self._new_batch(n_rows, max_length))

    def generate(self, wanted: Generation) -> Generated:
        raise UsageError(_LACKING["generate"])

    def generate_again(
        self, made: Generated, *, probes: Sequence[CallProbe] = (), plant: tuple[int, Plant] | None = None
    ) -> None:
        raise UsageError(_LACKING["generate"])


class LlamaRows:
    """Sequences of one context that are fed in one call."""

    def __init__(self, sequences: Sequence[LlamaSequence]) -> None:
        self._sequences = sequences

    def extend(
        self,
        rows: Sequence[Sequence[int]],
        *,
        probes: Mapping[int, Sequence[int]],
        sinks: Mapping[int, Sink],
        plant: Plant | None = None,
    ) -> None:
        if len(rows) != len(self._sequences):
            raise UsageError(f"{len(rows)} rows of tokens were fed to a batch of {len(self._sequences)}")
        feeds = [
            Feed(sequence, tokens, probes.get(row, ()), sinks.get(row))
            for row, (sequence, tokens) in enumerate(zip(self._sequences, rows, strict=True))
        ]
        extend_together(feeds, plant=plant)

    def rewind(self, n_tokens: int) -> None:
        for sequence in self._sequences:
            sequence.rewind(n_tokens)

    def reset(self) -> None:
        for sequence in self._sequences:
            sequence.rewind(sequence.length)

    def reorder(self, order: Sequence[int]) -> None:
        raise UsageError(_LACKING["reorder"])

    def select(self, rows: Sequence[int]) -> None:
        raise UsageError(_LACKING["select"])

    def copy(self) -> LlamaRows:
        raise UsageError(_LACKING["copy"])

    def move(self) -> LlamaRows:
        raise UsageError(_LACKING["move"])

    def close(self) -> None:
        for sequence in self._sequences:
            sequence.close()
