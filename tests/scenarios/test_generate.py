"""Scenarios on a model's own `generate`: what is compared, that the model is left as it was, and what is not blamed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import GenerationConfig, LlamaForCausalLM

import kvdrift
from kvdrift.engines.base import CallProbe, FedRow, Generated, Generation
from kvdrift.engines.hf.engine import HFEngine
from kvdrift.errors import CaptureError
from kvdrift.pipeline.judge import judge_directory
from kvdrift.scenarios.loops import changes_places
from kvdrift.scenarios.model import Scenario
from kvdrift.scenarios.returned import is_plain_prefill, require_computed, returned_positions
from kvdrift.scenarios.stage import Stage
from kvdrift.trace.model import Trace
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.torch import corpus_for
from tests.support.carriers import N_LAYERS, PROMPT, PROMPTS, carrier_of, one_thread
from tests.support.matrix import first_of_each, further
from tests.support.tiny import ARCHITECTURES, tiny_model

LOOPS = ["generate_greedy", "generate_beam", "generate_assisted"]
# The scenarios that come nearest to what a loop does.
NEAREST = {
    "generate_greedy": ["batch_padded", "second_call"],
    "generate_beam": ["beams"],
    "generate_assisted": ["rewind", "verify"],
}
FAULTS = {fault.name: fault for fault in corpus_for(N_LAYERS) if fault.needs in LOOPS}


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def rows_of(model: Any, scenarios: list[Any] = LOOPS, **options: Any) -> dict[str, dict[str, Any]]:
    view = kvdrift.audit(model, prompts=PROMPTS, span=2, scenarios=scenarios, **options).view
    return {row["name"]: row for row in view["scenarios"]}


def generated(model: Any, **wanted: Any) -> Generated:
    with HFEngine(model) as engine:
        return engine.routes.generate(Generation(prompts=(tuple(PROMPT),), **wanted))


def test_the_calls_are_those_of_a_decode_loop_on_its_own_cache() -> None:
    trace = Trace("p", "decode", "d", "float64", tuple(PROMPT))
    with HFEngine(tiny_model("llama")) as engine:
        made = engine.routes.generate(Generation(prompts=(tuple(PROMPT),), n_new=3))
        with engine.at("float64"):
            engine.routes.generate_again(made, probes=[CallProbe(1, 0, (len(PROMPT),), trace)])

    assert [(row.n_fed, len(row.tokens)) for (row,) in made.calls] == [(11, 11), (1, 12), (1, 13)]
    assert [(call.q_len, call.cache_len_before, call.kv_len) for call in trace.calls] == [(1, 11, 12)]
    assert {record.values.dtype.name for record in trace.rows} == {"float64"}
    assert {Site.Q_ROPE, Site.ATTN_SCORES, Site.LOGITS} <= {record.site for record in trace.rows}


def test_it_generates_what_the_model_generates_by_itself() -> None:
    model = tiny_model("llama")

    alone = model.generate(torch.tensor([PROMPT]), max_new_tokens=6, do_sample=False, pad_token_id=0)
    beams = model.generate(torch.tensor([PROMPT]), max_new_tokens=4, num_beams=3, num_return_sequences=3)

    assert generated(model, n_new=6).sequences == tuple(map(tuple, alone.tolist()))
    assert generated(model, n_new=4, n_beams=3).sequences == tuple(map(tuple, beams.tolist()))


def test_some_drafts_are_accepted_and_some_rejected() -> None:
    model = tiny_model("llama")
    right = generated(model, n_new=8).sequences[0][len(PROMPT) :]
    drafts = (*right[:2], right[2] - 1, *right[3:])

    made = generated(model, n_new=8, drafts=drafts)

    assert made.sequences[0][len(PROMPT) :] == right
    # Two of four accepted in the first call; the next begins with the token that the model put in the third place.
    assert [(row.n_fed, row.n_logits) for (row,) in made.calls] == [(15, 5), (5, 5)]
    assert made.calls[0][0].tokens[-2:] == drafts[2:4]
    assert made.calls[1][0].tokens[-5:] == right[2:7]


def test_a_draft_model_is_run_by_the_loop_and_is_right_and_wrong_in_turns() -> None:
    model = tiny_model("llama")
    alone = generated(model, n_new=12).sequences[0]

    made = generated(model, n_new=12, draft_text=alone)

    assert made.draft_error is None
    assert made.has_drafts
    assert made.sequences[0] == alone
    # Two of four accepted in each call, and the token that the model itself puts in the place of the third.
    assert [(row.n_fed, len(row.tokens)) for (row,) in made.calls] == [(15, 15), (5, 18), (5, 21), (3, 22)]
    assert [row.tokens == alone[: len(row.tokens)] for (row,) in made.calls] == [False, False, False, True]


def test_a_draft_model_runs_at_every_precision_and_the_drafts_stay_the_same() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    seen: list[nn.Module] = []

    def note(module: nn.Module, args: object) -> None:
        if isinstance(module, LlamaForCausalLM) and module is not model:
            seen.append(module)

    with HFEngine(model) as engine:
        alone = engine.routes.generate(Generation(prompts=(tuple(PROMPT),), n_new=12)).sequences[0]
        wanted = Generation(prompts=(tuple(PROMPT),), n_new=12, draft_text=alone)
        made = engine.routes.generate(wanted)
        for rung in ("bfloat16", "float32", "float64"):
            handle = register_module_forward_pre_hook(note)
            with engine.at(rung):
                engine.routes.generate_again(made)
            handle.remove()
            assert seen, rung
            seen.clear()


def proposing(model: Any, shift: list[int]) -> Any:
    """Have the draft model of `model` propose tokens that lie `shift[0]` behind its own; return what does that."""
    original = model._get_candidate_generator

    def shifted(**options: Any) -> Any:
        source = original(**options)
        own = source.get_candidates

        def get_candidates(ids: torch.Tensor) -> Any:
            proposed, scores = own(ids)
            return torch.cat([ids, (proposed[:, ids.shape[1] :] + shift[0]) % 128], dim=1), scores

        source.get_candidates = get_candidates
        return source

    model.__dict__["_get_candidate_generator"] = shifted
    return shifted


def test_a_draft_model_that_is_never_right_is_no_finding() -> None:
    """A clean twin: what is proposed is the affair of the draft model, as long as the model drops it again."""
    model = tiny_model("llama")
    never_right = proposing(model, [5])

    row = rows_of(model, ["generate_assisted"])["generate_assisted"]

    assert (row["verdict"], row["rows"]) == ("STRUCTURAL_DRIFT", ["p / drafts", "p / draft model"])
    assert model.__dict__["_get_candidate_generator"] is never_right


def test_drafts_of_another_run_do_not_change_the_calls() -> None:
    model = tiny_model("llama")
    alone = generated(model, n_new=12).sequences[0]
    shift = [0]
    proposing(model, shift)
    with HFEngine(model) as engine:
        made = engine.routes.generate(Generation(prompts=(tuple(PROMPT),), n_new=12, draft_text=alone))
        shift[0] = 5

        engine.routes.generate_again(made)

    assert [row.n_fed for (row,) in made.calls] == [15, 5, 5, 3]


def test_a_draft_model_that_breaks_is_named_and_the_model_is_still_compared() -> None:
    model = tiny_model("llama")

    def refuse(module: nn.Module, args: object) -> None:
        if isinstance(module, LlamaForCausalLM) and module is not model:
            raise RuntimeError("no drafts today")

    handle = register_module_forward_pre_hook(refuse)
    try:
        audit = kvdrift.audit(model, prompts={"p": PROMPT}, span=2, scenarios=["generate_assisted"])
    finally:
        handle.remove()

    (row,) = audit.view["scenarios"]
    assert row["rows"] == ["p / drafts", "p / draft model that failed: RuntimeError: no drafts today"]
    assert "generate_assisted ran without drafts of a draft model: p / draft model that failed" in audit.to_markdown()
    assert row["verdict"] == "STRUCTURAL_DRIFT"


def test_a_vocabulary_that_is_not_known_leaves_the_draft_model_out_and_says_so() -> None:
    model = tiny_model("llama")
    with HFEngine(model) as engine:
        assert engine.routes.why_not("draft_model") is None
        object.__setattr__(model.config, "vocab_size", None)  # configurations of transformers themselves refuse it
        reason = engine.routes.why_not("draft_model")

    assert reason == "the size of the vocabulary is not known, so that no draft model can be made for it"


def test_the_generation_config_of_the_model_has_no_say_and_is_left_alone() -> None:
    model = tiny_model("llama")
    clean = generated(model, n_new=6)
    own = GenerationConfig(
        do_sample=True,
        temperature=3.0,
        repetition_penalty=9.0,
        eos_token_id=clean.sequences[0][-4],
        suppress_tokens=[clean.sequences[0][-2]],
        max_length=12,
        num_beams=4,
        cache_implementation="offloaded",
    )
    model.generation_config = own
    before, attributes, hooks = own.to_dict(), set(model.__dict__), len(model._forward_hooks)

    again = generated(model, n_new=6)
    rows = rows_of(model)

    assert again.sequences == clean.sequences
    assert {row["verdict"] for row in rows.values()} == {"STRUCTURAL_DRIFT"}
    assert model.generation_config is own
    assert own.to_dict() == before
    assert set(model.__dict__) == attributes
    assert len(model._forward_hooks) == hooks


def test_a_model_that_breaks_in_generate_is_left_alone_as_well() -> None:
    model = tiny_model("llama")
    own, attributes, calls = model.generation_config, set(model.__dict__), []

    def refuse(module: nn.Module, args: object) -> None:
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("no more")

    with HFEngine(model) as engine:
        handle = model.register_forward_pre_hook(refuse)
        with pytest.raises(CaptureError, match=r"on generate .*no more"):
            engine.routes.generate(Generation(prompts=(tuple(PROMPT),), n_new=9, drafts=(1,) * 9))
        handle.remove()

    assert model.generation_config is own
    assert set(model.__dict__) == attributes
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_another_run_that_cannot_be_made_again_is_an_error() -> None:
    with HFEngine(tiny_model("llama")) as engine:
        made = engine.routes.generate(Generation(prompts=(tuple(PROMPT),), n_new=3))
        other = Generated(made.wanted, made.sequences, made.calls[:2], made.choices)
        lost = Generated(made.wanted, made.sequences, made.calls, {})

        with pytest.raises(CaptureError, match="did not make the same calls again"):
            engine.routes.generate_again(other)
        with pytest.raises(CaptureError, match="did not reach the same tokens again"):
            engine.routes.generate_again(lost)


def test_the_tokens_are_the_same_at_every_precision_where_the_argmax_is_not() -> None:
    """A model whose logits are nothing but ties chooses by rounding; the second run follows the first."""
    model = twins_in_the_head(tiny_model("llama", dtype=torch.bfloat16))
    with HFEngine(model) as engine:
        made = engine.routes.generate(Generation(prompts=(tuple(PROMPT),), n_new=8))
        for rung in ("bfloat16", "float32", "float64"):
            with engine.at(rung):
                engine.routes.generate_again(made)


def twins_in_the_head(model: Any) -> Any:
    """Make every odd token the twin of the even one before it, up to one unit in the last place of its weights."""
    weights = model.lm_head.weight.data
    step = torch.nextafter(weights[::2], torch.full_like(weights[::2], torch.inf))
    weights[1::2] = torch.where(torch.arange(weights.shape[1]) % 2 == 0, step, weights[::2])
    return model


def test_near_ties_are_named_and_decide_nothing() -> None:
    rows = rows_of(twins_in_the_head(tiny_model("llama")))

    found = [item for row in rows.values() for item in row["choices"]]
    assert {row["verdict"] for row in rows.values()} == {"STRUCTURAL_DRIFT"}
    assert found, "no tie was turned; the weights of the twins lie too far apart"
    assert {item["kind"] for item in found} == {"near tie"}
    assert all(0.0 < item["gap"] <= item["noise"] < 1e-4 for item in found)


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.cause == "wrong_choice"])
def test_a_wrong_choice_says_what_was_taken_and_what_was_called_for(name: str) -> None:
    fault = FAULTS[name]
    _, model = carrier_of(fault)

    with fault.plant(model):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2, scenarios=[str(fault.needs)])

    (row,) = audit.view["scenarios"]
    wrong = [item for item in row["choices"] if item["kind"] == "wrong"]
    assert audit.verdict is Verdict.MISMATCH
    assert audit.kind is None
    assert audit.first_failure is not None
    assert str(audit.first_failure) == wrong[0]["address"]
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == "wrong_choice"
    assert max(item["gap"] / item["noise"] for item in wrong) > 10.0
    # No tensor drifts beyond noise.
    assert row["worst_excess"] < 1.0
    report = audit.to_markdown()
    assert "wrong: " in report
    assert "between logits and token" in report


@pytest.mark.parametrize("name", first_of_each(FAULTS, lambda name: FAULTS[name].needs))
def test_the_nearest_scenarios_do_not_find_a_fault_of_generate(name: str) -> None:
    fault = FAULTS[name]
    _, model = carrier_of(fault)

    with fault.plant(model):
        rows = rows_of(model, NEAREST[str(fault.needs)])

    assert "MISMATCH" not in {row["verdict"] for row in rows.values()}


def test_a_beam_that_was_never_computed_is_no_pass() -> None:
    """Beams whose tokens are mixed up when they are returned: none of the calls stood for what comes out."""
    model = tiny_model("llama")
    original = model._update_finished_beams

    def mixed(**kwargs: Any) -> Any:
        sequences, *others = original(**kwargs)
        sequences[:, 0, kwargs["decoder_prompt_len"]] = sequences[:, 0, kwargs["decoder_prompt_len"]] ^ 1
        return (sequences, *others)

    model.__dict__["_update_finished_beams"] = mixed

    row = rows_of(model)["generate_beam"]

    assert row["verdict"] == "INCONCLUSIVE"
    assert "none of its calls computed what comes behind the 12 tokens before it" in row["reasons"][0]


def test_a_run_with_choices_is_judged_again_to_the_same_report(tmp_path: Path) -> None:
    audit = kvdrift.audit(
        twins_in_the_head(tiny_model("llama")), prompts=PROMPTS, span=2, scenarios=LOOPS, out=tmp_path / "run"
    )

    again, _ = judge_directory(tmp_path / "run")

    assert any(row["choices"] for row in audit.view["scenarios"])
    assert again.to_json() == audit.to_json()


def test_a_layer_at_a_time_sees_the_same() -> None:
    rows = rows_of(tiny_model("llama"), ladder="layer")

    assert {row["verdict"] for row in rows.values()} == {"STRUCTURAL_DRIFT"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, *further(torch.float64)], ids=str)
def test_the_native_dtype_does_not_matter(dtype: torch.dtype) -> None:
    rows = rows_of(tiny_model("qwen3", dtype=dtype))

    assert {row["verdict"] for row in rows.values()} <= {"EXACT", "STRUCTURAL_DRIFT"}


def test_a_static_cache_is_that_of_generate_and_takes_no_drafts() -> None:
    rows = rows_of(tiny_model("llama"), cache="static")

    assert [row["verdict"] for row in rows.values()] == ["STRUCTURAL_DRIFT", "STRUCTURAL_DRIFT", None]
    assert rows["generate_assisted"]["reasons"] == ["generate verifies drafts on a dynamic cache only"]


@pytest.mark.parametrize("architecture", ["mamba2", "bamba", "qwen3_next"])
def test_recurrent_models_take_no_drafts(architecture: str) -> None:
    with HFEngine(tiny_model(architecture)) as engine:
        assert engine.routes.why_not("generate") is None
        reason = engine.routes.why_not("drafts")

    assert reason == "generate verifies no drafts where a recurrent state would have to go back"


# Its states are attributes of its modules, and in no cache.
RECURRENT_GEMMA = {
    **ARCHITECTURES["llama"][1],
    "head_dim": 16,
    "lru_width": 64,
    "attention_window_size": 8,
    "block_types": ["recurrent", "recurrent", "attention"],
}


def test_states_of_recurrent_gemma_do_not_follow_its_beams(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finding on a clean install: docs/findings/recurrent_gemma_beams.md."""
    monkeypatch.setitem(ARCHITECTURES, "recurrent_gemma", ("recurrent_gemma", RECURRENT_GEMMA))

    audit = kvdrift.audit(tiny_model("recurrent_gemma", attention="eager"), prompts=PROMPTS, span=2, scenarios=LOOPS)

    assert [row["verdict"] for row in audit.view["scenarios"]] == ["STRUCTURAL_DRIFT", "MISMATCH", None]
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.position) == (0, len(PROMPT) + 1)
    assert Path(__file__).parents[2].joinpath("docs/findings/recurrent_gemma_beams.py").is_file()


