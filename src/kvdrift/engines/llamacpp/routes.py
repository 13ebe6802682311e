"""Other routes through llama.cpp: rows of tokens in one unified cache, rewound and emptied together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from kvdrift.engines.base import Ability, CallProbe, Generated, Generation, RouteFacts, Sink
from kvdrift.engines.llamacpp.sequence import Feed, LlamaSequence, extend_together
from kvdrift.engines.llamacpp.state import EXPORTS, move_state
from kvdrift.errors import UsageError
from kvdrift.vocabulary.facts import Plant


class NewBatch(Protocol):
    """Opens empty sequences in a context of their own; see `LlamaCppEngine.new_batch`."""

    def __call__(
        self, n_sequences: int, max_length: int, *, cache: str | None = None, n_spare: int = 0
    ) -> list[LlamaSequence]: ...


_LACKING: dict[Ability, str] = {
    "padding": "llama.cpp feeds rows of different length as they are, without padding",
    "reorder": "llama.cpp has no call that gives rows other numbers",
    "select": "rows that are dropped leave a gap in the cache, and the rows behind it keep their numbers",
    "generate": "libllama has no generation loop of its own; kvdrift's calls are those of any loop around it",
    "drafts": "libllama has no generation loop of its own; `verify` feeds several tokens at once",
    "draft_model": "libllama has no generation loop of its own; `verify` feeds several tokens at once",
}


class LlamaRoutes:
    """What one file can do beyond `extend`."""

    def __init__(self, new_batch: NewBatch, facts: RouteFacts, lacking: Mapping[Ability, str]) -> None:
        self._new_batch, self._facts, self._lacking = new_batch, facts, {**_LACKING, **lacking}

    @property
    def facts(self) -> RouteFacts:
        return self._facts

    def why_not(self, ability: Ability, cache: str | None = None) -> str | None:
        return self._lacking.get(ability)

    def why_no_cache(self, cache: str) -> str | None:
        if cache == "split":
            return None
        if cache == "ring":
            return None if self._facts.window is not None else "no layer has a sliding window"
        return f"llama.cpp has no {cache} cache; --kv-type chooses what its cache holds"

    def honest_cache(self, cache: str) -> str | None:
        return None

    def new_rows(self, n_rows: int, max_length: int, *, cache: str | None = None, keep_past: bool = False) -> LlamaRows:
        why_not = None if cache is None else self.why_no_cache(cache)
        if why_not is not None:
            raise UsageError(why_not)
        # A window has cells for each sequence that a context is opened for, and servers have one for each slot.
        n_spare = int(n_rows == 1 and cache != "ring")

        def reopen() -> list[LlamaSequence]:
            return self._new_batch(n_rows, max_length, cache=cache, n_spare=n_spare)

        return LlamaRows(reopen(), reopen)

    def generate(self, wanted: Generation) -> Generated:
        raise UsageError(_LACKING["generate"])

    def generate_again(
        self, made: Generated, *, probes: Sequence[CallProbe] = (), plant: tuple[int, Plant] | None = None
    ) -> None:
        raise UsageError(_LACKING["generate"])


class LlamaRows:
    """Sequences of one context that are fed in one call."""

    def __init__(self, sequences: Sequence[LlamaSequence], reopen: Callable[[], list[LlamaSequence]]) -> None:
        self._sequences, self._reopen = sequences, reopen

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
        return LlamaRows([sequence.branch() for sequence in self._sequences], self._reopen)

    def move(self, way: str = "") -> LlamaRows:
        fresh = self._reopen()
        move_state(way or next(iter(EXPORTS)), self._sequences, fresh)
        return LlamaRows(fresh, self._reopen)

    def drop(self, first: int, n_tokens: int) -> None:
        for sequence in self._sequences:
            sequence.drop(first, n_tokens)

    def close(self) -> None:
        for sequence in self._sequences:
            sequence.close()
