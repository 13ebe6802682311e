"""Faults of a quantised cache: its scales, zero points, groups, bits, and the rows that it keeps unquantised.

They strike in a layer of the cache of transformers when its rows are read, in the layer of optimum-quanto or of float8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.torch.model import Commits, Fault
from kvdrift_bench.planted.torch.parts import needs_cache
from kvdrift_bench.planted.torch.scenario_fault import scenario_fault
from kvdrift_bench.planted.torch.ways import Way

# Is given what the engine has stored and what that honestly becomes, and returns what is handed back instead.
Change = Callable[[Any, Tensor], Tensor]
# Makes the rows of every group anew from codes [group, value], scales [group, 1] and shifts [group, 1].
Grouped = Callable[[Tensor, Tensor, Tensor], Tensor]

_SITE = {"keys": Site.K_CACHE, "values": Site.V_CACHE}


def quantised_faults(layer: int) -> tuple[Fault, ...]:
    """Return the faults of quantised caches; each is planted in the cache of `layer` alone."""
    return (*_integers(layer), _kept_row(layer), *_float8(layer))


def needs_full_attention(model: nn.Module) -> str | None:
    """Layers that all see all tokens: no other can be quantised."""
    kinds = set(getattr(model.config, "layer_types", None) or ())
    return needs_cache(model) or ("a layer does not see all tokens" if kinds - {"full_attention"} else None)


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


def in_dequantised(backend: str, layer: int, which: str, change: Change) -> Way:
    """Change what `which` ("keys" or "values") of one layer become when they are read from a cache of `backend`."""

    @contextmanager
    def way(model: nn.Module, commits: Commits) -> Iterator[None]:
        from transformers import cache_utils

        owner = getattr(cache_utils, backend)
        original = owner.__dict__["_dequantize"]

        def dequantise(self: Any, stored: Any) -> Tensor:
            rows: Tensor = original(self, stored)
            if commits.memory.get("updated") != layer or stored is not getattr(self, f"_quantized_{which}"):
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


def _fault(
    name: str, mechanism: str, reference: str, where: str, cause: str, way: Way, which: str, layer: int
) -> Fault:
    return scenario_fault(
        name,
        mechanism,
        reference,
        where,
        "float8_cache" if name.startswith("float8") else "quantised_cache",
        cause,
        way,
        (_SITE[which],),
        needs_full_attention,
        lambda model: layer,
    )


def _integers(layer: int) -> tuple[Fault, ...]:
    def fault(
        name: str, mechanism: str, reference: str, where: str, cause: str, which: str, change: Grouped, n_bits: int = 0
    ) -> Fault:
        def changed(stored: Any, rows: Tensor) -> Tensor:
            if n_bits and int(stored.qtype.bits) != n_bits:
                return rows
            scale, shift = stored._scale, stored._shift
            codes = torch.round((rows.reshape(scale.shape[0], -1) + shift) / scale)
            return change(codes, scale, shift).reshape(rows.shape)

        way = in_dequantised("QuantoQuantizedLayer", layer, which, changed)
        return _fault(name, mechanism, reference, where, cause, way, which, layer)

    def of_the_group_before(codes: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        wrong = scale.clone()
        wrong[1] = scale[0]
        return codes * wrong - shift

    def along_the_other_axis(codes: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        n_groups, size = codes.shape
        return codes * scale.flatten().repeat(size).reshape(n_groups, size) - shift

    return (
        fault(
            "quantised_scale_applied_twice",
            "M19",
            "NVIDIA/TensorRT-LLM#16916",
            "The scale of keys is applied twice when they are read.",
            "quantised_scale_wrong",
            "keys",
            lambda codes, scale, shift: codes * scale * scale - shift,
        ),
        fault(
            "quantised_scale_not_applied",
            "M19",
            "flashinfer-ai/flashinfer#1023",
            "Values are read as their codes, without the scale.",
            "quantised_scale_wrong",
            "values",
            lambda codes, scale, shift: codes - shift,
        ),
        fault(
            "quantised_zero_point_lost",
            "M19",
            "vllm-project/vllm#53334",
            "Keys are read without the zero point of their group.",
            "quantised_zero_point_lost",
            "keys",
            lambda codes, scale, shift: codes * scale,
        ),
        fault(
            "quantised_scale_of_the_group_before",
            "M19",
            "vllm-project/vllm#27232",
            "One group of values is read with the scale of the group before it.",
            "quantised_scale_wrong",
            "values",
            of_the_group_before,
        ),
        fault(
            "quantised_groups_along_the_other_axis",
            "M19",
            "flashinfer-ai/flashinfer#4979",
            "Scales are spread along the other axis of the grouped keys.",
            "quantised_axis_wrong",
            "keys",
            along_the_other_axis,
        ),
        fault(
            "quantised_to_two_bits",
            "M20",
            "vllm-project/vllm#38479",
            "Keys are kept in 2 bits where 4 were asked for.",
            "quantised_too_coarsely",
            "keys",
            lambda codes, scale, shift: torch.round(codes / 5) * 5 * scale - shift,
            n_bits=4,
        ),
    )


def _kept_row(layer: int) -> Fault:
    @contextmanager
    def way(model: nn.Module, commits: Commits) -> Iterator[None]:
        def lose(layers: Any, updated: int) -> None:
            kept = layers[updated]
            recent = kept.keys if hasattr(kept, "residual_length") else None
            if updated == layer and recent is not None and recent.numel():
                lost = recent.clone()
                lost[:, :, -1] = 0.0
                kept.keys = commits.take(recent, lost)

        with _updates(commits, lose):
            yield

    where = "The newest of the keys that are not quantised yet is lost."
    reference = "flashinfer-ai/flashinfer#5085"
    return _fault("quantised_kept_row_lost", "M20", reference, where, "slot_zeroed", way, "keys", layer)


def _float8(layer: int) -> tuple[Fault, ...]:
    def twice(stored: Any, rows: Tensor) -> Tensor:
        scale: Tensor = stored[1]
        return rows * scale.to(rows.dtype)

    def left_out(stored: Any, rows: Tensor) -> Tensor:
        codes: Tensor = stored[0]
        return codes.to(rows.dtype)

    def fault(name: str, reference: str, where: str, which: str, change: Change) -> Fault:
        way = in_dequantised("Fp8QuantizedLayer", layer, which, change)
        return _fault(name, "M19", reference, where, "quantised_scale_wrong", way, which, layer)

    return (
        fault(
            "float8_scale_applied_twice",
            "vllm-project/vllm#42580",
            "The scale of a float8 cache is applied twice to values.",
            "values",
            twice,
        ),
        fault(
            "float8_scale_not_applied",
            "flashinfer-ai/flashinfer#1023",
            "Keys of a float8 cache are read without their scale.",
            "keys",
            left_out,
        ),
    )
