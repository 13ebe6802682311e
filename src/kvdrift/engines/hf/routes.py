"""Other routes through a transformers model: rows of a batch in one cache, other caches, copies, beams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from kvdrift.engines.base import Ability, CallProbe, Generated, Generation, RouteFacts, Sink
from kvdrift.engines.hf.caches import OTHER_KINDS, CacheAdapter, CacheKind, OwnCache, open_cache
from kvdrift.engines.hf.generation import Loop, LoopRecording, why_not_generate
from kvdrift.engines.hf.quantised import HONEST, QUANTISED_KINDS, why_not_quantised
from kvdrift.errors import UsageError
from kvdrift.vocabulary.facts import Plant

_PAD = 0  # the token that padding is made of; it is masked, so that its value cannot matter
_LENGTH_DEPENDENT = ("longrope", "dynamic")


class RowForward(LoopRecording, Protocol):
    """The engine, as far as rows and the generation loop need it."""

    def forward_rows(
        self,
        cache: CacheAdapter,
        rows: Sequence[Sequence[int]],
        pads: Sequence[int],
        *,
        probes: Mapping[int, Sequence[int]],
        sinks: Mapping[int, Sink],
        plant: Plant | None = None,
    ) -> list[int]: ...


_NO_SHIFT = "no cache of transformers moves its keys to other positions"


class HFRoutes:
    """What one model can do beyond `extend`, as told by its configuration and its cache."""

    def __init__(self, engine: RowForward, config: Any, cache: CacheKind, parameters: Mapping[str, Any]) -> None:
        self._engine = engine
        self._config = config
        self._kind = cache
        self._parameters = parameters

    @property
    def facts(self) -> RouteFacts:
        config = self._config
        kinds = getattr(config, "layer_types", None) or ()
        windowed = "sliding_attention" in kinds or (not kinds and getattr(config, "use_sliding_window", True))
        window = getattr(config, "sliding_window", None) if windowed else None
        return RouteFacts(
            window=window if isinstance(window, int) and window > 0 else None,
            switch=self._switch(),
            recurrent=_is_recurrent(open_cache("dynamic", config, 1)),
            shares_kv=bool(getattr(config, "num_kv_shared_layers", 0)),
            special=_special_tokens(config),
        )

    def _switch(self) -> int | None:
        """The length beyond which the rotary tables are others."""
        found = getattr(self._config, "rope_parameters", None) or {}
        for options in [found, *(item for item in found.values() if isinstance(item, dict))]:
            if options.get("rope_type") in _LENGTH_DEPENDENT:
                original = options.get("original_max_position_embeddings")
                original = original or getattr(self._config, "original_max_position_embeddings", None)
                return int(original or self._config.max_position_embeddings)
        return None

    def why_no_cache(self, cache: str) -> str | None:
        if cache not in OTHER_KINDS:
            return f"there is no cache kind {cache!r}"
        if cache == "offloaded" and not torch.accelerator.is_available():
            return "a cache is offloaded from an accelerator, and this machine has none"
        if cache in QUANTISED_KINDS:
            return why_not_quantised(cache, self._config)
        try:
            adapter = open_cache(cache, self._config, 8)
        except (ValueError, ImportError, AttributeError, NotImplementedError, TypeError) as error:
            return f"this model has no {cache} cache: {next(iter(str(error).splitlines()), type(error).__name__)}"
        if cache != "dynamic" and _is_recurrent(adapter):
            return f"a {cache} cache keeps the recurrent state of this model as the ordinary one does"
        return None

    def honest_cache(self, cache: str) -> str | None:
        return HONEST + cache if cache in QUANTISED_KINDS else None

    def why_not(self, ability: Ability, cache: str | None = None) -> str | None:
        kind: CacheKind = cache or self._kind
        adapter = open_cache(kind, self._config, 8)
        if ability == "shift":
            return _NO_SHIFT
        if ability in ("generate", "drafts", "draft_model"):
            return why_not_generate(self._engine.model, kind, ability)
        if ability == "rewind":
            return self._why_no_way_back(kind)
        if ability == "reset" and not hasattr(adapter.object, "reset"):
            return f"{type(adapter.object).__name__} cannot be emptied (reset)"
        if ability == "reorder" and not hasattr(adapter.object, "reorder_cache"):
            return f"{type(adapter.object).__name__} cannot change the order of its rows (reorder_cache)"
        if ability == "padding" and "attention_mask" not in self._parameters:
            return "the model takes no attention mask, so no row can be padded"
        if ability == "select":
            if not hasattr(adapter.object, "batch_select_indices"):
                return f"{type(adapter.object).__name__} cannot select rows (batch_select_indices)"
            lacking = next(
                (x for x in getattr(adapter.object, "layers", ()) if not hasattr(x, "batch_select_indices")), None
            )
            return None if lacking is None else f"{type(lacking).__name__} cannot select rows"
        if ability == "move" and (kind != "dynamic" or _is_recurrent(adapter)):
            return "only a dynamic cache of keys and values can be exported"
        return None

    def _why_no_way_back(self, kind: CacheKind) -> str | None:
        """Why nobody can go back on a kind of cache: what the cache itself says when it is asked to.

        A cache that goes back and leaves something behind is not among those: that is for the scenario to find.
        """
        adapter = open_cache(kind, self._config, 8, keep_past=True)
        doubt = adapter.why_no_rewind
        is_own = isinstance(kind, OwnCache)
        if (doubt is None and not is_own) or not hasattr(adapter.object, "crop") or not adapter.crops:
            return doubt
        rows = HFRows(self._engine, self._config, adapter, 1)
        rows.extend([[1, 2, 3]], probes={}, sinks={})
        refusal = adapter.try_back()
        rows.close()
        return refusal

    def new_rows(self, n_rows: int, max_length: int, *, cache: str | None = None, keep_past: bool = False) -> HFRows:
        adapter = open_cache(cache or self._kind, self._config, max_length, keep_past=keep_past)
        return HFRows(self._engine, self._config, adapter, n_rows)

    def generate(self, wanted: Generation) -> Generated:
        return self._loop(wanted).run()

    def generate_again(
        self, made: Generated, *, probes: Sequence[CallProbe] = (), plant: tuple[int, Plant] | None = None
    ) -> None:
        self._loop(made.wanted, made, probes, plant).run()

    def _loop(self, wanted: Generation, *again: Any) -> Loop:
        return Loop(self._engine, self._config, self._kind, wanted, *again)


class HFRows:
    """Rows of tokens in one transformers cache."""

    def __init__(
        self, engine: RowForward, config: Any, cache: CacheAdapter, n_rows: int, pads: Sequence[int] = ()
    ) -> None:
        self._engine = engine
        self._config = config
        self._cache = cache
        self._n_rows = n_rows
        self._pads = tuple(pads) or (0,) * n_rows

    def extend(
        self,
        rows: Sequence[Sequence[int]],
        *,
        probes: Mapping[int, Sequence[int]],
        sinks: Mapping[int, Sink],
        plant: Plant | None = None,
    ) -> None:
        if len(rows) != self._n_rows:
            raise UsageError(f"{len(rows)} rows of tokens were fed to a batch of {self._n_rows}")
        longest = max(len(row) for row in rows)
        if self._cache.length == 0:
            self._pads = tuple(longest - len(row) for row in rows)
        elif any(len(row) != longest for row in rows):
            raise UsageError("rows of different length can only be fed by the first call, which pads them")
        padded = [[_PAD] * (longest - len(row)) + list(row) for row in rows]
        self._engine.forward_rows(self._cache, padded, self._pads, probes=probes, sinks=sinks, plant=plant)

    def rewind(self, n_tokens: int) -> None:
        self._cache.go_back(n_tokens)

    def reorder(self, order: Sequence[int]) -> None:
        self._cache.object.reorder_cache(torch.tensor(list(order), dtype=torch.long))
        self._take(order)

    def select(self, rows: Sequence[int]) -> None:
        self._cache.object.batch_select_indices(torch.tensor(list(rows), dtype=torch.long))
        self._take(rows)

    def _take(self, rows: Sequence[int]) -> None:
        self._pads = tuple(self._pads[row] for row in rows)
        self._n_rows = len(rows)

    def reset(self) -> None:
        self._cache.reset()
        self._pads = (0,) * self._n_rows

    def copy(self) -> HFRows:
        return HFRows(self._engine, self._config, self._cache.copied(), self._n_rows, self._pads)

    def move(self, way: str = "") -> HFRows:
        moved = HFRows(self._engine, self._config, self._cache.moved(self._config), self._n_rows, self._pads)
        self._cache.close()
        return moved

    def drop(self, first: int, n_tokens: int) -> None:
        raise UsageError(_NO_SHIFT)

    def close(self) -> None:
        self._cache.close()


def _special_tokens(config: Any) -> frozenset[int]:
    """The tokens that a configuration has a name for: some models do not count those of the padding as positions."""
    named = [value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))]
    each = [item for value in named for item in (value if isinstance(value, list | tuple) else [value])]
    return frozenset(item for item in each if isinstance(item, int) and not isinstance(item, bool))


def _is_recurrent(cache: CacheAdapter) -> bool:
    return any(hasattr(layer, "recurrent_states") for layer in getattr(cache.object, "layers", ()))


__all__ = ["HFRoutes", "HFRows", "RowForward"]
