"""Faults of the cache as a whole: rows of another layer, and rows read in the wrong layout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.torch.cache import V_ONLY, Rows, cache_fault, reading, writing
from kvdrift_bench.planted.torch.model import Fault
from kvdrift_bench.planted.torch.parts import needs_groups, needs_interface
from kvdrift_bench.planted.torch.ways import AttentionCall, CacheCall, in_attention


def layout_faults(layer: int) -> tuple[Fault, ...]:
    """Return the faults of layers and layouts; those of one layer are planted in `layer`."""
    return (*_layers(layer), *_layouts(layer))


def _layers(layer: int) -> tuple[Fault, ...]:
    def below(call: CacheCall) -> Rows | None:
        donor = call.layers[call.layer - 1]
        same = donor.keys.shape == call.keys.shape
        return (donor.keys, donor.values) if same else None

    def values_below(call: CacheCall) -> Rows | None:
        donor = call.layers[call.layer - 1]
        return (call.keys, donor.values) if donor.values.shape == call.values.shape else None

    def overwrite(call: CacheCall) -> Rows | None:
        """The layer above writes into the slots of the layer below, which is seen when that one reads them next."""
        donor = call.layers[call.layer - 1]
        rows = call.keys.shape[2]
        if donor.keys.shape[1:] != (*call.keys.shape[1:2], donor.keys.shape[2], call.keys.shape[3]):
            return None
        donor.keys = torch.cat([donor.keys[:, :, :-rows], call.keys], 2)
        donor.values = torch.cat([donor.values[:, :, :-rows], call.values], 2)
        call.commits.take(donor.keys, None)
        return None

    return (
        cache_fault(
            "cache_of_the_layer_below",
            "M15",
            "Blaizzy/mlx-vlm#1138",
            f"Layer {layer} reads keys and values of the layer below, as if it shared them.",
            "kv_of_other_layer",
            reading(layer, below),
            layer=layer,
        ),
        cache_fault(
            "donor_overwritten",
            "M15",
            "vllm-project/vllm-ascend#11791",
            f"Layer {layer} writes its new rows into the slots of the layer below as well.",
            "kv_of_other_layer",
            writing(layer, overwrite),
            layer=layer - 1,
        ),
        cache_fault(
            "values_of_the_layer_below",
            "M17",
            "local-inference-lab/vllm#17",
            f"Layer {layer} reads the values of the layer below.",
            "kv_of_other_layer",
            reading(layer, values_below),
            sites=V_ONLY,
            layer=layer,
        ),
    )


def _layouts(layer: int) -> tuple[Fault, ...]:
    def value(name: str, reference: str, where: str, cause: str, change: Callable[[CacheCall], Tensor]) -> Fault:
        way = reading(layer, lambda call: (call.keys, change(call)))
        return cache_fault(name, "M17", reference, where, cause, way, sites=V_ONLY, layer=layer)

    def same_head_everywhere(call: CacheCall) -> Rows:
        """Rows laid out for the query heads, in a buffer for the kv heads: the first kv head fills all of it."""
        return call.keys[:, :1].expand_as(call.keys).clone(), call.values[:, :1].expand_as(call.values).clone()

    def strides_ignored(call: AttentionCall) -> bool:
        if call.layer != layer:
            return False
        shape = call.query.shape
        wrong = call.query.reshape(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
        call.query = wrong.contiguous()
        return True

    return (
        value(
            "values_transposed",
            "pytorch/pytorch#112577",
            f"The values of layer {layer}, read with heads and rows exchanged.",
            "v_transposed",
            lambda call: call.values.transpose(1, 2).reshape(call.values.shape),
        ),
        value(
            "values_rolled",
            "tinygrad/tinygrad#2267",
            f"The values of layer {layer}, each slot read from the one in front of it.",
            "v_permuted",
            lambda call: call.values.roll(1, dims=2),
        ),
        value(
            "keys_read_as_values",
            "ikawrakow/ik_llama.cpp#1592",
            f"The keys of layer {layer}, read in the place of its values.",
            "k_read_as_v",
            lambda call: call.keys.clone(),
        ),
        cache_fault(
            "query_strides_ignored",
            "M17",
            "pytorch/pytorch#112577",
            f"The query of layer {layer}, read with heads and dims exchanged.",
            "q_layout",
            in_attention(strides_ignored),
            sites=(Site.ATTN_SCORES, Site.ATTN_PROBS),
            layer=layer,
            applies=needs_interface,
        ),
        cache_fault(
            "kv_heads_written_alike",
            "M16",
            "NVIDIA/TensorRT-LLM#6573",
            "New rows of every layer: all kv heads get those of the first.",
            "head_group_wrong",
            writing(None, same_head_everywhere),
            applies=needs_groups,
        ),
    )
