"""Clean twins: harmless changes of a decode step of llama.cpp, which must pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps

import numpy as np
from numpy.typing import NDArray

from kvdrift.engines.llamacpp.calls import Fed
from kvdrift.engines.llamacpp.ggml import Tensor
from kvdrift_bench.planted.facts import Tally
from kvdrift_bench.planted.llamacpp.attention import SCALE, Mask, apart, attends, masked
from kvdrift_bench.planted.llamacpp.kernels import Parts, in_context, sum_of
from kvdrift_bench.planted.llamacpp.model import Grounds
from kvdrift_bench.planted.llamacpp.positions import rotates
from kvdrift_bench.planted.llamacpp.precision import apart_without_sinks
from kvdrift_bench.planted.llamacpp.registry import twin
from kvdrift_bench.planted.llamacpp.ways import Change, Counting, Spot, lend_factor

_SEED = 20_243
_FREE = 8  # cells behind the newest that are filled with garbage
_SHIFT = 11

Doubles = NDArray[np.float64]

# ------------------------------------------------------------------------------------------------------ attention


@twin(attends)
@in_context
def two_splits(parts: Parts, peaks: Doubles) -> Doubles:
    return sum_of([out for out, _ in parts])


@twin(apart)
def softmax_in_float64(spot: Spot) -> Iterator[None]:
    """Sinks are left to llama.cpp by their share of each row."""
    if spot.kind == "softmax":
        mask = spot.source(1).values()[0, 0, :1].astype(np.float64)
        scores = spot.source(0).values()[0, :, 0].astype(np.float64) * spot.node.parameter(SCALE) + mask
        yield
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        left = spot.floats()[0, :, 0].astype(np.float64).sum(axis=-1, keepdims=True)
        spot.write(weights / weights.sum(axis=-1, keepdims=True) * (left if spot.node.source(2) else 1.0))


@twin(apart)
def scores_in_float64(spot: Spot) -> Iterator[None]:
    if spot.kind == "scores" and spot.base == "kq" and spot.source(0).is_plain:
        keys = spot.source(0).values()[0].astype(np.float64)
        queries = spot.source(1).values()[0]
        # ggml rounds queries to the type of the keys before it multiplies.
        queries = queries.astype(spot.source(0).values().dtype).astype(np.float64)
        yield
        spot.write(queries @ np.repeat(keys, len(queries) // len(keys), axis=0).transpose(0, 2, 1))


def _uncapped(grounds: Grounds) -> str | None:
    return "scores are capped" if grounds.capped else apart(grounds)


@twin(_uncapped)
def query_doubled_scale_halved(spot: Spot) -> Iterator[None]:
    """Powers of two round nothing."""
    if spot.kind == "scores" and spot.base == "kq":
        yield
        spot.write(2.0 * spot.floats())
    elif spot.kind == "softmax":
        lend_factor(spot, SCALE, 0.5)
        yield


@twin(apart_without_sinks)
@masked
def scores_shifted(spot: Spot, row: Mask) -> None:
    row[row == 0] = 0.5


@twin(attends)
def padding_of_garbage(spot: Spot) -> Iterator[None]:
    """Cells behind the newest, which the mask hides, hold something."""
    for found in (spot.keys, spot.values):
        if found is not None:
            rows = found.read()
            noise = np.random.default_rng(_SEED).standard_normal((_FREE, *rows.shape[1:]))
            found.lend(np.concatenate([rows, noise.astype(np.float32)]))
    yield


# ------------------------------------------------------------------------------------------------ products and norms


def _multiplied(compute: Callable[[Doubles, Doubles], Doubles]) -> Change:
    """Compute the products of float32 weights [outer, inner] and vectors [token, inner] otherwise."""

    @wraps(compute)
    def change(spot: Spot) -> Iterator[None]:
        weights = spot.node.source(0) if spot.node.op == "MUL_MAT" else None
        if weights is None or not weights.name.endswith(".weight") or weights.kind != 0:
            return
        matrix, vector = weights.values()[0, 0].astype(np.float64), spot.source(1).values()[0, 0].astype(np.float64)
        yield
        spot.write(compute(matrix, vector))

    return change


@twin()
@_multiplied
def products_in_float64(matrix: Doubles, vector: Doubles) -> Doubles:
    return vector @ matrix.T


@twin()
@_multiplied
def products_in_four_parts(matrix: Doubles, vector: Doubles) -> Doubles:
    """Each part is rounded to float32."""
    pieces = [
        (v @ m.T).astype(np.float32)
        for m, v in zip(np.array_split(matrix, 4, axis=1), np.array_split(vector, 4, axis=1), strict=True)
    ]
    return np.asarray(sum(pieces), dtype=np.float64)


@twin()
def norms_in_float64(spot: Spot) -> Iterator[None]:
    if spot.node.op == "RMS_NORM":
        values = spot.source(0).values().astype(np.float64)
        yield
        mean = np.square(values).mean(axis=-1, keepdims=True) + spot.node.parameter(0)
        spot.write(values / np.sqrt(mean))


# ------------------------------------------------------------------------------------------------------ whole calls


@twin(name="nodes_one_by_one")
class Watched(Counting):
    """Computes every node by itself, so that nothing is fused."""

    def watches(self, call: Fed) -> bool:
        if len(call.members) == 1:
            self.tally.note(changed=False)
        return len(call.members) == 1


@twin(rotates, name="all_positions_shifted")
class Moved(Counting):
    """Every call, prefill too, stands some positions later: rotation knows distances alone."""

    def __init__(self, tally: Tally) -> None:
        super().__init__(tally)
        self._seen: Fed | None = None

    def before(self, node: Tensor, call: Fed) -> None:
        # All layers read one tensor of positions, which is complete before the graph starts: changed once a call.
        positions = node.source(1) if node.op == "ROPE" and call is not self._seen else None
        if positions is not None and call.members:
            positions.write(positions.values().astype(np.int32) + np.int32(_SHIFT))
            self._seen = call
            self.tally.note(changed=True)
