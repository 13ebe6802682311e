"""Faults of a quantised cache: its scales, zero points, groups, bits, and the rows that it keeps unquantised.

They strike in a layer of the cache of transformers when its rows are read, in the layer of optimum-quanto or of float8.
Each is planted in the cache of one layer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kvdrift_bench.planted.torch.model import Commits
from kvdrift_bench.planted.torch.parts import needs_cache, two_thirds_up
from kvdrift_bench.planted.torch.registry import fault
from kvdrift_bench.planted.torch.ways import Way

Which = Literal["keys", "values"]
# Is given what the engine has stored and what that honestly becomes, and returns what is handed back instead.
Change = Callable[[Any, Tensor], Tensor]
# Makes the rows of every group anew from codes [group, value], scales [group, 1] and shifts [group, 1].
Grouped = Callable[[Tensor, Tensor, Tensor], Tensor]


def _needs_full_attention(model: nn.Module) -> str | None:
    """Layers that all see all tokens: no other can be quantised."""
    kinds = set(getattr(model.config, "layer_types", None) or ())
    return needs_cache(model) or ("a layer does not see all tokens" if kinds - {"full_attention"} else None)


_fault = fault(_needs_full_attention, first=two_thirds_up)


@contextmanager
def _updates(commits: Commits, before: Callable[[Any, int], None]) -> Iterator[None]:
    """Call `before` with the layers of a cache and the number of the one that is about to be updated, and keep that
    number in `commits` while it is."""
    from transformers.cache_utils import Cache

    original = Cache.__dict__["update"]

    def update(self: Any, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        before(self.layers, layer)
        commits.memory["updated"] = layer
        try:
            return original(self, keys, values, layer, *args, **kwargs)
        finally:
            del commits.memory["updated"]  # a layer that is updated by itself, to try it, is none of the model's

    setattr(Cache, "update", update)  # noqa: B010 - mypy knows the method, and that it is not to be assigned
    try:
        yield
    finally:
        setattr(Cache, "update", original)  # noqa: B010


def _in_dequantised(backend: str, which: Which) -> Callable[[Change], Way]:
    """Change what keys or values of one layer become when they are read from a cache of `backend`."""

    def seam(change: Change) -> Way:
        @wraps(change)
        @contextmanager
        def way(model: nn.Module, commits: Commits) -> Iterator[None]:
            from transformers import cache_utils

            owner = getattr(cache_utils, backend)
            original = owner.__dict__["_dequantize"]

            def dequantise(self: Any, stored: Any) -> Tensor:
                rows: Tensor = original(self, stored)
                updated = commits.memory.get("updated")
                if updated is None or updated != commits.fault_layer:
                    return rows
                if stored is not getattr(self, f"_quantized_{which}"):
                    return rows
                found: Tensor = commits.take(rows, change(stored, rows))
                return found

            owner._dequantize = dequantise
            try:
                with _updates(commits, lambda layers, updated: None):
                    yield
            finally:
                owner._dequantize = original

        return way

    return seam


# ------------------------------------------------------------------------------------------------------ integers


def _in_groups(which: Which, n_bits: int = 0) -> Callable[[Grouped], Way]:
    """Make the rows of every group otherwise; with `n_bits`, only where codes have as many."""

    def seam(change: Grouped) -> Way:
        @wraps(change)
        def changed(stored: Any, rows: Tensor) -> Tensor:
            if n_bits and int(stored.qtype.bits) != n_bits:
                return rows
            scale, shift = stored._scale, stored._shift
            codes = torch.round((rows.reshape(scale.shape[0], -1) + shift) / scale)
            return change(codes, scale, shift).reshape(rows.shape)

        return _in_dequantised("QuantoQuantizedLayer", which)(changed)

    return seam


@_fault
@_in_groups("keys")
def quantised_scale_applied_twice(codes: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return codes * scale * scale - shift


@_fault
@_in_groups("values")
def quantised_scale_not_applied(codes: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return codes - shift


@_fault
@_in_groups("keys")
def quantised_zero_point_lost(codes: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return codes * scale


@_fault
@_in_groups("values")
def quantised_scale_of_the_group_before(codes: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    wrong = scale.clone()
    wrong[1] = scale[0]
    return codes * wrong - shift


@_fault
@_in_groups("keys")
def quantised_groups_along_the_other_axis(codes: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    n_groups, size = codes.shape
    return codes * scale.flatten().repeat(size).reshape(n_groups, size) - shift


@_fault
@_in_groups("keys", n_bits=4)
def quantised_to_two_bits(codes: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.round(codes / 5) * 5 * scale - shift


@_fault
@contextmanager
def quantised_kept_row_lost(model: nn.Module, commits: Commits) -> Iterator[None]:
    def lose(layers: Any, updated: int) -> None:
        kept = layers[updated]
        recent = kept.keys if hasattr(kept, "residual_length") else None
        if updated == commits.fault_layer and recent is not None and recent.numel():
            lost = recent.clone()
            lost[:, :, -1] = 0.0
            kept.keys = commits.take(recent, lost)

    with _updates(commits, lose):
        yield


# ------------------------------------------------------------------------------------------------------ float8


@_fault
@_in_dequantised("Fp8QuantizedLayer", "values")
def float8_scale_applied_twice(stored: Any, rows: Tensor) -> Tensor:
    scale: Tensor = stored[1]
    return rows * scale.to(rows.dtype)


@_fault
@_in_dequantised("Fp8QuantizedLayer", "keys")
def float8_scale_not_applied(stored: Any, rows: Tensor) -> Tensor:
    codes: Tensor = stored[0]
    return codes.to(rows.dtype)
