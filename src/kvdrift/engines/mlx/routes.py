"""Other routes through a model of mlx-lm: rows of a batch, and what is done with its caches between two calls."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
from mlx_lm.models import cache as caches

from kvdrift.engines.base import Ability, CallProbe, Generated, Generation, RouteFacts, Sink
from kvdrift.engines.mlx.caches import batched, flat, new_cache, trim, why_no_rewind
from kvdrift.engines.mlx.recorder import MLXCall, ProbedRow
from kvdrift.errors import UsageError
from kvdrift.vocabulary.facts import Plant

Run = Callable[[Sequence[Sequence[int]], MLXCall], list[int]]

_PAD = 0  # the token that padding is made of; it is masked, so that its value cannot matter
_LOOP = "kvdrift makes the calls of a loop around an mlx-lm model itself"
_LACKING: dict[Ability, str] = {
    "reorder": "mlx-lm has no beam search, and no cache of it changes the order of its rows",
    "shift": "no cache of mlx-lm moves its keys to other positions",
    "generate": _LOOP,
    "drafts": _LOOP,
    "draft_model": _LOOP,
}
_FILE, _MERGED, _EXTRACTED = "by file", "merged", "merged and extracted"


@dataclass(frozen=True, slots=True)
class Batching:
    """How rows of a batch are fed: padded on the "left", or on the "right" as newer mlx-lm does, which then moves the
    padding to the left; and in pieces of `step` tokens, as long prompts are."""

    padding: Literal["left", "right"] = "left"
    step: int | None = None


class MLXRoutes:
    """What one model can do beyond `extend`, as told by the caches that it makes."""

    def __init__(self, run: Run, model: Any, kind: str, batching: Batching) -> None:
        self._run, self._model, self._kind, self._batching = run, model, kind, batching

    @property
    def facts(self) -> RouteFacts:
        made = new_cache(self._model, "default" if self._kind == "batch" else self._kind)
        windows = [int(each.max_size) for each in flat(made) if hasattr(each, "max_size")]
        n_layers = len(list(self._model.layers))
        can_merge = hasattr(caches.KVCache, "merge") and self._kind == "default"
        return RouteFacts(
            window=min(windows, default=None),
            recurrent=any(isinstance(each, caches.ArraysCache) for each in flat(made)),
            shares_kv=len(made) < n_layers,
            exports=(_FILE, _MERGED, _EXTRACTED) if can_merge else (_FILE,),
        )

    def why_not(self, ability: Ability, cache: str | None = None) -> str | None:
        if ability in _LACKING:
            return _LACKING[ability]
        if ability == "rewind":
            return why_no_rewind(new_cache(self._model, self._kind))
        if ability in ("batch", "padding", "select"):
            if not hasattr(caches, "BatchKVCache"):
                return "this mlx-lm has no caches for a batch"
            try:
                batched(self._model, self._kind, (0, 0))
            except ValueError as error:
                return str(error)
        return None

    def why_no_cache(self, cache: str) -> str | None:
        return f"mlx-lm has no {cache} cache; --cache chooses what takes the place of plain ones"

    def honest_cache(self, cache: str) -> str | None:
        return None

    def new_rows(self, n_rows: int, max_length: int, *, cache: str | None = None, keep_past: bool = False) -> MLXRows:
        if cache is not None:
            raise UsageError(self.why_no_cache(cache))

        def make(pads: Sequence[int]) -> list[Any]:
            alone = n_rows == 1 and not any(pads)
            return new_cache(self._model, self._kind) if alone else batched(self._model, self._kind, pads)

        return MLXRows(self._run, make, n_rows, self._batching)

    def generate(self, wanted: Generation) -> Generated:
        raise UsageError(_LOOP)

    def generate_again(
        self, made: Generated, *, probes: Sequence[CallProbe] = (), plant: tuple[int, Plant] | None = None
    ) -> None:
        raise UsageError(_LOOP)


class MLXRows:
    """Rows of tokens in the caches of mlx-lm, which the first call makes: it knows the padding."""

    def __init__(self, run: Run, make: Callable[[Sequence[int]], list[Any]], n_rows: int, batching: Batching) -> None:
        self._run, self._make, self._batching = run, make, batching
        self._pads = (0,) * n_rows
        self._cache: list[Any] = []
        self._length = 0

    def extend(
        self,
        rows: Sequence[Sequence[int]],
        *,
        probes: Mapping[int, Sequence[int]],
        sinks: Mapping[int, Sink],
        plant: Plant | None = None,
    ) -> None:
        if len(rows) != len(self._pads):
            raise UsageError(f"{len(rows)} rows of tokens were fed to a batch of {len(self._pads)}")
        longest = max(len(row) for row in rows)
        is_first = not self._cache
        if not is_first and any(len(row) != longest for row in rows):
            raise UsageError("rows of different length can only be fed by the first call, which pads them")
        padding = [longest - len(row) for row in rows]
        right = self._batching.padding == "right" and is_first and any(padding)
        if is_first:
            self._pads = (0,) * len(rows) if right else tuple(padding)
            self._cache = self._make(self._pads)
        filled = [[_PAD] * n for n in padding]
        fed = [[*row, *pad] if right else [*pad, *row] for row, pad in zip(rows, filled, strict=True)]
        if right:
            lengths = [len(row) for row in rows]
            for each in self._cache:
                each.prepare(lengths=lengths, right_padding=padding)
        wanted = {row: (probes.get(row, ()), sink, self._length + len(rows[row])) for row, sink in sinks.items()}
        self._feed(fed, wanted, plant, None if right else longest)
        if right:
            for each in self._cache:
                each.finalize()
            self._pads = tuple(padding)

    def _feed(
        self,
        fed: Sequence[Sequence[int]],
        wanted: Mapping[int, tuple[Sequence[int], Sink, int]],
        plant: Plant | None,
        longest: int | None,
    ) -> None:
        """Feed rows of one length, in pieces where the batch is fed so. `wanted` is, by row, what is probed, where it
        goes and how many tokens the row then has where padding stands behind them (`longest` is None)."""
        n_fed, step = len(fed[0]), self._batching.step if len(fed) > 1 else None
        for start in range(0, n_fed, step or n_fed):
            piece = [row[start : start + (step or n_fed)] for row in fed]
            first, stop = self._length, self._length + len(piece[0])
            lanes = []
            for row, (probe, sink, length) in wanted.items():
                pad = self._pads[row]
                inside = tuple(position for position in probe if first <= position + pad < stop)
                lanes.append(ProbedRow(row, pad, inside, sink, length if longest is None else None))
            planted = plant if any(lane.positions for lane in lanes) else None
            call = MLXCall(first, len(piece[0]), self._pads, tuple(lanes), {}, planted, self._cache)
            self._run(piece, call)
            self._length = stop

    def rewind(self, n_tokens: int) -> None:
        trim(self._cache, n_tokens)
        self._length -= n_tokens

    def reorder(self, order: Sequence[int]) -> None:
        raise UsageError(_LACKING["reorder"])

    def select(self, rows: Sequence[int]) -> None:
        for each in self._cache:
            each.filter(mx.array(list(rows)))
        pads = [self._pads[row] for row in rows]
        gone = min(pads)  # padding that all rows have is taken away
        self._pads = tuple(pad - gone for pad in pads)
        self._length -= gone

    def reset(self) -> None:
        """Empty the cache: mlx-lm does so by making another."""
        self._cache, self._length, self._pads = [], 0, (0,) * len(self._pads)

    def copy(self) -> MLXRows:
        """Return a copy, as the prompt cache of mlx-lm's server makes it."""
        return self._with(copy.deepcopy(self._cache))

    def move(self, way: str = "") -> MLXRows:
        if way == _FILE:
            return self._with(_through_a_file(self._cache))
        merged = [type(each).merge([each]) for each in self._cache]
        return self._with(merged if way == _MERGED else [each.extract(0) for each in merged])

    def _with(self, cache: list[Any]) -> MLXRows:
        rows = MLXRows(self._run, self._make, len(self._pads), self._batching)
        rows._cache, rows._length, rows._pads = cache, self._length, self._pads
        return rows

    def drop(self, first: int, n_tokens: int) -> None:
        raise UsageError(_LACKING["shift"])

    def close(self) -> None:
        self._cache = []


