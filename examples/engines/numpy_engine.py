"""The decoder of numpy_decoder.py as an engine: kvdrift audit numpy_engine:make. There is no torch in it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy_decoder import DIM, Cache, Decoder

import kvdrift


class NumpyEngine(kvdrift.Engine):
    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.original = decoder, decoder.weights

    def new_cache(self, max_length: int) -> Cache:
        return self.decoder.empty()

    def extend(self, tokens: list[int], cache: Cache, start: int) -> tuple[Any, Cache]:
        for layer in range(self.decoder.depth):
            self.attends(layer, scale=DIM**-0.5)
        return self.decoder.forward(tokens, cache, start, self.see)

    def rewind(self, cache: Cache, length: int) -> Cache:
        return [(keys[:length], values[:length]) for keys, values in cache]

    def cast(self, dtype: str) -> None:
        self.decoder.weights = {name: values.astype(np.dtype(dtype)) for name, values in self.original.items()}

    def weights(self) -> dict[str, Any]:
        return self.decoder.weights


def make() -> kvdrift.Engine:
    return NumpyEngine(Decoder())
