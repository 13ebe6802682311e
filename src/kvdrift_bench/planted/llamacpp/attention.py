"""Faults inside attention: how it is scored, and over which keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.llamacpp.model import Grounds, LlamaFault, llama_fault
from kvdrift_bench.planted.llamacpp.ways import Change, Spot, in_layer

SCORES = (Site.ATTN_SCORES, Site.ATTN_PROBS)
SCALE, SOFTCAP = 0, 2  # ggml.c: parameters of SOFT_MAX and FLASH_ATTN_EXT

# From this position on the first tokens have left the windows of tiny models.
FAR = 12

Mask = NDArray[np.float32]


def attention_faults(layer: int) -> tuple[LlamaFault, ...]:
    """Return the faults inside attention; those of one layer are planted in `layer`."""
    return (*_scales(layer), *_caps_and_sinks(), *_keys(layer), *_windows())


def attends(grounds: Grounds) -> str | None:
    """Whether there are keys to attend to."""
    return None if grounds.full or grounds.sliding else "no attention"


def apart(grounds: Grounds) -> str | None:
    """Whether scores, softmax and the sum over values are operations of their own."""
    return "attention is one operation" if grounds.flash else attends(grounds)


def first_full(grounds: Grounds) -> int:
    """The first layer that sees all keys."""
    return min(grounds.full, default=0)


def _uncapped(grounds: Grounds) -> str | None:
    return "scores are capped" if grounds.capped else attends(grounds)


def _capped(grounds: Grounds) -> str | None:
    return None if grounds.capped else "no soft cap on the scores"


def _has_window(grounds: Grounds) -> str | None:
    return None if grounds.sliding else "no sliding window"


def _mixed(grounds: Grounds) -> str | None:
    return None if grounds.sliding and grounds.full else "no sliding window beside full attention"


attention_fault = partial(llama_fault, sites=SCORES, applies=attends)


def _scales(layer: int) -> tuple[LlamaFault, ...]:
    def scaled(name: str, where: str, factor: float, only: int | None = None) -> LlamaFault:
        def change(spot: Spot) -> Iterator[None]:
            if spot.kind in ("softmax", "flash"):
                spot.lend_parameter(SCALE, spot.node.parameter(SCALE) * factor)
                yield

        return attention_fault(
            name,
            "M18",
            "flagos-ai/vllm-plugin-FL#400",
            where,
            "score_scale",
            in_layer(only, change),
            layer=only,
            applies=_uncapped,
            amount=factor - 1.0,
        )

    def one_head(spot: Spot) -> Iterator[None]:
        if spot.base == "kq" and spot.kind == "scores":
            yield
            scores = spot.node.values().copy()
            scores[0, 1] *= 1.0 + 2**-6
            spot.write(scores)

    return (
        scaled("all_scales_1.001", "The score scale of every layer, 0.1 % too large.", 1.001),
        scaled("all_scales_1.0001", "The score scale of every layer, 0.01 % too large.", 1.0001),
        scaled("one_layer_scale_1.01", f"The score scale of layer {layer}, 1 % too large.", 1.01, layer),
        attention_fault(
            "one_head_scale_1.016",
            "M18",
            "NVIDIA/TensorRT-LLM#6573",
            f"The scores of head 1 of layer {layer}, 1.6 % too large.",
            "score_scale_head",
            in_layer(layer, one_head),
            layer=layer,
            applies=lambda grounds: apart(grounds) or _uncapped(grounds),
        ),
    )


def _caps_and_sinks() -> tuple[LlamaFault, ...]:
    def uncapped(spot: Spot) -> Iterator[None]:
        if spot.kind == "flash":
            spot.lend_parameter(SOFTCAP, 0.0)
            yield
        elif spot.base == "kq_tanh":
            before = spot.source(0).values().copy()
            yield
            spot.write(before)

    def halved(spot: Spot) -> Iterator[None]:
        if spot.kind == "flash":
            spot.lend_parameter(SOFTCAP, 0.5 * spot.node.parameter(SOFTCAP))
            yield
        elif spot.base in ("kq_scaled_1", "kq_scaled_2"):
            factor = 2.0 if spot.base == "kq_scaled_1" else 0.5
            spot.lend_parameter(0, factor * spot.node.parameter(0))
            yield

    def without_sinks(spot: Spot) -> Iterator[None]:
        if spot.kind in ("softmax", "flash"):
            spot.lend_operand(2 if spot.kind == "softmax" else 4, None)
            yield

    def sinks_twice(spot: Spot) -> Iterator[None]:
        """With a sink of probability s = 1 - sum_j p_j counted once more, each p_j is divided by 1 + s."""
        if spot.kind == "softmax":
            yield
            probs = spot.node.values().astype(np.float64)
            spot.write(probs / (2.0 - probs.sum(axis=-1, keepdims=True)))

    def sinks(grounds: Grounds) -> str | None:
        return None if grounds.sinks else "no attention sinks"

    return (
        attention_fault(
            "softcap_missing",
            "M18",
            "vllm-project/vllm-metal#665",
            "The soft cap of every layer, left out.",
            "softcap_missing",
            uncapped,
            applies=_capped,
        ),
        attention_fault(
            "softcap_too_small",
            "M18",
            "sgl-project/sgl-kernel-xpu#491",
            "The soft cap of every layer, halved.",
            "softcap_wrong",
            halved,
            applies=_capped,
        ),
        attention_fault(
            "sink_missing",
            "M18",
            "vllm-project/vllm-metal#550",
            "The sinks of every layer, left out of the softmax.",
            "sink_missing",
            without_sinks,
            applies=sinks,
        ),
        attention_fault(
            "sink_doubled",
            "M18",
            "ROCm/rocm-libraries#12227",
            "The sinks of every layer, counted twice in the softmax.",
            "sink_doubled",
            sinks_twice,
            applies=lambda grounds: apart(grounds) or sinks(grounds),
        ),
    )


def masked(change: Callable[[Spot, Mask], None]) -> Change:
    """Change the row [cell] of the mask that the step sees: 0 where a key is seen, -inf where it is hidden."""

    def around(spot: Spot) -> Iterator[None]:
        mask = spot.mask
        if mask is not None:
            rows = mask.values().astype(np.float32)
            change(spot, rows[0, 0, 0])
            spot.lend(mask, rows)
            yield

    return around


def _seen(row: Mask) -> NDArray[np.int64]:
    return np.flatnonzero(row == 0)


def _hide(choose: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> Change:
    """Hide some of the keys that are seen."""

    def change(spot: Spot, row: Mask) -> None:
        row[choose(_seen(row))] = -np.inf

    return masked(change)


def _keys(layer: int) -> tuple[LlamaFault, ...]:
    def unwritten(spot: Spot, row: Mask) -> None:
        row[spot.position + 1 : spot.position + 3] = 0.0

    def frozen(spot: Spot, row: Mask) -> None:
        if spot.position >= FAR and len(_seen(row)) > spot.position:  # a window moves on with its tokens
            captured = spot.tally.memory.setdefault("kv_len", spot.position + 1)
            row[captured : spot.position + 1] = -np.inf

    return (
        attention_fault(
            "first_key_lost",
            "M09",
            "Blaizzy/mlx-vlm#1715",
            "The first key of every layer, evicted although no window is full.",
            "key_lost_first",
            _hide(lambda seen: seen[:1]),
            # In a full window the oldest key is the first one that is seen.
            also=("window_off_by_one",),
        ),
        attention_fault(
            "last_key_lost",
            "M07",
            "NVIDIA/Megatron-LM#1425",
            "The key of the current token, left out in every layer.",
            "key_lost_last",
            _hide(lambda seen: seen[-1:]),
        ),
        attention_fault(
            "last_key_lost_in_one_layer",
            "M07",
            "NVIDIA/Megatron-LM#1425",
            f"The key of the current token, left out in layer {layer}.",
            "key_lost_last",
            in_layer(layer, _hide(lambda seen: seen[-1:])),
            layer=layer,
        ),
        attention_fault(
            "some_key_lost",
            "M06",
            "sgl-project/sgl-kernel-xpu#196",
            "One key in the middle, left out in every layer.",
            "key_lost_middle",
            _hide(lambda seen: seen[len(seen) // 3 : len(seen) // 3 + 1]),
        ),
        attention_fault(
            "mask_top_left",
            "M06",
            "microsoft/onnxruntime#29020",
            "A causal mask aligned to the top left: the one query sees the first key only.",
            "mask_top_left",
            _hide(lambda seen: seen[1:]),
        ),
        attention_fault(
            "last_tile_dropped",
            "M06",
            "sgl-project/sgl-kernel-xpu#196",
            "The last four keys of every layer, a tile of the kernel, left out.",
            "key_tile_lost",
            _hide(lambda seen: seen[-4:]),
        ),
        attention_fault(
            "unwritten_slots_read",
            "M06",
            "GeeeekExplorer/nano-vllm#212",
            "Two cells behind the last key, never written, read as if they held keys.",
            "unwritten_slots_read",
            masked(unwritten),
            # After the cache went back, the cells behind hold the tokens that were there.
            also=("mask_leak",),
        ),
        attention_fault(
            "graph_kv_len_frozen",
            "M24",
            "paiml/aprender#2030",
            "The number of keys that was captured with the first decode step is replayed in all later ones.",
            "kv_len_frozen",
            masked(frozen),
            find_layer=first_full,
        ),
    )


def _windows() -> tuple[LlamaFault, ...]:
    def full(spot: Spot, row: Mask) -> bool:
        return len(_seen(row)) < spot.position + 1

    def narrower(spot: Spot, row: Mask) -> None:
        if full(spot, row):
            row[_seen(row)[0]] = -np.inf

    def wider(spot: Spot, row: Mask) -> None:
        if full(spot, row):
            row[_seen(row)[0] - 1] = 0.0

    def everywhere(spot: Spot, row: Mask) -> None:
        """What the last layer with a window saw, every other layer sees as well."""
        known = spot.tally.memory
        if full(spot, row):
            known["window"] = len(_seen(row))
        elif "window" in known:
            row[_seen(row)[: -known["window"]]] = -np.inf

    def first_full_behind(grounds: Grounds) -> int:
        """The first layer that is told what a window is: one behind a layer that has one, in the first step."""
        return min(layer for layer in grounds.full if layer > min(grounds.sliding))

    def fault(
        name: str, mechanism: str, reference: str, where: str, cause: str, change: Callable[[Spot, Mask], None]
    ) -> LlamaFault:
        return attention_fault(
            name,
            mechanism,
            reference,
            where,
            cause,
            masked(change),
            find_layer=lambda grounds: min(grounds.sliding),
            applies=_has_window,
        )

    return (
        fault(
            "window_minus_one",
            "M09",
            "huggingface/transformers#26792",
            "The oldest key of every full sliding window, left out.",
            "window_off_by_one",
            narrower,
        ),
        fault(
            "window_plus_one",
            "M09",
            "microsoft/onnxruntime#25927",
            "The key that left the sliding window last, read in addition.",
            "window_off_by_one",
            wider,
        ),
        attention_fault(
            "window_on_every_layer",
            "M10",
            "vllm-project/vllm#51756",
            "The sliding window of the other layers, applied to the layers that see everything.",
            "window_wrong_layer",
            masked(everywhere),
            find_layer=first_full_behind,
            applies=_mixed,
        ),
    )
