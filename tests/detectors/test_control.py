"""The positive control: planted at every kind of place, never on a zero, and not needed by a mismatch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.pipeline.judge import judge_directory
from kvdrift.vocabulary.plan import LadderChoice
from kvdrift_bench.models.tiny import lively_model
from tests.support.matrix import further
from tests.support.tiny import tiny_model

PROMPTS = {"p": [5, 17, 42, 9, 77, 31, 8, 64, 23, 90, 12], "one": [7]}


def control(audit: Audit) -> kvdrift.Evidence:
    return next(item for item in audit.evidence if item.instrument == "positive_control")


def planted(audit: Audit) -> list[str]:
    found = control(audit).detail["planted"]
    assert isinstance(found, list)
    return [item["site"] for item in found if item["seen"]]


@pytest.mark.parametrize("ladder", ["model", "off"])
def test_a_fault_is_planted_at_every_kind_of_place_and_found_there(ladder: LadderChoice, tmp_path: Path) -> None:
    audit = kvdrift.audit(
        lively_model("llama", torch.bfloat16), prompts=PROMPTS, span=2, ladder=ladder, out=tmp_path / "run"
    )

    assert control(audit).valid
    assert planted(audit) == ["q_rope", "k_cache", "mlp_out", "logits"]
    again, _ = judge_directory(tmp_path / "run")
    assert control(again) == control(audit)
    assert again.verdict is audit.verdict


def with_zeros(*names: str) -> Any:
    model = lively_model("llama", torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.zero_()
    return model


@pytest.mark.parametrize("ladder", ["model", *further("off")])
@pytest.mark.parametrize("zeros", [("q_proj", "k_proj"), ("v_proj", "down_proj"), *further((("q_proj",),))])
def test_no_fault_is_planted_on_a_zero(zeros: tuple[str, ...], ladder: LadderChoice) -> None:
    audit = kvdrift.audit(with_zeros(*zeros), prompts=PROMPTS, span=2, ladder=ladder)

    assert control(audit).valid, control(audit).reason
    assert audit.exit_code == 0
    assert "logits" in planted(audit)
    assert "q_rope" not in planted(audit) or "q_proj" not in zeros


@pytest.mark.parametrize("architecture", ["gpt2", *further("bloom")])
def test_a_model_without_rotation_needs_no_rotated_query(architecture: str) -> None:
    audit = kvdrift.audit(tiny_model(architecture, dtype=torch.bfloat16), prompts=PROMPTS, span=2)

    assert control(audit).valid, control(audit).reason
    assert {"mlp_out", "logits"} <= set(planted(audit))


@contextmanager
def off_by(module: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Change what a module returns for a single token."""
    handle = module.register_forward_hook(lambda _, __, out: change(out) if out.shape[1] == 1 else None)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("ladder", ["model", "off"])
def test_a_mismatch_is_not_weakened_by_a_control_that_lies_behind_it(ladder: LadderChoice) -> None:
    model = lively_model("llama", torch.bfloat16)
    with off_by(model.model.layers[0].self_attn.q_proj, lambda out: out * 1.25):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2, ladder=ladder)

    assert audit.verdict is kvdrift.Verdict.MISMATCH
    row = next(row for row in audit.view["hypotheses"]["evidence"] if row["evidence"] == "Positive control seen")
    assert not row["against_the_run"]
    assert not any("control" in reason for mode in audit.view["modes"].values() for reason in mode["reasons"])
    assert "cannot be trusted" not in audit.to_markdown()
