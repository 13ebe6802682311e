"""Clean twins: harmless changes of a decode step of llama.cpp, which must pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from kvdrift.engines.llamacpp.faults import Faultless
from kvdrift.engines.llamacpp.ggml import Tensor
from kvdrift.engines.llamacpp.recorder import Fed
from kvdrift_bench.planted.facts import Tally
from kvdrift_bench.planted.llamacpp.attention import SCALE, apart, attends, masked
from kvdrift_bench.planted.llamacpp.kernels import context_of, sum_of
from kvdrift_bench.planted.llamacpp.model import Applies, Grounds, LlamaTwin, anywhere
from kvdrift_bench.planted.llamacpp.positions import rotates
from kvdrift_bench.planted.llamacpp.ways import Change, Spot

_SEED = 20_243
_FREE = 8  # cells behind the newest that are filled with garbage
_SHIFT = 11


def clean_twins() -> tuple[LlamaTwin, ...]:
    """Return the harmless changes that can be planted in llama.cpp."""
    return (*_attention(), *_products(), *_watched(), *_shifted())


def _twin(name: str, reference: str, why: str, change: Change, applies: Applies = anywhere) -> LlamaTwin:
    return LlamaTwin(name=name, reference=reference, why=why, change=change, applies=applies)


def _attention() -> tuple[LlamaTwin, ...]:
    def merged(spot: Spot) -> Iterator[None]:
        yield from context_of(lambda parts, peaks: sum_of([out for out, _ in parts]))(spot)

    def exact_softmax(spot: Spot) -> Iterator[None]:
        """Computed in float64, sinks left to llama.cpp by their share of each row."""
        if spot.kind == "softmax":
            mask = spot.source(1).values()[0, 0, :1].astype(np.float64)
            scores = spot.source(0).values()[0, :, 0].astype(np.float64) * spot.node.parameter(SCALE) + mask
            yield
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            left = spot.floats()[0, :, 0].astype(np.float64).sum(axis=-1, keepdims=True)
            spot.write(weights / weights.sum(axis=-1, keepdims=True) * (left if spot.node.source(2) else 1.0))

    def exact_scores(spot: Spot) -> Iterator[None]:
        if spot.kind == "scores" and spot.base == "kq" and spot.source(0).is_plain:
            keys = spot.source(0).values()[0].astype(np.float64)
            queries = spot.source(1).values()[0]
            # ggml rounds queries to the type of the keys before it multiplies.
            queries = queries.astype(spot.source(0).values().dtype).astype(np.float64)
            yield
            spot.write(queries @ np.repeat(keys, len(queries) // len(keys), axis=0).transpose(0, 2, 1))

    def moved(spot: Spot) -> Iterator[None]:
        """Twice the scores by half the scale: powers of two round nothing."""
        if spot.kind == "scores" and spot.base == "kq":
            yield
            spot.write(2.0 * spot.floats())
        elif spot.kind == "softmax":
            spot.lend_parameter(SCALE, 0.5 * spot.node.parameter(SCALE))
            yield

    def shifted(spot: Spot, row: NDArray[np.float32]) -> None:
        row[row == 0] = 0.5

    def garbage(spot: Spot) -> Iterator[None]:
        """Cells behind the newest, which the mask hides, hold something."""
        for found in (spot.keys, spot.values):
            if found is not None:
                rows = found.read()
                noise = np.random.default_rng(_SEED).standard_normal((_FREE, *rows.shape[1:]))
                found.lend(np.concatenate([rows, noise.astype(np.float32)]))
        yield

    def unsunk(grounds: Grounds) -> str | None:
        return "attention sinks" if grounds.sinks else apart(grounds)

    def uncapped(grounds: Grounds) -> str | None:
        return "scores are capped" if grounds.capped else apart(grounds)

    return (
        _twin(
            "two_splits", "vllm-project/vllm#2848", "Two splits, merged by their sums, are one sum.", merged, attends
        ),
        _twin("softmax_in_float64", "huggingface/transformers#25420", "Fewer roundings.", exact_softmax, apart),
        _twin("scores_in_float64", "ggml-org/llama.cpp#4479", "Fewer roundings.", exact_scores, apart),
        _twin(
            "query_doubled_scale_halved",
            "huggingface/transformers#2401",
            "Twice the product by half the scale.",
            moved,
            uncapped,
        ),
        _twin(
            "scores_shifted",
            "vllm-project/vllm#945",
            "Softmax is the same if all scores of a row are larger by a constant.",
            masked(shifted),
            unsunk,
        ),
        _twin(
            "padding_of_garbage",
            "unslothai/unsloth#9708",
            "Cells that the mask hides may hold anything.",
            garbage,
            attends,
        ),
    )


def _products() -> tuple[LlamaTwin, ...]:
    def again(compute: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]) -> Change:
        """Compute the products with float32 weights otherwise."""

        def change(spot: Spot) -> Iterator[None]:
            weights = spot.node.source(0) if spot.node.op == "MUL_MAT" else None
            if weights is None or not weights.name.endswith(".weight") or weights.kind != 0:
                return
            matrix, vector = weights.values()[0, 0].astype(np.float64), spot.source(1).values()[0, 0].astype(np.float64)
            yield
            spot.write(compute(matrix, vector))

        return change

    def norm(spot: Spot) -> Iterator[None]:
        if spot.node.op == "RMS_NORM":
            values = spot.source(0).values().astype(np.float64)
            yield
            mean = np.square(values).mean(axis=-1, keepdims=True) + spot.node.parameter(0)
            spot.write(values / np.sqrt(mean))

    def parts(matrix: NDArray[np.float64], vector: NDArray[np.float64]) -> NDArray[np.float64]:
        """In four parts, each rounded to float32."""
        pieces = [
            (v @ m.T).astype(np.float32)
            for m, v in zip(np.array_split(matrix, 4, axis=1), np.array_split(vector, 4, axis=1), strict=True)
        ]
        return np.asarray(sum(pieces), dtype=np.float64)

    reference = "huggingface/transformers#31127"
    return (
        _twin("products_in_float64", reference, "Fewer roundings.", again(lambda matrix, vector: vector @ matrix.T)),
        _twin("products_in_four_parts", "vllm-project/vllm#7779", "Another order of summation.", again(parts)),
        _twin("norms_in_float64", "huggingface/transformers#29282", "Fewer roundings.", norm),
    )


class _Watched(Faultless):
    """Computes every node by itself, so that nothing is fused."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def watches(self, call: Fed) -> bool:
        if len(call.members) == 1:
            self._tally.note(changed=False)
        return len(call.members) == 1


class _Moved(Faultless):
    """Every call, prefill too, stands some positions later: rotation knows distances alone."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._seen: Fed | None = None

    def before(self, node: Tensor, call: Fed) -> None:
        # All layers read one tensor of positions, which is complete before the graph starts: changed once a call.
        positions = node.source(1) if node.op == "ROPE" and call is not self._seen else None
        if positions is not None and call.members:
            positions.write(positions.values().astype(np.int32) + np.int32(_SHIFT))
            self._seen = call
            self._tally.note(changed=True)


def _watched() -> tuple[LlamaTwin, ...]:
    return (
        LlamaTwin(
            name="nodes_one_by_one",
            reference="ggml-org/llama.cpp#7052",
            why="The same operations, none of them fused.",
            hook=_Watched,
        ),
    )


def _shifted() -> tuple[LlamaTwin, ...]:
    return (
        LlamaTwin(
            name="all_positions_shifted",
            reference="huggingface/transformers#25420",
            why="Rotation by position knows distances alone.",
            hook=_Moved,
            applies=rotates,
        ),
    )
