"""What is judged is what the engine runs: passes that nothing watches are held against the recorded ones, and every
pass runs twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import _len_torch_function_stack  # type: ignore[attr-defined]
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.pipeline.judge import judge_directory
from kvdrift_bench.models.tiny import lively_model
from tests.support.matrix import further

PROMPTS = {"a": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12], "b": [11, 23, 4, 40, 9, 31, 7]}
MISMATCH, INCONCLUSIVE = kvdrift.Verdict.MISMATCH, kvdrift.Verdict.INCONCLUSIVE


def audited(model: Any, **options: Any) -> Audit:
    return kvdrift.audit(model, prompts=PROMPTS, span=2, **options)


def seen(audit: Audit, instrument: str) -> Any:
    return next(item for item in audit.evidence if item.instrument == instrument)


def said(audit: Audit, code: str) -> str:
    return next(caveat.text for caveat in audit.caveats if caveat.code == code)


def codes(audit: Audit) -> set[str]:
    return {caveat.code for caveat in audit.caveats}


def projection_without_hooks(factor: float) -> Any:
    """Layer 1's down projection is off by a factor where no module of its layer has a hook."""
    model = lively_model("llama", torch.bfloat16)
    layer = model.model.layers[1]
    forward = layer.mlp.down_proj.forward

    def down(x: torch.Tensor) -> Any:
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
        return forward(x) if hooked else forward(x) * factor

    layer.mlp.down_proj.forward = down
    return model


def attention_without_mode(factor: float) -> Any:
    """Attention of a decode step is off by a factor where no torch function mode is active."""

    def attend(module: Any, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
        out, weights = sdpa_attention_forward(module, query, *rest, **options)
        plain = query.shape[2] == 1 and _len_torch_function_stack() == 0
        return (out * factor if plain else out), weights

    name = f"plain_{factor}"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    return lively_model("llama", torch.bfloat16, name)


@pytest.mark.parametrize(
    ("make", "factor", "ladder"),
    [
        (projection_without_hooks, 1.5, "model"),
        (attention_without_mode, 1.5, "off"),
        *further((projection_without_hooks, 1.5, "off"), (attention_without_mode, 1.5, "model")),
    ],
)
def test_what_is_wrong_only_while_nothing_watches_is_found(make: Any, factor: float, ladder: Any) -> None:
    audit = audited(make(factor), ladder=ladder)
    assert audit.verdict is MISMATCH
    assert audit.kind == ("semantic" if ladder == "model" else None)
    assert audit.first_failure is not None
    assert (audit.first_failure.prompt, audit.first_failure.site) == ("a", "logits")
    assert "OBSERVED_DIFFERS" in codes(audit)
    assert "while nothing watches" in audit.decision.reasons[0]


def test_on_the_ladder_a_small_one_is_found_too() -> None:
    audit = audited(projection_without_hooks(1.01))
    assert (audit.verdict, audit.kind) == (MISMATCH, "semantic")


def test_without_a_ladder_one_that_rounding_could_make_is_not_a_pass() -> None:
    audit = audited(projection_without_hooks(1.02), ladder="off")
    assert audit.verdict is INCONCLUSIVE
    assert "so it may be rounding of other code" in audit.decision.reasons[0]
    assert audit.view["recommendations"][0].startswith("Run it again with the precision ladder")


@pytest.mark.parametrize("make", [projection_without_hooks, *further(attention_without_mode)])
def test_its_twin_is_clean_and_has_the_same_bits(make: Any) -> None:
    audit = audited(make(1.0))
    assert audit.exit_code == 0, audit.decision.reasons
    assert seen(audit, "repeat").statistic == 0.0
    assert seen(audit, "unobserved").supports == "H0"
    assert not codes(audit) & {"OBSERVED_DIFFERS", "NOT_DETERMINISTIC"}


def test_other_code_that_only_rounds_otherwise_is_named_and_passes() -> None:
    """A product in two halves, as a fused kernel may sum it, runs where no hook is active."""
    model = lively_model("llama", torch.bfloat16)
    layer = model.model.layers[1]
    product = layer.mlp.down_proj
    forward = product.forward

    def down(x: torch.Tensor) -> Any:
        if any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules()):
            return forward(x)
        half = x.shape[-1] // 2
        weight = product.weight
        return x[..., half:] @ weight[:, half:].T + x[..., :half] @ weight[:, :half].T

    product.forward = down
    audit = audited(model)
    assert audit.exit_code == 0, audit.decision.reasons
    assert "OBSERVED_DIFFERS" in codes(audit)


