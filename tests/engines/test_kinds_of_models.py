"""Models in the forms in which people have them: a verdict as that of the plain model, or one line that says what to
pass instead."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

import kvdrift
from kvdrift.engines.hf.versions import LEAST_TRANSFORMERS, require_transformers
from kvdrift.errors import EngineUnavailable, UsageError
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from tests.engines.test_leaves_no_trace import assert_same, snapshot
from tests.support.every_kind import (
    PROMPTS,
    SMALL,
    TupleCache,
    TupleOutput,
    ValueHead,
    Wrapper,
    lively,
    with_lora,
)
from tests.support.matrix import further

# PEFT asks transformers for an attribute that is about to be renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

PASSES = (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)


def audited(model: Any, **options: Any) -> Audit:
    return kvdrift.audit(model, prompts=PROMPTS, **{"span": 1, **options})


def refusal(model: Any, **options: Any) -> str:
    with pytest.raises(EngineUnavailable) as caught:
        audited(model, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.matrix)])
def test_an_adapter_is_audited_in_its_base_model(dora: bool) -> None:
    """Scenarios with padding need positions, which PEFT takes by **kwargs; generate runs the base model."""
    model = with_lora(use_dora=dora)
    before = snapshot(model.get_base_model())

    audit = audited(model, scenarios="decode,batch_padded,generate_greedy")

    assert {row["verdict"] for row in audit.view["scenarios"]} <= {"EXACT", "STRUCTURAL_DRIFT"}
    assert audit.verdict in PASSES
    assert "PEFT adapter default (LORA) was in the layers of the LlamaForCausalLM that was run" in audit.to_markdown()
    assert_same(before, snapshot(model.get_base_model()))
    assert model.active_adapters == ["default"]


def test_a_fault_of_an_adapter_is_found() -> None:
    """The adapter of one projection is left out for a single token, as where a fast path forgets it."""
    model = with_lora()
    lora = model.get_base_model().model.layers[1].self_attn.v_proj

    def forgetful(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = type(lora).forward(lora, x) if x.shape[1] > 1 else lora.base_layer(x)
        return out

    lora.forward = forgetful
    audit = audited(model)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, "v_proj")


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "down_proj"]),
        LNTuningConfig(target_modules=["input_layernorm"]),
    ],
    ids=lambda config: str(config.peft_type.value),
)
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_an_adapter_that_is_no_product_of_two_matrices_is_audited(config: Any) -> None:
    """AdaLoRA keeps parameters where LoRA has modules; around a norm there are no features to count."""
    torch.manual_seed(1)
    model = get_peft_model(lively(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)

    assert audited(model.to(torch.bfloat16)).verdict in PASSES


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
        *further(
            VeraConfig(r=4, target_modules=["down_proj"]),
            OFTConfig(oft_block_size=16, r=0, target_modules=["down_proj"], use_cayley_neumann=False),
            LoHaConfig(r=4, target_modules=["down_proj"]),
        ),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_an_adapter_of_another_kind_is_part_of_its_product(config: Any) -> None:
    """The weight that such a layer shows is that of the base layer, so that the matrix is measured."""
    torch.manual_seed(1)
    model = get_peft_model(lively(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in ("ia3", "vera_lambda", "oft_", "hada_")):
                parameter.normal_(std=0.3)
    model = model.to(torch.bfloat16)
    layer = model.get_base_model().model.layers[1].mlp.down_proj

    def forgetful(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = type(layer).forward(layer, x) if x.shape[1] > 1 else layer.base_layer(x)
        return out

    assert audited(model, ladder="off").verdict in PASSES

    layer.forward = forgetful
    audit = audited(model, ladder="off")

    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, "mlp_out")
    assert audit.diagnosis is not None
    assert audit.diagnosis.text.startswith("decode's mlp_out is not what mlp.down_proj gives")


def test_adapters_of_several_kinds_are_audited_together() -> None:
    options: Any = {"target_modules": ["q_proj"], "init_lora_weights": False}
    model = get_peft_model(lively(), LoraConfig(r=4, **options), "one", mixed=True)
    model.add_adapter("other", LoHaConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False))
    model.set_adapter(["one", "other"])

    audit = audited(model.to(torch.bfloat16))

    assert audit.verdict in PASSES
    assert "PEFT adapter one, other (LORA, LOHA) was in the layers" in audit.to_markdown()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_module_of_torchscript_is_refused_by_name() -> None:
    model = lively()
    trace: Any = torch.jit.trace
    model.model.layers[1].mlp = trace(model.model.layers[1].mlp, torch.zeros(1, 3, 64, dtype=torch.bfloat16))

    said = refusal(model)

    assert said.startswith("model.layers.1.mlp is a module of TorchScript (torch.jit), which cannot be watched")


class Asking(nn.Module):
    """Asks for one adapter of several, as a server does by request, and for another in a decode step."""

    def __init__(self, model: Any, prefill: str, decode: str) -> None:
        super().__init__()
        self.model, self.names, self.config = model, (prefill, decode), model.config

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        name = self.names[input_ids.shape[1] == 1]
        return self.model(input_ids, past_key_values=past_key_values, adapter_names=[name] * len(input_ids), **kwargs)


def two_adapters(prefill: str, decode: str) -> Any:
    model = with_lora()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return Asking(model.to(torch.bfloat16).eval(), prefill, decode)


@pytest.mark.parametrize("name", ["other", *further("default", "__base__")])
def test_an_adapter_that_is_asked_for_by_name_is_audited(name: str) -> None:
    audit = audited(two_adapters(name, name))
    assert audit.verdict in PASSES
    (products,) = [e for e in audit.evidence if e.instrument == "products" and e.mode == "kv_aligned"]
    assert products.bound is not None
    assert products.supports == "H0"


@pytest.mark.parametrize("decode", ["__base__", *further("default")])
def test_a_step_that_asks_for_another_adapter_is_the_wrong_one(decode: str) -> None:
    """The adapter that is active is not the one that prefill asks for."""
    audit = audited(two_adapters("other", decode), ladder="off")

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (0, "q_proj")
    assert audit.diagnosis is not None
    assert audit.diagnosis.text.startswith("decode's q_proj is not what self_attn.q_proj gives")


def test_what_prefill_alone_does_behind_a_product_is_what_decode_leaves_out() -> None:
    model = lively()
    projection = model.model.layers[1].mlp.down_proj
    added = torch.randn(64, 64, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    projection.register_forward_hook(lambda module, args, out: out + args[0] @ added if out.shape[1] > 1 else out)

    audit = audited(model, ladder="off")

    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, "mlp_out")
    assert audit.diagnosis is not None
    assert audit.diagnosis.text.startswith("prefill's mlp_out is not what mlp.down_proj gives")
    assert audit.diagnosis.text.endswith("or something behind it that decode leaves out, such as a hook")


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_an_adapter_with_tokens_of_its_own_is_refused_by_name(config: type) -> None:
    model = get_peft_model(lively(), config(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    kind = "PREFIX_TUNING" if config is PrefixTuningConfig else "PROMPT_TUNING"

    said = refusal(model)

    assert f"an adapter of kind {kind}, which puts 3 virtual tokens of its own" in said
    assert said.endswith("pass model.get_base_model() to audit the model without the adapter")


def test_an_adapter_that_runs_more_than_the_base_model_is_refused_by_name() -> None:
    """Its layers stay in the base model, which is then no model without the adapter."""
    said = refusal(with_lora(alora_invocation_tokens=[3, 4]))

    assert "has an activated LORA adapter, which is switched on by tokens of the prompt" in said
    assert said.endswith("load the base model without the adapter, and pass that")


# ------------------------------------------------------------------------------------------------- wrappers and heads


class NewName(LlamaForCausalLM):  # type: ignore[misc]  # transformers has no types
    """Takes its cache under the name that models have since transformers 5.24."""

    def forward(self, input_ids: Any, cache: Any = None, use_cache: bool | None = None, logits_to_keep: Any = 0) -> Any:
        return super().forward(input_ids, past_key_values=cache, use_cache=use_cache, logits_to_keep=logits_to_keep)


def test_a_cache_is_given_under_the_name_that_the_model_takes() -> None:
    assert audited(lively(NewName)).verdict in PASSES


class NamedByItsAuthor(nn.Module):
    """Takes two arguments, under names of its own, and returns the logits alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.language_model, self.config = model, model.config

    def forward(self, tokens: Any, cache: Any = None) -> Any:
        return self.language_model(tokens, past_key_values=cache, use_cache=True).logits


