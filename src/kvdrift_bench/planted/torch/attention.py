"""Faults inside attention: what is scored, how, over which keys, with which heads, and how splits are merged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.torch.model import Applies, Fault, FindLayer
from kvdrift_bench.planted.torch.parts import (
    attention_modules,
    first_full,
    first_sliding,
    needs_alibi,
    needs_config,
    needs_interface,
    needs_mixed_layers,
    needs_sinks,
    needs_window,
)
from kvdrift_bench.planted.torch.ways import AttentionCall, AttentionChange, in_attention, planted
from kvdrift_bench.planted.torch.ways_modules import in_argument, in_attribute

SCORES = (Site.ATTN_SCORES, Site.ATTN_PROBS)

# In a sliding window that is full the first key that is seen is the oldest one, and to leave it out is the same mask
# as a window that is shorter by one.
_OLDEST = ("window_off_by_one",)

_SEED = 20_240


def attention_fault(
    name: str,
    mechanism: str,
    reference: str,
    where: str,
    cause: str,
    change: AttentionChange,
    *,
    sites: tuple[Site, ...] = SCORES,
    layer: int | None = None,
    find_layer: FindLayer | None = None,
    applies: Applies = needs_interface,
    also: tuple[str, ...] = (),
    amount: float | None = None,
) -> Fault:
    return Fault(
        name=name,
        mechanism=mechanism,
        reference=reference,
        where=where,
        sites=sites,
        cause=cause,
        plant=planted(in_attention(change)),
        layer=layer,
        find_layer=find_layer,
        applies=applies,
        also=also,
        amount=amount,
    )


def attention_faults(layer: int) -> tuple[Fault, ...]:
    """Return the faults inside attention; those of one layer are planted in `layer`."""
    return (*_scales(layer), *_caps_and_sinks(), *_biases(), *_keys(layer), *_windows())


def _scales(layer: int) -> tuple[Fault, ...]:
    def scale(name: str, where: str, factor: float | None, only: int | None = None) -> Fault:
        def change(call: AttentionCall) -> bool:
            if only not in (None, call.layer):
                return False
            call.scale *= float(call.query.shape[-1] ** -0.5) if factor is None else factor
            return True

        amount = None if factor is None else factor - 1.0
        reference = "flagos-ai/vllm-plugin-FL#400"
        return attention_fault(name, "M18", reference, where, "score_scale", change, layer=only, amount=amount)

    def one_head(call: AttentionCall) -> bool:
        if call.layer != layer:
            return False
        factors = torch.ones(call.query.shape[1], dtype=call.query.dtype, device=call.query.device)
        factors[1] = 1.0 + 2**-6  # a factor that 16-bit dtypes hold
        call.query = call.query * factors[None, :, None, None]
        return True

    return (
        scale("all_scales_1.001", "The score scale of every layer, 0.1 % too large.", 1.001),
        scale("all_scales_1.0001", "The score scale of every layer, 0.01 % too large.", 1.0001),
        scale("one_layer_scale_1.01", f"The score scale of layer {layer}, 1 % too large.", 1.01, layer),
        scale("all_scales_twice", "The score scale of every layer, taken twice.", None),
        attention_fault(
            "one_head_scale_1.016",
            "M18",
            "NVIDIA/TensorRT-LLM#6573",
            f"The scores of head 1 of layer {layer}, 1.6 % too large.",
            "score_scale_head",
            one_head,
            layer=layer,
        ),
    )


def _caps_and_sinks() -> tuple[Fault, ...]:
    def cap(name: str, reference: str, where: str, factor: float | None) -> Fault:
        def change(call: AttentionCall) -> bool:
            call.options["softcap"] = None if factor is None else call.options["softcap"] * factor
            return True

        applies = needs_config("attn_logit_softcapping", "no soft cap on the scores")
        cause = "softcap_missing" if factor is None else "softcap_wrong"
        return attention_fault(name, "M18", reference, where, cause, change, applies=applies)

    def sink(name: str, reference: str, where: str, cause: str, change: Callable[[Tensor], Tensor]) -> Fault:
        def owners(model: nn.Module) -> list[nn.Module]:
            return list(attention_modules(model).values())

        return Fault(
            name=name,
            mechanism="M18",
            reference=reference,
            where=where,
            # The operand of softmax holds the sink, and is shifted by the largest score, the sink among them.
            sites=SCORES,
            cause=cause,
            plant=planted(in_attribute(owners, lambda module: ("sinks",), change)),
            applies=needs_sinks,
        )

    return (
        cap("softcap_missing", "vllm-project/vllm-metal#665", "The soft cap of every layer, left out.", None),
        cap("softcap_too_small", "sgl-project/sgl-kernel-xpu#491", "The soft cap of every layer, halved.", 0.5),
        sink(
            "sink_missing",
            "vllm-project/vllm-metal#550",
            "The sinks of every layer, left out of the softmax.",
            "sink_missing",
            lambda sinks: torch.full_like(sinks.detach(), -torch.inf),
        ),
        sink(
            "sink_doubled",
            "ROCm/rocm-libraries#12227",
            "The sinks of every layer, counted twice in the softmax.",
            "sink_doubled",
            lambda sinks: sinks.detach() + 0.6931471805599453,
        ),
    )


def _biases() -> tuple[Fault, ...]:
    def modules(model: nn.Module) -> list[nn.Module]:
        return list(attention_modules(model).values())

    def bias(name: str, reference: str, where: str, cause: str, change: Callable[[Tensor], Tensor]) -> Fault:
        return Fault(
            name=name,
            mechanism="M05",
            reference=reference,
            where=where,
            sites=SCORES,
            cause=cause,
            plant=planted(in_argument(modules, "alibi", change)),
            applies=needs_alibi,
        )

    return (
        bias(
            "alibi_missing",
            "keras-team/keras-hub#2861",
            "The ALiBi term, built over the query length and so zero.",
            "alibi_missing",
            torch.zeros_like,
        ),
        bias(
            "alibi_attenuated",
            "tenstorrent/tt-metal#55337",
            "The ALiBi term, multiplied by the score scale like the scores.",
            "alibi_scaled",
            lambda alibi: alibi * 0.25,
        ),
        bias(
            "alibi_slopes_of_neighbour",
            "huggingface/transformers#4499",
            "The ALiBi term, each head with the slope of the next one.",
            "alibi_slopes",
            lambda alibi: alibi.roll(1, 0),
        ),
    )


def _keep(call: AttentionCall, keys: slice | list[int]) -> bool:
    """Let the call see only `keys`."""
    call.key, call.value = call.key[:, :, keys], call.value[:, :, keys]
    call.mask = None if call.mask is None else call.mask[..., keys]
    return True


def _keys(layer: int) -> tuple[Fault, ...]:
    def random_key(call: AttentionCall) -> bool:
        n_keys = call.key.shape[2]
        generator = torch.Generator().manual_seed(_SEED + call.layer)
        lost = 1 + int(torch.randint(max(1, n_keys - 2), (1,), generator=generator))
        return _keep(call, [key for key in range(n_keys) if key != lost])

    def one_layer_short(call: AttentionCall) -> bool:
        return call.layer == layer and _keep(call, slice(None, -1))

    def unwritten(call: AttentionCall) -> bool:
        """Two more slots that nothing was written to, which no mask hides."""
        room = torch.zeros_like(call.key[:, :, :2])
        call.key, call.value = torch.cat([call.key, room], 2), torch.cat([call.value, room.to(call.value.dtype)], 2)
        if call.mask is not None:
            shown = call.mask[..., -1:].expand(*call.mask.shape[:-1], 2)
            call.mask = torch.cat([call.mask, shown], -1)
        return True

    def frozen(call: AttentionCall) -> bool:
        captured: int = call.commits.memory.setdefault("kv_len", call.commits.past + call.commits.q_len)
        beyond = call.commits.past + call.commits.q_len - captured
        return 0 < beyond < call.key.shape[2] and _keep(call, slice(None, -beyond))

    return (
        attention_fault(
            "first_key_lost",
            "M09",
            "Blaizzy/mlx-vlm#1715",
            "The first key of every layer, evicted although no window is full.",
            "key_lost_first",
            lambda call: _keep(call, slice(1, None)),
            also=_OLDEST,
        ),
        attention_fault(
            "first_key_taken_for_padding",
            "M08",
            "huggingface/transformers#40877",
            "The first key of every layer, hidden by a padding mask that is shifted by one.",
            "key_lost_first",
            partial(_hide, key=0),
            also=_OLDEST,
        ),
        attention_fault(
            "last_key_lost",
            "M07",
            "NVIDIA/Megatron-LM#1425",
            "The key of the current token, left out in every layer.",
            "key_lost_last",
            lambda call: _keep(call, slice(None, -1)),
        ),
        attention_fault(
            "last_key_lost_in_one_layer",
            "M07",
            "NVIDIA/Megatron-LM#1425",
            f"The key of the current token, left out in layer {layer}.",
            "key_lost_last",
            one_layer_short,
            layer=layer,
        ),
        attention_fault(
            "some_key_lost",
            "M06",
            "sgl-project/sgl-kernel-xpu#196",
            "One key somewhere in the middle, left out in every layer.",
            "key_lost_middle",
            random_key,
        ),
        attention_fault(
            "mask_top_left",
            "M06",
            "microsoft/onnxruntime#29020",
            "A causal mask aligned to the top left: the one query sees the first key only.",
            "mask_top_left",
            lambda call: _keep(call, slice(0, call.query.shape[2])),
        ),
        attention_fault(
            "last_tile_dropped",
            "M06",
            "sgl-project/sgl-kernel-xpu#196",
            "The last four keys of every layer, a tile of the kernel, left out.",
            "key_tile_lost",
            lambda call: _keep(call, slice(None, -4)),
        ),
        attention_fault(
            "unwritten_slots_read",
            "M06",
            "GeeeekExplorer/nano-vllm#212",
            "Two slots behind the last key, never written, read as if they held keys.",
            "unwritten_slots_read",
            unwritten,
        ),
        attention_fault(
            "graph_kv_len_frozen",
            "M24",
            "paiml/aprender#2030",
            "The number of keys that was captured with the first decode step is replayed in all later ones.",
            "kv_len_frozen",
            frozen,
        ),
    )


def _hide(call: AttentionCall, *, key: int) -> bool:
    mask = call.mask
    if mask is None:
        mask = torch.zeros(1, 1, 1, call.key.shape[2], dtype=call.query.dtype, device=call.query.device)
    mask = mask.clone()
    mask[..., key] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    call.mask = mask
    return True


def _windows() -> tuple[Fault, ...]:
    def narrower(call: AttentionCall, model_window: int | None) -> bool:
        return model_window is not None and call.key.shape[2] >= model_window and _keep(call, slice(1, None))

    def window(call: AttentionCall) -> int | None:
        kinds = call.module.config.layer_types
        return call.module.config.sliding_window if kinds[call.layer] == "sliding_attention" else None

    def everywhere(call: AttentionCall) -> bool:
        size = call.module.config.sliding_window
        return window(call) is None and call.key.shape[2] > size and _keep(call, slice(-size, None))

    return (
        attention_fault(
            "window_minus_one",
            "M09",
            "huggingface/transformers#26792",
            "The oldest key of every full sliding window, left out.",
            "window_off_by_one",
            lambda call: narrower(call, window(call)),
            find_layer=first_sliding,
            applies=needs_window,
        ),
        attention_fault(
            "window_on_every_layer",
            "M10",
            "vllm-project/vllm#51756",
            "The sliding window of the other layers, applied to the layers that see everything.",
            "window_wrong_layer",
            everywhere,
            find_layer=first_full,
            applies=needs_mixed_layers,
        ),
    )
