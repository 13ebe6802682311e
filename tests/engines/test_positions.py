"""How many tokens a model takes: learned positions that begin behind a padding row, and limits by other names."""

from __future__ import annotations

import pytest
import torch

import kvdrift
from kvdrift.engines.hf.engine import HFEngine
from kvdrift.errors import CaptureError
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.zoo.build import build
from kvdrift.zoo.rows import PROMPTS
from tests.support.tiny import tiny_model


@pytest.mark.parametrize(
    ("kind", "usable"),
    [
        ("roberta", 126),  # of 128 rows; the first two are of the padding
        ("bert", 128),
        ("whisper", 128),  # max_target_positions
        pytest.param("opt", 128, marks=pytest.mark.matrix),  # its table has two rows more
        pytest.param("mpt", 128, marks=pytest.mark.matrix),  # max_seq_len
        pytest.param("prophetnet", 126, marks=pytest.mark.matrix),
    ],
)
def test_the_positions_of_a_model_are_those_that_a_text_may_use(kind: str, usable: int) -> None:
    with HFEngine(build(kind)) as engine:
        assert engine.info.max_positions == usable
        sequence = engine.new_sequence(usable)
        sequence.extend([20 + token % 80 for token in range(usable)])
        sequence.close()


@pytest.mark.parametrize("kind", ["roberta", "whisper"])
def test_one_token_more_is_one_too_many(kind: str) -> None:
    with HFEngine(build(kind)) as engine:
        assert engine.info.max_positions is not None
        sequence = engine.new_sequence(engine.info.max_positions + 1)
        with pytest.raises(CaptureError):
            sequence.extend([20 + token % 80 for token in range(engine.info.max_positions + 1)])
        sequence.close()


def test_the_last_positions_of_learned_ones_are_audited() -> None:
    audit = kvdrift.audit(build("roberta"), prompts=PROMPTS, span=2, scenarios=["last_positions"])

    (row,) = audit.view["scenarios"]
    assert row["verdict"] == "STRUCTURAL_DRIFT"
    assert row["rows"] == ["long / up to 126"]


def test_a_scenario_that_would_leave_the_positions_does_not_apply() -> None:
    def behind_the_end(stage: kvdrift.Stage) -> None:
        with stage.rows(name="behind the end", length=130) as row:
            row.extend(stage.different(129))
            row.extend(stage.different(1), compare=True)

    mine = kvdrift.Scenario("behind_the_end", "nothing", behind_the_end)
    audit = kvdrift.audit(tiny_model("gpt2"), prompts=PROMPTS, span=2, scenarios=["decode", mine])

    row = audit.view["scenarios"][1]
    assert audit.verdict is Verdict.STRUCTURAL_DRIFT
    assert row["applicable"] is False
    assert row["reasons"] == ["needs 129 tokens, and the model takes 128"]


def test_a_prefill_that_breaks_stops_its_own_scenario_alone() -> None:
    """The prefill that `verify` of 14 tokens is compared with is longer than what the model can compute at once."""

    def refuse(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[1] > 13:
            raise IndexError("no more than 13 tokens at once")

    model = tiny_model("llama")
    handle = model.register_forward_pre_hook(refuse)
    try:
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2, scenarios=["decode", "verify", "second_call"])
    finally:
        handle.remove()

    rows = {row["name"]: row for row in audit.view["scenarios"]}
    assert audit.verdict is Verdict.INCONCLUSIVE
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "decode": "STRUCTURAL_DRIFT",
        "verify": "INCONCLUSIVE",
        "second_call": "STRUCTURAL_DRIFT",
    }
    assert "no more than 13 tokens at once" in rows["verify"]["reasons"][0]
    assert any(reason.startswith("verify: it broke off at float32") for reason in audit.decision.reasons)