def test_a_wrapper_may_take_its_tokens_and_its_cache_alone() -> None:
    assert audited(NamedByItsAuthor(lively())).verdict in PASSES


@pytest.mark.parametrize("wrap", [nn.DataParallel, Wrapper])
def test_a_wrapper_is_refused_with_the_model_to_pass(wrap: Any) -> None:
    said = refusal(wrap(lively()))

    assert f"{wrap.__name__} has no config of its own and wraps a LlamaForCausalLM" in said
    assert said.endswith("Pass the model inside of it, model.module")


def test_a_value_head_with_a_config_is_audited_as_it_runs() -> None:
    """Its tuple has the logits first. Its generate runs the model inside, which is not the one that is watched."""
    audit = audited(ValueHead(lively()), scenarios="decode,batch_padded,generate_greedy")

    assert audit.verdict in PASSES
    _, padded, generate = audit.view["scenarios"]
    assert padded["verdict"] == "EXACT"
    assert generate["verdict"] is None
    assert generate["reasons"] == [
        "the generate of ValueHead runs another model; pass that one, model.pretrained_model"
    ]


@pytest.mark.parametrize(
    ("kind", "shape"), [(LlamaForSequenceClassification, "[1, 3]"), (LlamaForTokenClassification, "[1, 5, 3]")]
)
def test_a_classification_head_is_named(kind: type, shape: str) -> None:
    said = refusal(lively(kind, LlamaConfig(**SMALL, num_labels=3, pad_token_id=0)))

    assert said == (
        f"{kind.__name__} returns logits of shape {shape} for 5 tokens: a classification head, without a next token; "
        "load the checkpoint with a language-modelling head (AutoModelForCausalLM)."
    )