def test_a_model_without_generate_says_so() -> None:
    model = tiny_model("llama")
    model.__dict__["can_generate"] = lambda: False

    rows = rows_of(model, ["verify", *LOOPS])

    assert [rows[name]["reasons"] for name in LOOPS] == [["the model has no generate"]] * 3


def test_a_loop_of_ones_own_is_compared() -> None:
    def twice(stage: Stage) -> None:
        stage.need("generate")
        for n_new in (2, 3):
            stage.compare_generated(stage.generate([stage.prompt], n_new=n_new), name=f"{n_new} tokens")

    row = rows_of(tiny_model("llama"), [Scenario("twice", "nothing", twice)])["twice"]

    assert row["verdict"] == "STRUCTURAL_DRIFT"
    assert row["rows"] == ["p / 2 tokens", "p / 3 tokens"]
    assert row["choices"] == []


def beams_of(*calls: tuple[tuple[int, ...], ...], returned: tuple[tuple[int, ...], ...]) -> Generated:
    n_prompt = len(calls[0][0])
    wanted = Generation(prompts=(calls[0][0],), n_new=len(returned[0]) - n_prompt, n_beams=len(calls[0]))
    fed = [tuple(FedRow(row, n_prompt if index == 0 else 1, 1) for row in call) for index, call in enumerate(calls)]
    return Generated(wanted, returned, tuple(fed))


