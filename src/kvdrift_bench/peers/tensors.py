"""What a peer's rule looks at: the two values of one tensor, and figures of them that several rules share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvdrift.pairing.align import Aligner
from kvdrift.trace.model import Array, PassPair
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.sites import Site

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PairedTensor:
    """One tensor of one token, as prefill and as a cached decode step computed it.

    `reference` is prefill's value at float64, None where it was not captured. `next_token` is the token that follows,
    None after the last one. With `n_lost` the two sides hold different keys, so that a tool which compares arrays
    would see two shapes.
    """

    prompt: str
    position: int
    layer: int | None
    site: Site
    prefill: Array
    decode: Array
    reference: Floats | None = None
    next_token: int | None = None
    n_lost: int = 0

    @property
    def address(self) -> Address:
        return Address(self.prompt, self.position, self.layer, self.site)

    @property
    def dtype(self) -> str:
        return self.prefill.dtype.name

    @property
    def size(self) -> int:
        return self.prefill.size

    @cached_property
    def has_equal_bits(self) -> bool:
        return self.n_lost == 0 and self.prefill.tobytes() == self.decode.tobytes()

    @cached_property
    def is_broken(self) -> bool:
        """Whether one side has other keys, or a NaN or infinity that the other lacks: no tolerance covers that."""
        same = (self._raw[0] == self._raw[1]) | (np.isnan(self._raw[0]) & np.isnan(self._raw[1]))
        return self.n_lost > 0 or bool((~self._finite & ~same).any())

    @cached_property
    def x(self) -> Floats:
        """Prefill in float64; what is not finite on either side, such as a masked score, is zero in both."""
        return np.where(self._finite, self._raw[0], 0.0)

    @cached_property
    def y(self) -> Floats:
        """Decode in float64, like `x`."""
        return np.where(self._finite, self._raw[1], 0.0)

    @cached_property
    def distance(self) -> Floats:
        """|decode - prefill| by element."""
        return np.abs(self.y - self.x)

    @cached_property
    def max_abs(self) -> float:
        return float(self.distance.max())

    @cached_property
    def energy(self) -> float:
        """Sum of the squared differences."""
        return float(self.distance @ self.distance)

    @cached_property
    def cosine(self) -> float:
        """Of the two sides; 1 if both are zero, 0 if one is."""
        norms = float(np.sqrt(self.x @ self.x) * np.sqrt(self.y @ self.y))
        if norms == 0.0:
            return 1.0 if self.max_abs == 0.0 else 0.0
        return float(self.x @ self.y) / norms

    @cached_property
    def errors(self) -> tuple[Floats, Floats] | None:
        """Errors of prefill and of decode against the reference, None without one."""
        if self.reference is None:
            return None
        reference = np.where(self._finite & np.isfinite(self.reference), self.reference, 0.0)
        known = np.isfinite(self.reference)
        return np.where(known, self.x - reference, 0.0), np.where(known, self.y - reference, 0.0)

    @cached_property
    def _raw(self) -> tuple[Floats, Floats]:
        return self.prefill.astype(np.float64), self.decode.astype(np.float64)

    @cached_property
    def _finite(self) -> NDArray[np.bool_]:
        return np.asarray(np.isfinite(self._raw[0]) & np.isfinite(self._raw[1]))


def paired_tensors(pair: PassPair, reference: PassPair | None = None) -> list[PairedTensor]:
    """Return all tensors of a pair of passes, one for each position; `reference` is the same pair at float64."""
    exact: dict[tuple[int, int | None, Site], Floats] = {}
    if reference is not None:
        for found in Aligner(reference).pairs():
            for row, position in zip(found.prefill, found.positions, strict=True):
                exact[position, found.layer, found.site] = row.astype(np.float64)
    tokens = pair.prefill.tokens
    tensors = []
    for found in Aligner(pair).pairs():
        for index, position in enumerate(found.positions):
            right = exact.get((position, found.layer, found.site))
            tensors.append(
                PairedTensor(
                    pair.prefill.prompt,
                    position,
                    found.layer,
                    found.site,
                    found.prefill[index],
                    found.decode[index],
                    right if right is not None and right.shape == found.prefill[index].shape else None,
                    tokens[position + 1] if position + 1 < len(tokens) else None,
                    found.n_lost,
                )
            )
    return tensors


def in_forward_order(tensors: Iterable[PairedTensor], prompts: Sequence[str]) -> list[PairedTensor]:
    """Return the tensors by layer and site, then by prompt, then by position: the order of "first failure"."""
    rank = {name: index for index, name in enumerate(prompts)}
    return sorted(tensors, key=lambda t: (t.address.forward_rank, rank.get(t.prompt, len(rank)), t.position))
