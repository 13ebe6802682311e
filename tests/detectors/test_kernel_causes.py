"""Causes that act inside a decode kernel on right operands: named from scores and contexts alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kvdrift
from kvdrift.vocabulary.evidence import Verdict
from kvdrift_bench.planted.torch.own import context, handed, repeated, scores_of, softmax_of, split_of
from kvdrift_bench.planted.torch.parts import wide
from kvdrift_bench.planted.torch.ways import AttentionCall, in_attention, planted
from tests.support.tiny import tiny_model

PROMPTS = {"q": [99, 23, 4, 50, 66, 91, 2, 17, 18, 3]}
PAGE = 4


def last_page_is_the_one_before(call: AttentionCall, right: bool) -> Tensor:
    """Rows are gathered by a table of pages, whose last entry names the page before."""
    n = call.key.shape[2]
    table = [slot if right or slot < (n - 1) // PAGE * PAGE else slot - PAGE for slot in range(n)]
    call.key, call.value = call.key[:, :, table], call.value[:, :, table]
    return context(call, softmax_of(call, scores_of(call)))


def newest_value_late(call: AttentionCall, right: bool) -> Tensor:
    n = call.value.shape[2]
    call.value = call.value[:, :, [*range(n - 1), n - 1 if right else n - 2]]
    return context(call, softmax_of(call, scores_of(call)))


def tail_of_a_tile(call: AttentionCall, right: bool) -> Tensor:
    """Keys are loaded eight at a time, and what fills up the last tile is not masked."""
    n, room = call.key.shape[2], -call.key.shape[2] % 8
    keys, values = (F.pad(wide(rows), (0, 0, 0, room)) for rows in repeated(call))
    scores = wide(call.query) @ keys.transpose(2, 3) * call.scale
    scores[..., n + (0 if right else room) :] = -torch.inf
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return handed(call, weights @ values / weights.sum(-1, keepdim=True))


def prefix_and_suffix(call: AttentionCall, right: bool) -> Tensor:
    """A cascade of two parts, whose first is not rescaled to the larger of their two largest scores."""
    (one, of_one, top), (two, of_two, other) = split_of(call, 0, 6), split_of(call, 6, call.key.shape[2])
    peak = torch.maximum(top, other)
    first = torch.exp(top - peak) if right else torch.ones_like(top)
    second = torch.exp(other - peak)
    return handed(call, (one * first + two * second) / (of_one * first + of_two * second))


def clamped(call: AttentionCall, right: bool) -> Tensor:
    return context(call, softmax_of(call, scores_of(call).clamp(max=torch.inf if right else 3.0)))


KERNELS = [
    (last_page_is_the_one_before, "slot_aliased", "for the keys of the slots [8"),
    (newest_value_late, "slot_aliased", "for the value of slot 1"),
    (tail_of_a_tile, "unwritten_slots_read", "slots of zeros behind its own key in the sum of weights"),
    (prefix_and_suffix, "chunk_merge", "the first 6 keys and of the later ones"),
    (clamped, "softcap_wrong", "clamps its scores at 3"),
]


def audit_of(kernel: Callable[[AttentionCall, bool], Tensor], right: bool) -> kvdrift.Audit:
    model = tiny_model("llama", dtype=torch.bfloat16, lively=True)
    with planted(in_attention(lambda call: kernel(call, right)))(model):
        return kvdrift.audit(model, prompts=PROMPTS, span=2)


@pytest.mark.parametrize(("kernel", "cause", "words"), KERNELS)
def test_what_a_decode_kernel_does_with_right_operands_is_named(
    kernel: Callable[[AttentionCall, bool], Tensor], cause: str, words: str
) -> None:
    audit = audit_of(kernel, right=False)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert audit.first_failure.layer == 0
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == cause, audit.diagnosis.text
    assert words in audit.diagnosis.text


@pytest.mark.matrix
@pytest.mark.parametrize("kernel", [kernel for kernel, _, _ in KERNELS])
def test_its_right_twin_is_clean(kernel: Callable[[AttentionCall, bool], Tensor]) -> None:
    assert audit_of(kernel, right=True).exit_code == 0
