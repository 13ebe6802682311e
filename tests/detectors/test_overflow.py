"""float16 that runs out of range in both passes alike is no mismatch; in one pass alone it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.pipeline.judge import judge_directory
from kvdrift_bench.models.tiny import lively_model

PROMPTS = {"a": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12], "b": [11, 23, 4, 40, 9, 31, 7]}


def audited(*, in_prefill: float, in_decode: float, **options: Any) -> Audit:
    """Audit a model whose layer 1 multiplies what its feed-forward part gives for the first token of a call."""
    model = lively_model("llama", torch.float16)
    mlp = model.model.layers[1].mlp
    forward = mlp.forward

    def first_token(x: torch.Tensor) -> Any:
        out = forward(x)
        factor = in_prefill if x.shape[-2] > 1 else in_decode
        return torch.cat([out[:, :1] * factor, out[:, 1:]], dim=1)

    mlp.forward = first_token
    return kvdrift.audit(model, prompts=PROMPTS, span=2, **options)


@pytest.mark.parametrize("ladder", ["model", "off"])
def test_an_overflow_in_both_passes_is_named_and_is_no_mismatch(ladder: Any, tmp_path: Any) -> None:
    audit = audited(in_prefill=1e6, in_decode=1.0, ladder=ladder, out=tmp_path / "run")
    assert audit.verdict is kvdrift.Verdict.INCONCLUSIVE
    assert audit.first_failure is None
    assert audit.decision.reasons[0].startswith("float16 runs out of range in both passes: ")
    assert "layer 1 / mlp_out at position 0 of a" in audit.decision.reasons[0]
    again, _ = judge_directory(tmp_path / "run")
    assert again.decision.reasons == audit.decision.reasons


def test_an_overflow_of_decode_alone_is_a_mismatch() -> None:
    audit = audited(in_prefill=1.0, in_decode=1e6)
    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (1, "mlp_out")


def test_its_twin_is_clean() -> None:
    assert audited(in_prefill=1.0, in_decode=1.0).exit_code == 0
