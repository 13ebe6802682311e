"""Scenarios of a user's own, and what goes wrong in them."""

from collections.abc import Callable

import pytest
import torch

import kvdrift
from kvdrift.errors import NotApplicable, UsageError
from kvdrift.scenarios.catalogue import SCENARIOS, choose_scenarios
from kvdrift.scenarios.model import Scenario
from kvdrift.scenarios.stage import Stage
from kvdrift.vocabulary.evidence import Verdict
from tests.support.tiny import tiny_model

PROMPTS = {"long": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12], "b": [4, 3, 2, 1, 9, 8, 7, 6, 5]}


def two_rewinds(stage: Stage) -> None:
    """As in docs/adding/scenario.md."""
    stage.need("rewind")
    with stage.rows(name="twice", length=len(stage.tokens) + 2, keep_past=True) as row:
        row.extend(stage.prompt)
        for _ in range(2):
            row.extend(stage.different(2))
            row.rewind(2)
        row.extend(stage.continuation[:2], compare=True)


def test_a_scenario_of_ones_own_is_judged_like_the_others() -> None:
    mine = kvdrift.Scenario("two_rewinds", "rows that a second rewind leaves behind", two_rewinds)

    audit = kvdrift.audit(tiny_model("llama"), prompts=PROMPTS, scenarios=[mine, "verify"])

    assert audit.verdict is Verdict.STRUCTURAL_DRIFT
    assert [row["name"] for row in audit.view["scenarios"]] == ["two_rewinds", "verify"]
    assert audit.view["scenarios"][0]["rows"] == ["long / twice"]


def broken_at_once(stage: Stage) -> None:
    raise ZeroDivisionError("mine")


def broken_when_run(stage: Stage) -> None:
    with stage.rows(name="a", length=8) as row:
        row.extend(stage.prompt[:4])
        row.extend(stage.prompt[4:6], compare=True)
    if not stage.on_paper:
        raise LookupError("lost")


def compares_nothing(stage: Stage) -> None:
    with stage.rows(length=8) as row:
        row.extend(stage.prompt[:4])


def plain_prefill(stage: Stage) -> None:
    with stage.rows(name="a", length=8) as row:
        row.extend(stage.prompt[:8], compare=True)


def other_steps(stage: Stage) -> None:
    with stage.rows(name="paper" if stage.on_paper else "stage", length=8) as row:
        row.extend(stage.prompt[:4])
        row.extend(stage.prompt[4:6], compare=True)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (broken_at_once, "mine: its steps failed on paper: ZeroDivisionError: mine"),
        (broken_when_run, "mine: it broke off at float32: LookupError: lost"),
        (compares_nothing, "mine: its steps compare nothing"),
        (plain_prefill, "mine: no path proof: the 8 tokens from position 0 were a plain prefill themselves"),
        (other_steps, "did not take the steps again that it took on paper"),
    ],
)
def test_a_scenario_that_fails_is_never_a_pass(steps: Callable[[Stage], None], reason: str) -> None:
    audit = kvdrift.audit(
        tiny_model("llama"), prompts=PROMPTS, span=2, scenarios=["decode", Scenario("mine", "nothing", steps)]
    )

    assert audit.verdict is Verdict.INCONCLUSIVE
    assert any(reason in text for text in audit.view["reasons"]), audit.view["reasons"]
    assert [row["verdict"] for row in audit.view["scenarios"]] == ["STRUCTURAL_DRIFT", "INCONCLUSIVE"]


def test_the_model_that_fails_in_a_scenario_fails_that_scenario_alone() -> None:
    model = tiny_model("llama")

    def refuse(module: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if kwargs.get("attention_mask") is not None:
            raise RuntimeError("no padding here")

    handle = model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2, scenarios=["batch_padded", "verify"])
    finally:
        handle.remove()

    verdicts = {row["name"]: row["verdict"] for row in audit.view["scenarios"]}
    assert verdicts == {"batch_padded": "INCONCLUSIVE", "verify": "STRUCTURAL_DRIFT"}
    assert "no padding here" in " ".join(audit.view["reasons"])


@pytest.mark.parametrize("chosen", ["rewinds", "", "decode,,verify", ["batch", "nothing"], []])
def test_an_unknown_name_is_a_usage_error(chosen: str | list[str]) -> None:
    with pytest.raises(UsageError, match=r"unknown scenario|no scenario is chosen"):
        choose_scenarios(chosen)


def test_two_scenarios_of_one_name_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match="two scenarios are called 'rewind'"):
        choose_scenarios([Scenario("rewind", "mine", two_rewinds)])


def test_a_bad_name_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="cannot be called 'Two words'"):
        Scenario("Two words", "nothing", two_rewinds)


def test_all_is_decode_and_every_scenario_once() -> None:
    with_decode, found = choose_scenarios("all,verify,decode")

    assert with_decode
    assert found == SCENARIOS
    assert choose_scenarios(None) == (True, ())
    assert choose_scenarios("verify")[0] is False


def test_not_applicable_is_what_a_scenario_raises() -> None:
    def never(stage: Stage) -> None:
        raise NotApplicable("not on a Tuesday")

    audit = kvdrift.audit(
        tiny_model("llama"), prompts=PROMPTS, span=2, scenarios=["verify", Scenario("mine", "x", never)]
    )

    assert audit.verdict is Verdict.STRUCTURAL_DRIFT
    assert audit.view["scenarios"][1]["reasons"] == ["not on a Tuesday"]
    assert "not on a Tuesday" in audit.to_markdown()


def test_a_rewind_behind_a_compared_token_begins_a_new_stretch() -> None:
    """Other tokens come in its place, so that they need a prefill of their own."""
    stretches: list[tuple[str, int, tuple[int, ...]]] = []

    def back_and_forth(stage: Stage) -> None:
        with stage.rows(name="a", length=8, keep_past=True) as row:
            row.extend(stage.prompt[:4])
            row.extend(stage.prompt[4:6], compare=True)
            row.rewind(1)
            row.extend(stage.different(1), compare=True)
        if stage.on_paper:
            stretches.extend((segment.name, len(segment.tokens), segment.positions) for segment in stage.segments)

    audit = kvdrift.audit(
        tiny_model("llama"), prompts=PROMPTS, span=2, scenarios=[Scenario("mine", "nothing", back_and_forth)]
    )

    assert stretches == [("long / a", 6, (4, 5)), ("long / a #2", 6, (5,))]
    assert audit.verdict is Verdict.STRUCTURAL_DRIFT, audit.view["reasons"]
