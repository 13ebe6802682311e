"""Functions that move keys, values and mask together where nobody sees it, in both passes and under a window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from kvdrift_bench.models.tiny import lively_model
from kvdrift_bench.planted.kernels import correct_kernels
from kvdrift_bench.planted.torch.own import additive, attend
from kvdrift_bench.planted.torch.ways import AttentionCall, in_attention, planted
from tests.support.matrix import further

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12, 71, 23], "q": [99, 23, 4, 50, 66, 91, 2, 17, 18, 3]}
RING = next(kernel for kernel in correct_kernels() if kernel.name == "ring_buffer")
WINDOWED = [("mistral", torch.bfloat16), *further(("gemma3", torch.float32))]


def audited(model: Any, **options: Any) -> Audit:
    return kvdrift.audit(model, prompts=PROMPTS, span=4, **options)


@pytest.mark.parametrize(("kind", "dtype"), WINDOWED)
def test_a_ring_under_a_window_in_both_passes_passes(kind: str, dtype: torch.dtype) -> None:
    model = lively_model(kind, dtype)
    with RING.plant(model, "both"):
        audit = audited(model)

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), (audit.first_failure, audit.decision.reasons)


def test_without_a_ladder_it_is_no_alarm() -> None:
    model = lively_model("mistral", torch.bfloat16)
    with RING.plant(model, "both"):
        audit = audited(model, ladder="off")

    assert audit.verdict is not Verdict.MISMATCH


def moved(call: AttentionCall, *, harm: bool) -> Tensor:
    """Attention over keys that were moved round; with `harm`, a decode step sees another key than it should."""
    turn, mask = call.key.shape[2] // 3, additive(call, call.query.dtype)
    if harm and call.query.shape[2] == 1 and call.key.shape[2] > 2:
        call.key, call.value = (torch.cat([rows[:, :, 1:], rows[:, :, :1] * 0.9], 2) for rows in (call.key, call.value))
    call.key, call.value = call.key.roll(turn, 2), call.value.roll(turn, 2)
    call.mask = None if mask is None else mask.roll(turn, -1)
    return attend(call)


@pytest.mark.parametrize("harm", [False, True])
def test_a_wrong_key_in_such_a_ring_is_found(harm: bool) -> None:
    model = lively_model("mistral", torch.bfloat16)
    with planted(in_attention(lambda call: moved(call, harm=harm)), everywhere=True)(model):
        audit = audited(model)

    if harm:
        assert audit.verdict is Verdict.MISMATCH
    else:
        assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), (audit.first_failure, audit.decision.reasons)