def test_a_returned_beam_is_followed_through_the_places_that_it_had() -> None:
    made = beams_of(
        ((1, 2), (1, 2)),
        ((1, 2, 3), (1, 2, 4)),
        ((1, 2, 4, 5), (1, 2, 4, 6)),  # the beam of row 1 takes both places
        returned=((1, 2, 4, 6, 7), (1, 2, 4, 5, 8)),
    )

    assert changes_places(made)
    require_computed(made)
    assert list(returned_positions(made)) == [
        (0, 0, 0, (1,)),
        (0, 0, 1, (1,)),
        (1, 1, 0, (2,)),
        (1, 1, 1, (2,)),
        (2, 0, 1, (3,)),
        (2, 1, 0, (3,)),
    ]


def test_beams_that_keep_their_places_are_told_apart() -> None:
    made = beams_of(((1, 2), (1, 2)), ((1, 2, 3), (1, 2, 4)), ((1, 2, 3, 5), (1, 2, 4, 6)), returned=((1, 2, 3, 5, 7),))

    assert not changes_places(made)


def test_rejected_drafts_are_not_compared() -> None:
    wanted = Generation(prompts=((1, 2),), n_new=4, drafts=(3, 9, 9))
    calls = (
        (FedRow((1, 2), 2, 1),),
        (FedRow((1, 2, 3, 9, 9), 3, 3),),  # 9 is rejected both times
        (FedRow((1, 2, 3, 4), 1, 1),),
        (FedRow((1, 2, 3, 4, 5), 1, 1),),
    )
    made = Generated(wanted, ((1, 2, 3, 4, 5, 6),), calls)

    assert is_plain_prefill(made, 0)
    assert list(returned_positions(made)) == [(0, 0, 0, (1,)), (1, 0, 0, (2,)), (2, 0, 0, (3,)), (3, 0, 0, (4,))]


def test_a_token_that_nothing_computed_is_an_error() -> None:
    made = beams_of(((1, 2), (1, 2)), ((1, 2, 3), (1, 2, 4)), returned=((1, 2, 5, 6),))

    with pytest.raises(ValueError, match="returned token 6 in row 0"):
        require_computed(made)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_padded_row_of_nan_is_not_called_a_wrong_choice(attention: str) -> None:
    """docs/findings/eager_float64_padding.md: in float64, eager attention makes NaN of a row with padding."""
    model = tiny_model("llama", dtype=torch.float64, attention=attention)
    audit = kvdrift.audit(model, prompts=PROMPTS, span=2, scenarios=["generate_greedy"])

    if attention == "sdpa":
        assert audit.verdict is Verdict.STRUCTURAL_DRIFT
        return
    assert audit.verdict is Verdict.INCONCLUSIVE
    (reason,) = audit.decision.reasons
    assert "the logits of row 1, which begins with 3 slots of padding, are NaN at forward call 0" in reason
