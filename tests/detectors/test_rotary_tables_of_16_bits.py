"""Models that keep their rotary tables in buffers, which `model.to(torch.bfloat16)` rounds: on every rung they hold
what is left. A rotation at another position is one all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from tests.support.every_kind import PROMPTS, lively
from tests.support.matrix import further


class Tables(nn.Module):
    """Cosines and sines by position, `off` by some positions in a decode step."""

    def __init__(self, off: int) -> None:
        super().__init__()
        angles = torch.arange(64)[:, None] * 10000.0 ** (-torch.arange(0, 16, 2) / 16.0)
        for name, table in (("cos", torch.cos(angles)), ("sin", torch.sin(angles))):
            self.register_buffer(name, table.repeat(1, 2).to(torch.bfloat16), persistent=False)
        self.off = off

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        at = position_ids + (self.off if position_ids.shape[1] == 1 else 0)
        return self.get_buffer("cos")[at].to(x.dtype), self.get_buffer("sin")[at].to(x.dtype)


def audited(off: int, ladder: Any) -> Audit:
    model = lively()
    model.model.rotary_emb = Tables(off)
    return kvdrift.audit(model, prompts=PROMPTS, span=2, ladder=ladder)


@pytest.mark.parametrize("ladder", ["model", *further("off")])
@pytest.mark.parametrize("off", [1, *further(-3)])
def test_a_rotation_at_another_position_is_named(off: int, ladder: Any) -> None:
    audit = audited(off, ladder)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (0, "q_rope")
    assert audit.diagnosis is not None
    position = audit.first_failure.position
    assert audit.diagnosis.text == f"decode rotates its query as if at position {position + off} instead of {position}"


def test_tables_of_16_bits_in_both_passes_are_no_difference() -> None:
    assert audited(0, "model").verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
