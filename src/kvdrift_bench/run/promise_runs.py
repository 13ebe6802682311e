"""Whether stated minima are kept: faults of one and a half times the minimum, in five shapes, at the place it is for.

A fault is planted in the result of a product, or of attention, in every decode step of one layer. Its size is relative
to the row, in the 2-norm, as minima are stated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import kvdrift
from kvdrift_bench.models.tiny import lively_model
from kvdrift_bench.run.promise_shapes import SHAPES, TIMES, PromiseCell, Shape, prompts_of

_SPAN, _LAYER = 3, 1
# By place: the module whose result is changed, from the layer or the model; attention is told by its own function.
_ATTENTION = "attn_ctx"
PLACES: dict[str, str] = {
    "q_proj": "self_attn.q_proj",
    "v_proj": "self_attn.v_proj",
    _ATTENTION: "",
    "attn_out": "self_attn.o_proj",
    "mlp_out": "mlp.down_proj",
    "logits": "lm_head",
}


def run_promises(
    places: Sequence[str], shapes: Sequence[str], draws: int, dtype: str = "bfloat16"
) -> Iterator[PromiseCell]:
    """Plant every shape at every place, `draws` times each with other prompts."""
    for place in places:
        for shape in shapes:
            found, minimum = 0, 0.0
            for seed in range(draws):
                prompts = prompts_of(seed)
                minimum = _stated(place, dtype, seed)
                with _planted(place, SHAPES[shape], TIMES * minimum, dtype, seed) as model:
                    audit = _audit(model, prompts)
                first = audit.first_failure
                found += audit.verdict is kvdrift.Verdict.MISMATCH and first is not None and first.site == place
            yield PromiseCell(place, shape, minimum, found, draws)


def _audit(model: Any, prompts: dict[str, list[int]]) -> Any:
    return kvdrift.audit(model, prompts=prompts, span=_SPAN, ladder="off", mode="kv_aligned")


_known: dict[tuple[str, int], Any] = {}


def _stated(place: str, dtype: str, seed: int) -> float:
    """The minimum that an audit of the clean model states for a place."""
    if (dtype, seed) not in _known:
        _known[dtype, seed] = _audit(lively_model("llama", getattr(torch, dtype)), prompts_of(seed))
    evidence = {item.instrument: item for item in _known[dtype, seed].evidence if item.mode == "kv_aligned"}
    if place == _ATTENTION:
        return float(evidence["replay"].minimum_detectable or math.nan)
    return float(evidence["products"].detail["minimum_by_site"][place])


@contextmanager
def _planted(place: str, shape: Shape, size: float, dtype: str, seed: int) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(seed)

    def change(row: Tensor) -> Tensor:
        flat = row.flatten(2).float()
        added = size * flat.norm(dim=-1, keepdim=True) * shape(flat, generator)
        changed: Tensor = (flat + added).to(row.dtype)
        return changed.reshape(row.shape)

    if place == _ATTENTION:
        with _attention(change) as name:
            yield lively_model("llama", getattr(torch, dtype), attention=name)
        return
    model = lively_model("llama", getattr(torch, dtype))
    owner = model if place == "logits" else model.model.layers[_LAYER]

    def after(module: Any, args: Any, output: Tensor) -> Tensor | None:
        return change(output) if output.shape[1] == 1 else None

    owner.get_submodule(PLACES[place]).register_forward_hook(after)
    yield model


@contextmanager
def _attention(change: Callable[[Tensor], Tensor]) -> Iterator[str]:
    """Register an attention that changes the context of one layer in decode steps, and yield its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    plain, name = AttentionInterface._global_mapping["sdpa"], "kvdrift_promise"

    def attention(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        context, weights = plain(module, query, *args, **kwargs)
        is_here = query.shape[2] == 1 and module.layer_idx == _LAYER
        return (change(context) if is_here else context), weights

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, AttentionMaskInterface._global_mapping["sdpa"])
    try:
        yield name
    finally:
        del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]


__all__ = ["PLACES", "run_promises"]