def test_a_model_without_a_head_is_named() -> None:
    assert refusal(lively(LlamaModel)).startswith("LlamaModel returns no logits")


def test_something_that_is_no_module_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="the model is of type str; pass a loaded model"):
        kvdrift.audit("meta-llama/Llama-3.2-1B")


# ------------------------------------------------------------------------------------------------- what models return


def test_a_cache_of_tuples_is_refused_with_what_to_change() -> None:
    said = refusal(lively(TupleCache))

    assert said.startswith("TupleCache keeps its cache as tuples of (key, value)")
    assert "past_key_values.update(key, value, layer)" in said


def test_tuples_instead_of_objects_are_read() -> None:
    by_config = lively()
    by_config.config.return_dict = False

    assert audited(by_config, ladder="off").verdict in PASSES
    assert by_config.config.return_dict is False
    assert audited(lively(TupleOutput), ladder="off").verdict in PASSES


# ----------------------------------------------------------------------------------------------------- masks of a rank


@pytest.mark.parametrize("is_bool", [True, *further(False)])
@pytest.mark.parametrize("rank", [2, *further(3)])
def test_attention_may_be_given_a_mask_of_any_rank(rank: int, is_bool: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores are derived with the mask: where a step sees one key too few, its probabilities show it."""
    model = masked(rank, is_bool, monkeypatch)

    assert audited(model).verdict in PASSES

    audit = audited(masked(rank, is_bool, monkeypatch, hidden_from=1), ladder="off")
    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, "attn_scores")


def masked(rank: int, is_bool: bool, monkeypatch: pytest.MonkeyPatch, hidden_from: int | None = None) -> Any:
    """Return a model whose attention makes its own mask; `hidden_from` is a layer whose decode sees no first key."""

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_kwargs: Any) -> Any:
        n = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(n, 1), value.repeat_interleave(n, 1)
        n_query, n_key = query.shape[2], key.shape[2]
        seen = torch.ones(n_query, n_key, dtype=torch.bool).tril(n_key - n_query)
        if module.layer_idx == hidden_from and n_query == 1:
            seen[:, 0] = False
        if not is_bool:
            seen = torch.zeros(n_query, n_key, dtype=query.dtype).masked_fill(~seen, -torch.inf)
        seen = seen.expand(query.shape[1], n_query, n_key) if rank == 3 else seen
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "masked", attend)
    model = lively()
    model.set_attn_implementation("masked")
    return model


# ------------------------------------------------------------------------------------------------------------ versions


@pytest.mark.parametrize("version", ["4.57.1", "4.57.0.dev0", "5.0.0", "5.14.9", "unknown"])
def test_an_old_transformers_is_refused_by_version(version: str) -> None:
    with pytest.raises(EngineUnavailable, match=r"kvdrift needs 5\.15 or later") as caught:
        require_transformers(version)
    assert f"transformers {version} is installed" in str(caught.value)


@pytest.mark.parametrize("version", ["5.15.0", "5.23.0", "6.0.0rc1", "10.2"])
def test_later_ones_are_taken(version: str) -> None:
    require_transformers(version)


def test_an_audit_reads_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvdrift.engines.hf.engine.transformers.__version__", "4.57.1")

    assert refusal(lively()).startswith("transformers 4.57.1 is installed, and kvdrift needs 5.15 or later")


def test_the_requirement_of_the_package_is_the_one_that_is_checked() -> None:
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

    assert f"transformers>={'.'.join(map(str, LEAST_TRANSFORMERS))}" in project["optional-dependencies"]["hf"]