def stochastic(share: float) -> Any:
    """A layer is skipped at random, with a generator that everybody shares."""
    model = lively_model("llama", torch.bfloat16)
    layer = model.model.layers[1]
    forward = layer.forward

    def skipping(hidden: torch.Tensor, *args: Any, **options: Any) -> Any:
        return hidden if float(torch.rand(())) < share else forward(hidden, *args, **options)

    layer.forward = skipping
    return model


@pytest.mark.parametrize("ladder", ["model", *further("off")])
def test_a_layer_that_is_skipped_at_random_is_called_random(ladder: Any) -> None:
    torch.manual_seed(0)
    audit = audited(stochastic(0.2), ladder=ladder)
    assert audit.verdict is INCONCLUSIVE
    assert "two runs of one pass differ" in audit.decision.reasons[0]
    assert audit.diagnosis is None


def test_a_layer_with_a_generator_of_its_own_is_called_random() -> None:
    model = lively_model("llama", torch.bfloat16)
    layer, own = model.model.layers[1], torch.Generator().manual_seed(3)
    forward = layer.forward

    def skipping(hidden: torch.Tensor, *args: Any, **options: Any) -> Any:
        return hidden if float(torch.rand((), generator=own)) < 0.3 else forward(hidden, *args, **options)

    layer.forward = skipping
    audit = audited(model, ladder="off")
    assert audit.verdict is INCONCLUSIVE
    assert "the model draws random numbers" in audit.decision.reasons[0]


@pytest.mark.parametrize("wrong", [True, False])
def test_what_is_not_the_same_twice_in_decode_alone_is_a_mismatch(wrong: bool) -> None:
    """A copy that is overtaken in some decode steps, beside one that is not."""
    model = lively_model("llama", torch.bfloat16)
    product = model.model.layers[1].mlp.down_proj
    forward, steps = product.forward, [0]

    def racing(x: torch.Tensor) -> Any:
        steps[0] += x.shape[1] == 1
        overtaken = x.shape[1] == 1 and steps[0] % 3 == 0  # in one of both runs of two steps, at another step
        return forward(x.roll(1, dims=-1) if overtaken and wrong else x)

    product.forward = racing
    audit = audited(model, ladder="off")
    if not wrong:
        assert audit.verdict is not MISMATCH
        assert "NOT_DETERMINISTIC" not in codes(audit)
        return
    assert audit.verdict is MISMATCH, audit.decision.reasons
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, "mlp_out")
    assert "NOT_DETERMINISTIC" in codes(audit)
    assert "prefill gives the same bits each time" in said(audit, "NOT_DETERMINISTIC")


def test_a_model_that_draws_and_does_not_use_it_is_clean() -> None:
    assert audited(stochastic(0.0)).exit_code == 0


def test_a_model_that_counts_its_calls_is_called_random() -> None:
    model = lively_model("llama", torch.bfloat16)
    head, calls = model.lm_head.forward, [0]

    def counting(x: torch.Tensor) -> Any:
        calls[0] += 1
        return head(x) * (1.0 + 0.2 * (calls[0] % 5))

    model.lm_head.forward = counting
    audit = audited(model)
    assert audit.verdict is INCONCLUSIVE
    assert "keeps state between its calls" in audit.decision.reasons[0]


@pytest.mark.parametrize("factor", [1.5, *further(1.0)])
def test_saved_traces_are_judged_alike(factor: float, tmp_path: Any) -> None:
    audit = audited(projection_without_hooks(factor), out=tmp_path / "run")
    again, _ = judge_directory(tmp_path / "run")
    assert (again.verdict, again.kind, again.decision.reasons) == (audit.verdict, audit.kind, audit.decision.reasons)
    assert [item.text for item in again.evidence] == [item.text for item in audit.evidence]
    assert again.caveats == audit.caveats


def test_an_audit_of_a_scenario_alone_runs_each_pass_twice_and_unobserved(tmp_path: Any) -> None:
    random = audited(stochastic(0.5), scenarios=["chunked_prefill"])
    wrong = audited(projection_without_hooks(1.5), scenarios=["chunked_prefill"])
    clean = audited(projection_without_hooks(1.0), scenarios=["chunked_prefill"], out=tmp_path / "run")
    judged, _ = judge_directory(tmp_path / "run")

    assert random.verdict is INCONCLUSIVE
    assert "two runs of one pass differ" in random.decision.reasons[0]
    assert wrong.verdict is MISMATCH
    assert "while nothing watches" in said(wrong, "OBSERVED_DIFFERS")
    assert clean.exit_code == 0, clean.decision.reasons
    assert seen(clean, "unobserved").supports == "H0"
    assert (judged.verdict, judged.evidence) == (clean.verdict, clean.evidence)
