"""One token sequence and its transformers cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from kvdrift.engines.base import Sink
from kvdrift.engines.hf.caches import CacheAdapter
from kvdrift.trace.model import Array
from kvdrift.vocabulary.facts import Plant


class Forward(Protocol):
    """The engine, as far as a sequence needs it."""

    def forward(
        self,
        cache: CacheAdapter,
        tokens: Sequence[int],
        *,
        probe: Sequence[int],
        sink: Sink | None,
        replace: Mapping[int, Array],
        plant: Plant | None,
    ) -> int: ...


class HFSequence:
    """A token sequence and its transformers cache."""

    def __init__(self, engine: Forward, cache: CacheAdapter) -> None:
        self._engine = engine
        self._cache = cache

    @property
    def length(self) -> int:
        return self._cache.length

    def extend(
        self,
        tokens: Sequence[int],
        *,
        probe: Sequence[int] = (),
        sink: Sink | None = None,
        replace: Mapping[int, Array] | None = None,
        plant: Plant | None = None,
    ) -> int:
        return self._engine.forward(self._cache, tokens, probe=probe, sink=sink, replace=replace or {}, plant=plant)

    def rewind(self, n_tokens: int) -> None:
        self._cache.rewind(n_tokens)

    def close(self) -> None:
        self._cache.close()


__all__ = ["Forward", "HFSequence"]
