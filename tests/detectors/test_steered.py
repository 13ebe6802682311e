"""A vector that is put into the stream to steer a model, by a hook of its user: at all tokens, at those of the prompt,
or at the last token of each call, where decode is another function than prefill."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.evidence import Verdict
from tests.support.every_kind import PROMPTS, lively
from tests.support.matrix import further

Where = Literal["everywhere", "prompt", "last"]


def steered(where: Where, **options: Any) -> Audit:
    model = lively()
    vector = 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(4))

    def hook(module: Any, args: Any, out: Tensor) -> Tensor:
        if where == "prompt" and out.shape[1] == 1:
            return out
        steered = out + vector.to(out.dtype)
        return torch.cat([out[:, :-1], steered[:, -1:]], dim=1) if where == "last" else steered

    model.model.layers[0].register_forward_hook(hook)
    return kvdrift.audit(model, prompts=PROMPTS, span=2, **options)


@pytest.mark.parametrize("ladder", ["off", *further("model")])
def test_a_vector_that_is_added_in_both_passes_is_no_difference(ladder: Any) -> None:
    assert steered("everywhere", ladder=ladder).verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)


@pytest.mark.parametrize("ladder", ["model", *further("off")])
def test_a_vector_that_decode_leaves_out_is_named(ladder: Any) -> None:
    audit = steered("prompt", ladder=ladder)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (0, "layer_out")
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause is Cause.CONSTANT_OFFSET


@pytest.mark.parametrize("ladder", ["model", *further("off")])
def test_a_vector_at_the_last_token_is_not_taken_for_the_value_of_another(ladder: Any) -> None:
    """The last token of prefill has it too, so that its row is near to those of decode."""
    audit = steered("last", ladder=ladder)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (0, "layer_out")
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause is not Cause.VALUE_OF_OTHER_POSITION


def test_the_row_of_another_token_is_still_told() -> None:
    model = lively()
    kept: dict[str, Tensor] = {}

    def hook(module: Any, args: Any, out: Tensor) -> Tensor:
        if out.shape[1] > 1:
            kept["row"] = out[:, -1:]
            return out
        row, kept["row"] = kept["row"], out
        return row.to(out.dtype)

    model.model.layers[1].mlp.register_forward_hook(hook)
    audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause is Cause.VALUE_OF_OTHER_POSITION


def test_what_stands_behind_a_product_in_prefill_alone_is_said_to_be_left_out() -> None:
    model = lively()
    down = model.model.layers[1].mlp.down_proj
    random = torch.Generator().manual_seed(0)
    low, high = (torch.randn(2, size, generator=random) for size in (down.in_features, down.out_features))

    def adapted(_module: Any, args: Any, out: Tensor) -> Tensor:
        added = args[0] @ low.T.to(out.dtype) @ high.to(out.dtype)
        return out + 0.05 * added if out.shape[1] > 1 else out

    down.register_forward_hook(adapted)
    audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, "mlp_out")
    assert audit.diagnosis is not None
    assert "decode leaves out" in audit.diagnosis.text, audit.diagnosis
