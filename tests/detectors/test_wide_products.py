"""Products that a model of half precision keeps in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvdrift
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import Site
from tests.support.tiny import tiny_model

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12]}


@pytest.mark.parametrize("ladder", ["model", pytest.param("off", marks=pytest.mark.matrix)])
def test_a_head_that_a_model_keeps_in_float32_stays_there_in_both_passes(ladder: Any) -> None:
    audits = []
    for narrow_in_decode in (False, True):
        model = tiny_model("llama", dtype=torch.bfloat16, tie_word_embeddings=False)
        head = model.lm_head.float()

        def forward(x: Tensor, head: Any = head, narrow: bool = narrow_in_decode) -> Tensor:
            dtype = torch.bfloat16 if narrow and x.shape[-2] == 1 else head.weight.dtype
            return nn.functional.linear(x.to(dtype), head.weight.to(dtype)).to(head.weight.dtype)

        head.forward = forward
        audits.append(
            kvdrift.audit(model, prompts={"p": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12]}, span=3, ladder=ladder)
        )

    clean, found = audits
    assert clean.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), (clean.kind, clean.first_failure)
    assert "PINNED" not in {caveat.code for caveat in clean.caveats}
    assert found.verdict is Verdict.MISMATCH
    assert found.first_failure is not None
    assert found.first_failure.site is Site.LOGITS