def _through_a_file(cache: list[Any]) -> list[Any]:
    """Save caches and load them as mlx-lm does. Its files have no float64: two words of 32 bits are put in the place of
    each such number, and taken together again."""
    doubles: set[str] = set()

    def save(path: str, arrays: Mapping[str, Any], *rest: Any) -> None:
        doubles.update(name for name, array in arrays.items() if array.dtype == mx.float64)
        original(path, {name: a.view(mx.uint32) if name in doubles else a for name, a in arrays.items()}, *rest)

    original: Any = mx.save_safetensors
    load: Any = mx.load

    def load_again(path: str, **options: Any) -> Any:
        arrays, *rest = load(path, **options)
        return ({name: a.view(mx.float64) if name in doubles else a for name, a in arrays.items()}, *rest)

    with tempfile.TemporaryDirectory(prefix="kvdrift-") as folder, _in_place_of(save, load_again):
        path = str(Path(folder) / "cache.safetensors")
        caches.save_prompt_cache(path, cache)
        loaded: list[Any] = caches.load_prompt_cache(path)
        mx.eval([each.state for each in loaded])  # what is loaded is read when it is needed, and the file is gone then
    return loaded


@contextmanager
def _in_place_of(save: Callable[..., None], load: Callable[..., Any]) -> Iterator[None]:
    before = mx.save_safetensors, mx.load
    mx.save_safetensors, mx.load = save, load
    try:
        yield
    finally:
        mx.save_safetensors, mx.load = before


__all__ = ["Batching", "MLXRoutes", "MLXRows"]
