"""Clean twins: decode steps computed in another correct way, which must never be called a mismatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdrift_bench.planted.torch.model import Applies, CleanTwin
from kvdrift_bench.planted.torch.own import (
    additive,
    attend,
    context,
    handed,
    merged,
    repeated,
    scores_of,
    softmax_of,
    split_in,
    with_sink,
)
from kvdrift_bench.planted.torch.parts import needs_alibi, needs_groups, needs_interface, needs_sinks
from kvdrift_bench.planted.torch.twins_outside import outside_twins
from kvdrift_bench.planted.torch.ways import AttentionCall, AttentionChange, in_attention, planted
from kvdrift_bench.planted.torch.ways_modules import in_argument

_LOG2_E = 1.4426950408889634


def clean_twins() -> tuple[CleanTwin, ...]:
    """Return all clean twins."""
    return (*_kernels(), *_splits(), *_operands(), *_layouts(), *outside_twins())


def _twin(
    name: str, reference: str, why: str, change: AttentionChange, applies: Applies = needs_interface
) -> CleanTwin:
    return CleanTwin(name=name, reference=reference, why=why, plant=planted(in_attention(change)), applies=applies)


def _kernels() -> tuple[CleanTwin, ...]:
    def head_by_head(call: AttentionCall) -> Tensor:
        keys, values = repeated(call)
        rows = softmax_of(call, scores_of(call, keys)).to(call.query.dtype)
        outs = [rows[:, head] @ values[:, head].to(rows.dtype) for head in range(rows.shape[1])]
        return torch.stack(outs, dim=2).contiguous()

    def group_by_group(call: AttentionCall) -> Tensor:
        """Queries of a group stand where a kernel has its token axis."""
        n_kv, dim = call.key.shape[1], call.query.shape[-1]
        rows = call.query.shape[2]
        packed = call.query.reshape(1, n_kv, -1, dim).double()
        scores = (packed @ call.key.double().transpose(2, 3)) * call.scale
        scores = scores.reshape(1, -1, rows, call.key.shape[2])
        mask = additive(call, scores.dtype)
        probs = torch.exp(torch.log_softmax(scores if mask is None else scores + mask, dim=-1))
        out = probs.reshape(1, n_kv, -1, call.key.shape[2]) @ call.value.double()
        return handed(call, out.reshape(1, -1, rows, out.shape[-1]))

    def by_log_softmax(call: AttentionCall) -> Tensor:
        rows = with_sink(call, scores_of(call))
        return context(call, torch.exp(torch.log_softmax(rows, dim=-1))[..., : call.key.shape[2]])

    def by_exp2(call: AttentionCall) -> Tensor:
        rows = with_sink(call, scores_of(call)) * _LOG2_E
        weights = torch.exp2(rows - rows.amax(-1, keepdim=True))
        return context(call, (weights / weights.sum(-1, keepdim=True))[..., : call.key.shape[2]])

    def divided_last(call: AttentionCall) -> Tensor:
        rows = with_sink(call, scores_of(call))
        weights = torch.exp(rows - rows.amax(-1, keepdim=True))
        values = repeated(call)[1].to(weights.dtype)
        return handed(call, weights[..., : values.shape[2]] @ values / weights.sum(-1, keepdim=True))

    def product_and_sum(call: AttentionCall) -> Tensor:
        keys, values = repeated(call)
        wide = call.query.double() if call.query.dtype == torch.float64 else call.query.float()
        scores = (wide[:, :, :, None] * keys[:, :, None].to(wide.dtype)).sum(-1) * call.scale
        mask = additive(call, scores.dtype)
        return context(call, F.softmax(scores if mask is None else scores + mask, dim=-1), values)

    def by_math(call: AttentionCall) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        keys, values = repeated(call)
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(
                call.query, keys, values, attn_mask=additive(call, call.query.dtype), scale=call.scale
            )
        return out.transpose(1, 2).contiguous()

    def in_a_batch(call: AttentionCall) -> Tensor:
        keys, values = repeated(call)
        q, k, v = (tensor.expand(3, *tensor.shape[1:]).contiguous() for tensor in (call.query, keys, values))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=additive(call, call.query.dtype), scale=call.scale)
        return out[:1].transpose(1, 2).contiguous()

    def as_prefill(call: AttentionCall) -> Tensor:
        """The kernel of prefill: the query stands in four rows, of which the last one is taken."""
        keys, values = repeated(call)
        rows = torch.cat([call.query] * 4, dim=2)
        mask = additive(call, call.query.dtype)
        mask = None if mask is None else torch.cat([mask] * 4, dim=2)
        out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=call.scale)
        return out[:, :, -call.query.shape[2] :].transpose(1, 2).contiguous()

    same = "The same sums in another order."
    return (
        _twin("own_attention", "huggingface/transformers#25420", same, lambda call: attend(call)),
        _twin("heads_one_by_one", "huggingface/transformers#26344", same, head_by_head),
        _twin(
            "groups_packed_in_float64",
            "ggml-org/llama.cpp#25315",
            "Grouped queries on unrepeated keys, in more precision than needed.",
            group_by_group,
            needs_no_sink_groups,
        ),
        _twin("log_softmax", "sgl-project/sglang#30821", "exp of a log-softmax is a softmax.", by_log_softmax),
        _twin("softmax_by_exp2", "Dao-AILab/flash-attention#1569", "2^(x log2 e) is e^x.", by_exp2),
        _twin(
            "divided_last", "Dao-AILab/flash-attention#1417", "The sum divides the output, not the rows.", divided_last
        ),
        _twin("product_and_sum", "ggml-org/llama.cpp#4479", same, product_and_sum, needs_no_cap),
        _twin("math_kernel", "microsoft/onnxruntime#8549", "Another kernel for the same call.", by_math, needs_no_cap),
        _twin(
            "batch_of_three_rows",
            "huggingface/transformers#26869",
            "Rows of a batch do not know each other.",
            in_a_batch,
            needs_no_cap,
        ),
        _twin(
            "kernel_of_prefill",
            "huggingface/transformers#31127",
            "Equal rows beside a row do not change it.",
            as_prefill,
            needs_no_cap,
        ),
    )


def needs_no_cap(model: Any) -> str | None:
    """Plain scores: no cap, no sinks."""
    if getattr(model.config, "attn_logit_softcapping", None) or needs_sinks(model) is None:
        return "scores are capped, or there are sinks"
    return needs_interface(model)


def needs_no_sink_groups(model: Any) -> str | None:
    """Grouped heads with plain scores."""
    return needs_no_cap(model) or needs_groups(model)


def _splits() -> tuple[CleanTwin, ...]:
    def split(name: str, reference: str, bounds: Callable[[AttentionCall], list[tuple[int, int]]]) -> CleanTwin:
        why = "Splits of the keys merged by their log-sum-exp are one softmax."
        return _twin(name, reference, why, lambda call: merged(call, bounds(call)))

    def blocks(call: AttentionCall) -> list[tuple[int, int]]:
        n_keys = call.key.shape[2]
        return [(start, min(start + 4, n_keys)) for start in range(0, n_keys, 4)]

    def uneven(call: AttentionCall) -> list[tuple[int, int]]:
        n_keys = call.key.shape[2]
        return [(0, n_keys - 1), (n_keys - 1, n_keys)] if n_keys > 1 else [(0, 1)]

    return (
        split("two_splits", "vllm-project/vllm#2848", lambda call: split_in(call, 2)),
        split("three_splits", "sgl-project/sglang#34683", lambda call: split_in(call, 3)),
        split("blocks_of_four", "sgl-project/sglang#25790", blocks),
        split("current_token_apart", "vllm-project/vllm#5952", uneven),
    )


def _reorder(call: AttentionCall, order: list[int]) -> bool:
    call.key, call.value = call.key[:, :, order], call.value[:, :, order]
    call.mask = None if call.mask is None else call.mask[..., order]
    return True


def _pads(call: AttentionCall, content: Callable[[Tensor], Tensor]) -> bool:
    """Up to three more slots behind the last key, hidden by the mask."""
    mask = additive(call, call.query.dtype)
    if mask is None:
        mask = torch.zeros(1, 1, call.query.shape[2], call.key.shape[2], dtype=call.query.dtype)
    n_more = min(3, call.key.shape[2])
    hidden = torch.full((*mask.shape[:-1], n_more), torch.finfo(mask.dtype).min, dtype=mask.dtype)
    call.mask = torch.cat([mask.to(call.query.device), hidden.to(call.query.device)], dim=-1)
    call.key = torch.cat([call.key, content(call.key[:, :, :n_more])], dim=2)
    call.value = torch.cat([call.value, content(call.value[:, :, :n_more])], dim=2)
    return True


def _operands() -> tuple[CleanTwin, ...]:
    def reversed_slots(call: AttentionCall) -> Tensor:
        _reorder(call, list(reversed(range(call.key.shape[2]))))
        return merged(call, split_in(call, 2))

    def permuted_slots(call: AttentionCall) -> Tensor:
        n_keys = call.key.shape[2]
        _reorder(call, torch.randperm(n_keys, generator=torch.Generator().manual_seed(n_keys)).tolist())
        return merged(call, [(0, n_keys)])

    def query_doubled(call: AttentionCall) -> bool:
        call.query, call.scale = call.query * 2.0, call.scale / 2.0
        return True

    def key_quartered(call: AttentionCall) -> bool:
        call.query, call.key = call.query * 4.0, call.key / 4.0
        return True

    def values_doubled(call: AttentionCall) -> Tensor:
        return context(call, softmax_of(call, scores_of(call)), repeated(call)[1] * 2.0) / 2.0

    def shifted(call: AttentionCall) -> Tensor:
        scores = with_sink(call, scores_of(call)) + 3.0
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        return context(call, (weights / weights.sum(-1, keepdim=True))[..., : call.key.shape[2]])

    def alibi_modules(model: Any) -> list[Any]:
        return [module for module in model.modules() if type(module).__name__.endswith("Attention")]

    exact = "Powers of two round nothing."
    return (
        _twin("slots_reversed", "vllm-project/vllm#11778", "Attention does not know an order of keys.", reversed_slots),
        _twin("slots_permuted", "ggml-org/llama.cpp#7052", "Attention does not know an order of keys.", permuted_slots),
        _twin(
            "slots_permuted_for_the_kernel",
            "ggml-org/llama.cpp#6950",
            "Attention does not know an order of keys, whichever function computes it.",
            lambda call: _reorder(call, list(reversed(range(call.key.shape[2])))),
        ),
        _twin("query_doubled_scale_halved", "huggingface/transformers#2401", exact, query_doubled),
        _twin(
            "query_times_four_key_quartered",
            "huggingface/transformers#28732",
            exact,
            key_quartered,
        ),
        _twin(
            "values_doubled_output_halved",
            "huggingface/transformers#27626",
            exact,
            values_doubled,
        ),
        _twin("scores_shifted", "vllm-project/vllm#945", "A constant in all scores leaves softmax as it is.", shifted),
        CleanTwin(
            name="alibi_shifted",
            reference="vllm-project/vllm#1009",
            why="A constant for each head in all biases leaves softmax as it is.",
            plant=planted(in_argument(alibi_modules, "alibi", lambda alibi: alibi - alibi[..., -1:])),
            applies=needs_alibi,
        ),
    )


def _layouts() -> tuple[CleanTwin, ...]:
    def repeat_kv(call: AttentionCall) -> Tensor:
        """Repeated keys instead of an expanded view."""
        group = call.query.shape[1] // call.key.shape[1]
        call.key = call.key.repeat_interleave(group, dim=1)
        call.value = call.value.repeat_interleave(group, dim=1)
        return attend(call)

    def contiguous(call: AttentionCall) -> bool:
        call.query, call.key, call.value = (t.clone().contiguous() for t in (call.query, call.key, call.value))
        return True

    def strided(call: AttentionCall) -> bool:
        call.query, call.key, call.value = (
            t.transpose(1, 2).contiguous().transpose(1, 2) for t in (call.query, call.key, call.value)
        )
        return True

    def in_a_buffer(call: AttentionCall) -> bool:
        """Rows that lie in a larger buffer, as those of a static cache do."""
        for name in ("key", "value"):
            rows = getattr(call, name)
            buffer = torch.full((*rows.shape[:2], 64 + rows.shape[2], rows.shape[3]), 7.0).to(rows.device, rows.dtype)
            buffer[:, :, 5 : 5 + rows.shape[2]] = rows
            setattr(call, name, buffer[:, :, 5 : 5 + rows.shape[2]])
        return True

    return (
        _twin(
            "kv_heads_repeated",
            "huggingface/transformers#39067",
            "A copy of a head is that head.",
            repeat_kv,
            needs_groups,
        ),
        _twin("contiguous_copies", "huggingface/transformers#17490", "A copy holds the same numbers.", contiguous),
        _twin("strided_views", "huggingface/transformers#13849", "A layout holds the same numbers.", strided),
        _twin("rows_in_a_larger_buffer", "NVIDIA/TensorRT-LLM#15503", "A view holds the same numbers.", in_a_buffer),
        _twin(
            "padding_of_zeros",
            "huggingface/transformers#29029",
            "A key behind the mask has no weight.",
            lambda call: _pads(call, torch.zeros_like),
            needs_no_cap,
        ),
        _twin(
            "padding_of_garbage",
            "unslothai/unsloth#9708",
            "A key behind the mask has no weight, whatever it holds.",
            lambda call: _pads(call, lambda rows: rows.flip(1) * 3.0 + 1.0),
            needs_no_cap,
        ),
    )
