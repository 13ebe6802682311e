"""Faults inside attention: what is scored, how, and over which keys."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdrift_bench.planted.torch.parts import (
    attentions,
    first_full,
    first_sliding,
    needs_alibi,
    needs_config,
    needs_interface,
    needs_mixed_layers,
    needs_sinks,
    needs_window,
)
from kvdrift_bench.planted.torch.registry import fault, faults
from kvdrift_bench.planted.torch.ways import AttentionCall, Way, in_attention, in_one_layer
from kvdrift_bench.planted.torch.ways_modules import in_argument, in_attribute

_SEED = 20_240

_needs_cap = needs_config("attn_logit_softcapping", "no soft cap on the scores")
_in_sinks = in_attribute(attentions, lambda module: ("sinks",))
_in_alibi = in_argument(attentions, "alibi")


def keep(call: AttentionCall, keys: slice | list[int]) -> bool:
    """Let the call see only `keys`."""
    call.key, call.value = call.key[:, :, keys], call.value[:, :, keys]
    call.mask = None if call.mask is None else call.mask[..., keys]
    return True


# ------------------------------------------------------------------------------------------------- scale, cap and bias


@faults({"all_scales_1.001": 1.001, "all_scales_1.0001": 1.0001}, needs_interface)
def all_scales(factor: float) -> Way:
    @in_attention
    def scaled(call: AttentionCall) -> bool:
        call.scale *= factor
        return True

    return scaled


@fault(needs_interface, name="one_layer_scale_1.01")
@in_attention
@in_one_layer
def one_layer_scale(call: AttentionCall) -> bool:
    call.scale *= 1.01
    return True


@fault(needs_interface)
@in_attention
def all_scales_twice(call: AttentionCall) -> bool:
    call.scale *= float(call.query.shape[-1] ** -0.5)
    return True


@fault(needs_interface, name="one_head_scale_1.016")
@in_attention
@in_one_layer
def one_head_scale(call: AttentionCall) -> bool:
    factors = torch.ones(call.query.shape[1], dtype=call.query.dtype, device=call.query.device)
    factors[1] = 1.0 + 2**-6  # a factor that 16-bit dtypes hold
    call.query = call.query * factors[None, :, None, None]
    return True


@fault(_needs_cap)
@in_attention
def softcap_missing(call: AttentionCall) -> bool:
    call.options["softcap"] = None
    return True


@fault(_needs_cap)
@in_attention
def softcap_too_small(call: AttentionCall) -> bool:
    call.options["softcap"] *= 0.5
    return True


@fault(needs_sinks)
@_in_sinks
def sink_missing(sinks: Tensor) -> Tensor:
    return torch.full_like(sinks.detach(), -torch.inf)


@fault(needs_sinks)
@_in_sinks
def sink_doubled(sinks: Tensor) -> Tensor:
    return sinks.detach() + 0.6931471805599453


@fault(needs_alibi)
@_in_alibi
def alibi_missing(alibi: Tensor) -> Tensor:
    return torch.zeros_like(alibi)


@fault(needs_alibi)
@_in_alibi
def alibi_attenuated(alibi: Tensor) -> Tensor:
    return alibi * 0.25


@fault(needs_alibi)
@_in_alibi
def alibi_slopes_of_neighbour(alibi: Tensor) -> Tensor:
    return alibi.roll(1, 0)


# ------------------------------------------------------------------------------------------------- which keys are seen


@fault(needs_interface)
@in_attention
def first_key_lost(call: AttentionCall) -> bool:
    return keep(call, slice(1, None))


@fault(needs_interface)
@in_attention
def first_key_taken_for_padding(call: AttentionCall) -> bool:
    mask = call.mask
    if mask is None:
        mask = torch.zeros(1, 1, 1, call.key.shape[2], dtype=call.query.dtype, device=call.query.device)
    mask = mask.clone()
    mask[..., 0] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    call.mask = mask
    return True


@fault(needs_interface)
@in_attention
def last_key_lost(call: AttentionCall) -> bool:
    return keep(call, slice(None, -1))


@fault(needs_interface)
@in_attention
@in_one_layer
def last_key_lost_in_one_layer(call: AttentionCall) -> bool:
    return keep(call, slice(None, -1))


@fault(needs_interface)
@in_attention
def some_key_lost(call: AttentionCall) -> bool:
    n_keys = call.key.shape[2]
    generator = torch.Generator().manual_seed(_SEED + call.layer)
    lost = 1 + int(torch.randint(max(1, n_keys - 2), (1,), generator=generator))
    return keep(call, [key for key in range(n_keys) if key != lost])


@fault(needs_interface)
@in_attention
def mask_top_left(call: AttentionCall) -> bool:
    return keep(call, slice(0, call.query.shape[2]))


@fault(needs_interface)
@in_attention
def last_tile_dropped(call: AttentionCall) -> bool:
    return keep(call, slice(None, -4))


@fault(needs_interface)
@in_attention
def unwritten_slots_read(call: AttentionCall) -> bool:
    """Two more slots that nothing was written to, which no mask hides."""
    room = torch.zeros_like(call.key[:, :, :2])
    call.key, call.value = torch.cat([call.key, room], 2), torch.cat([call.value, room.to(call.value.dtype)], 2)
    if call.mask is not None:
        shown = call.mask[..., -1:].expand(*call.mask.shape[:-1], 2)
        call.mask = torch.cat([call.mask, shown], -1)
    return True


@fault(needs_interface)
@in_attention
def graph_kv_len_frozen(call: AttentionCall) -> bool:
    captured: int = call.commits.memory.setdefault("kv_len", call.commits.past + call.commits.q_len)
    beyond = call.commits.past + call.commits.q_len - captured
    return 0 < beyond < call.key.shape[2] and keep(call, slice(None, -beyond))


def _window(call: AttentionCall) -> int | None:
    """The sliding window of the layer, None if it sees everything."""
    kinds = call.module.config.layer_types
    return call.module.config.sliding_window if kinds[call.layer] == "sliding_attention" else None


@fault(needs_window, first=first_sliding)
@in_attention
def window_minus_one(call: AttentionCall) -> bool:
    window = _window(call)
    return window is not None and call.key.shape[2] >= window and keep(call, slice(1, None))


@fault(needs_mixed_layers, first=first_full)
@in_attention
def window_on_every_layer(call: AttentionCall) -> bool:
    size = call.module.config.sliding_window
    return _window(call) is None and call.key.shape[2] > size and keep(call, slice(-size, None))
