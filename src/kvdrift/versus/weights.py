"""Whether two engines hold the same numbers as weights, whatever their layout.

A sum of hashes of all numbers does not change where a matrix is transposed or its rows are permuted (rotary halves),
where several are fused into one, or where tensors have other names. A tensor that is there twice (tied) counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvdrift.engines.base import HoldsWeights, LiveEngine
from kvdrift.errors import CaptureError
from kvdrift.trace.model import Array

# Numbers of a tensor that are hashed at a time.
_PIECE = 1 << 20
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))

Digest = tuple[int, int, int]  # how many numbers, and two sums of their hashes


@dataclass(frozen=True, slots=True)
class Numbers:
    """The weights of one engine.

    Attributes:
        matrices: by name, the digest of each that is not constant; of equal ones the first.
        vectors: the digest of all vectors together (norms, biases), and of all of them plus one.
    """

    matrices: Mapping[str, Digest] = field(default_factory=dict)
    vectors: tuple[Digest, Digest] = ((0, 0, 0), (0, 0, 0))

    @property
    def total(self) -> Digest:
        """The digest of all matrices together."""
        return _sum(self.matrices.values())

    @property
    def n(self) -> int:
        """How many numbers the matrices hold."""
        return self.total[0]


def numbers_of(engine: LiveEngine) -> Numbers | None:
    """Return the weights of an engine; None if it does not show them."""
    if not isinstance(engine, HoldsWeights):
        return None
    try:
        weights = engine.weight_values()
        return None if weights is None else _numbers(weights)
    except CaptureError:
        return None


def _numbers(weights: Iterable[tuple[str, Array]]) -> Numbers:
    matrices: dict[str, Digest] = {}
    vectors: set[tuple[Digest, Digest]] = set()
    for name, values in weights:
        if values.size == 0 or bool((values == values.flat[0]).all()):
            continue  # constant tensors, such as biases of zero, are left out where they are not needed
        if sum(size > 1 for size in values.shape) >= 2:
            digest = digest_of(values)
            if digest not in matrices.values():
                matrices[name] = digest
        else:
            # Some formats keep the weight of a norm plus one, added in float32.
            vectors.add((digest_of(values), digest_of(values.astype(np.float32) + np.float32(1.0))))
    return Numbers(matrices, (_sum(plain for plain, _ in vectors), _sum(plus for _, plus in vectors)))


def digest_of(values: Array) -> Digest:
    """Return what does not change where numbers change places: their count, and two sums of hashes modulo 2**64.

    Numbers are compared in float64; 0 and -0 are one number, and NaN is one as well.

    >>> digest_of(np.eye(2)) == digest_of(np.array([[0.0, 1.0], [1.0, -0.0]]))
    True
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    sums = [0, 0]
    for start in range(0, flat.size, _PIECE):
        wide = flat[start : start + _PIECE].astype(np.float64) + 0.0
        wide[np.isnan(wide)] = np.nan
        bits = wide.view(np.uint64)
        for index, factor in enumerate(_MIX):
            sums[index] = (sums[index] + int(_mixed(bits, factor).sum(dtype=np.uint64))) % (1 << 64)
    return flat.size, sums[0], sums[1]


def _mixed(bits: NDArray[np.uint64], factor: np.uint64) -> NDArray[np.uint64]:
    """A hash of each number (the finalizer of splitmix64: Steele, Lea and Flood 2014), with a factor of choice."""
    with np.errstate(over="ignore"):
        found = bits + _GOLDEN
        for shift in (np.uint64(30), np.uint64(27)):
            found = (found ^ (found >> shift)) * factor
        return found ^ (found >> np.uint64(31))


def _sum(digests: Iterable[Digest]) -> Digest:
    counts, one, two = 0, 0, 0
    for digest in digests:
        counts, one, two = counts + digest[0], (one + digest[1]) % (1 << 64), (two + digest[2]) % (1 << 64)
    return counts, one, two


def same_numbers(a: Numbers, b: Numbers) -> bool:
    """Whether both hold the same numbers; norms may be kept plus one by one of them."""
    vectors = a.vectors[0] in b.vectors or b.vectors[0] in a.vectors
    return a.total == b.total and vectors


def what_differs(a: Numbers, b: Numbers) -> str:
    """Say how far two sets of weights are apart, in one clause."""
    if a.total == b.total:
        return "their matrices are the same numbers, and norms or biases are not"
    common = _common(a, b)
    alone = [name for name, digest in a.matrices.items() if digest not in common]
    if not alone:
        return f"B has {len(b.matrices) - len(common)} matrices that A does not have"
    return f"{len(alone)} of the {len(a.matrices)} matrices of A are not in B as they are, such as {alone[0]}"


def share_nothing(a: Numbers, b: Numbers) -> bool:
    """Whether no matrix of one is in the other, and all together are other numbers too."""
    return bool(a.matrices and b.matrices) and a.total != b.total and not _common(a, b)


def _common(a: Numbers, b: Numbers) -> set[Digest]:
    return {*a.matrices.values()} & {*b.matrices.values()}


__all__ = ["Numbers", "digest_of", "numbers_of", "same_numbers", "share_nothing", "what_differs"]
