"""Models that do a thing in a way of their own: each passes, is refused with a reason, or is a finding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, eager_attention_forward

import kvdrift
from kvdrift.engines.hf.caches import CacheAdapter
from kvdrift.errors import CaptureError, EngineUnavailable
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import Site
from kvdrift.zoo.build import build
from tests.support.matrix import further
from tests.support.tiny import tiny_model

PROMPTS = {"long": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12], "one": [7]}
SMALL = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
MEDIUM = {**SMALL, "intermediate_size": 96, "max_position_embeddings": 128}
GROUPED = {**MEDIUM, "num_key_value_heads": 2}
INKLING = {
    "head_dim": 16,
    "swa_head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "sliding_window_size": 8,
}
CODEGEN = {
    "vocab_size": 128,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "rotary_dim": 8,
    "n_inner": 96,
}

# Behind the keys of a window come such as sum up four tokens each; which of them are seen is chosen by a score.
DEEPSEEK_V4 = {
    **MEDIUM,
    "moe_intermediate_size": 32,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "q_lora_rank": 32,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
    "mlp_layer_types": ["moe"] * 3,
    "sliding_window": 8,
    "o_groups": 2,
    "o_lora_rank": 16,
    "index_head_dim": 16,
    "index_topk": 4,
    "qk_rope_head_dim": 8,
    "partial_rotary_factor": 0.25,
}
LONGER = {"long": [(7 * i) % 101 + 3 for i in range(34)], "short": [4, 3, 2, 1, 9, 8, 7, 6, 5]}


def model_of(model_type: str, options: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.matrix)], ids=str)
@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        pytest.param("codegen", CODEGEN, id="a mask that is divided by the scale of the scores"),
        pytest.param("granite_swa", {**GROUPED, "sliding_window": 8}, id="sinks that come in behind the softmax"),
        pytest.param("nanochat", GROUPED, id="a final norm that also runs before the layers"),
        pytest.param("inkling_text", {**GROUPED, **INKLING}, id="a position bias that attention is handed by name"),
        pytest.param("bert", {**MEDIUM, "is_decoder": True}, id="a norm inside the head"),
    ],
)
def test_a_clean_model_passes(model_type: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    audit = kvdrift.audit(model_of(model_type, options, dtype), prompts=PROMPTS)

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), (audit.first_failure, audit.view["reasons"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, *further(torch.float32)], ids=str)
def test_keys_that_belong_to_no_token_are_not_replayed(dtype: torch.dtype) -> None:
    model = model_of("deepseek_v4", {**DEEPSEEK_V4, "index_n_heads": 16}, dtype)
    audit = kvdrift.audit(model, prompts=LONGER, span=2)

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), (audit.first_failure, audit.view["reasons"])
    aligned = audit.view["modes"]["kv_aligned"]
    assert aligned["status"] == "NOT RUN"
    assert "DeepseekV4HCACache" in aligned["reasons"][0]
    assert "has no way back of its own" in aligned["reasons"][0]


class _OverLayers(torch.nn.Module):
    """Attention of each token over states of two layers, as residuals of Inkling 2 have it in transformers 5.24."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.num_key_value_groups = config, 1
        self.query = torch.nn.Parameter(torch.randn(config.hidden_size))
        self.before = torch.nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        states = torch.stack([hidden_states, self.before(hidden_states)], dim=-2)
        query = self.query.expand(*states.shape[:-2], 1, -1)
        mixed, _ = attend(self, query, states, states, None, scaling=hidden_states.shape[-1] ** -0.5)
        total: torch.Tensor = hidden_states + mixed.transpose(1, 2)[..., 0, :]
        return total


class _MixedLayer(LlamaDecoderLayer):  # type: ignore[misc]  # transformers has no types
    def forward(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        return super().forward(self.mixer(hidden_states), *args, **options)


@pytest.mark.parametrize("is_stale", [False, True], ids=["clean", "planted"])
def test_attention_is_what_updates_the_cache_and_not_what_attends_first(
    is_stale: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama", {**GROUPED, "attn_implementation": "eager"}, torch.float32)
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.mixer, layer.__class__ = _OverLayers(model.config), _MixedLayer
    if is_stale:
        right = DynamicLayer.update

        def stale(self: Any, keys: torch.Tensor, *args: Any, **options: Any) -> Any:
            all_keys, all_values = right(self, keys, *args, **options)
            if keys.shape[-2] == 1 and all_keys.shape[-2] > 9:
                all_keys[:, :, 3] = all_keys[:, :, 4]
            return all_keys, all_values

        monkeypatch.setattr(DynamicLayer, "update", stale)
    audit = kvdrift.audit(model, prompts=PROMPTS)

    if is_stale:
        assert audit.verdict is Verdict.MISMATCH
        assert str(audit.first_failure).endswith("layer 0 / k_cache")
    else:
        assert audit.verdict is Verdict.STRUCTURAL_DRIFT, audit.view["reasons"]


def test_a_cache_layer_of_ones_own_is_taken_back_only_by_its_own_way() -> None:
    """A layer that stores rows in another way than the one whose way back it inherits would go back to anything."""

    class Counting(DynamicLayer):  # type: ignore[misc]  # transformers has no types
        def update(self, *args: Any, **kwargs: Any) -> Any:
            return super().update(*args, **kwargs)

    class Cropping(Counting):
        def crop(self, *args: Any, **kwargs: Any) -> None:
            super().crop(*args, **kwargs)

    def why_not(layer: Any) -> str | None:
        cache = DynamicCache()
        cache.layers = [layer]
        return CacheAdapter(cache).why_no_rewind

    assert why_not(DynamicLayer()) is None
    assert why_not(Cropping()) is None
    assert why_not(Counting()) == "layer 0 (Counting) stores rows in its own way, but has no way back of its own"


def test_a_model_that_transformers_makes_no_cache_for_is_refused_in_one_line() -> None:
    with pytest.raises(EngineUnavailable, match="transformers makes no dynamic cache for BltForCausalLM: Attribute"):
        kvdrift.audit(build("blt"), prompts=PROMPTS)


def test_rows_that_are_rounded_when_they_are_written_go_back_by_the_way_of_the_plain_layer() -> None:
    """Keys and values are all that such a layer holds, one slot for each token."""

    class Rounding(DynamicLayer):  # type: ignore[misc]  # transformers has no types
        def update(self, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
            rounded = (rows.float().to(torch.float8_e4m3fn).to(rows.dtype) for rows in (keys, values))
            return super().update(*rounded, *args, **kwargs)

    class Scaled(Rounding):
        def update(self, *args: Any, **kwargs: Any) -> Any:
            self.scales = [*getattr(self, "scales", ()), torch.ones(1)]
            return super().update(*args, **kwargs)

    class Transposed(DynamicLayer):  # type: ignore[misc]
        def update(self, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
            found = super().update(keys, values, *args, **kwargs)
            rows: Any = vars(self)["keys"]
            self.keys = rows.transpose(-1, -2)
            return found

    def cache_of(kind: Any) -> Any:
        cache = DynamicCache()
        cache.layer_class_to_replicate = kind
        return cache

    audit = kvdrift.audit(tiny_model("llama"), prompts=PROMPTS, span=2, cache=lambda: cache_of(Rounding))

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), (audit.first_failure, audit.view["reasons"])
    assert audit.view["modes"]["kv_aligned"]["status"] != "NOT RUN"
    for kind in (Scaled, Transposed):
        layer = kind()
        layer.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
        cache = DynamicCache()
        cache.layers = [layer]
        assert "has no way back of its own" in (CacheAdapter(cache).why_no_rewind or "")


def test_a_model_that_attends_in_both_directions_is_named_as_such() -> None:
    audit = kvdrift.audit(model_of("bert", MEDIUM), prompts=PROMPTS)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == "not_causal"
    assert "[12, 13, 14]" in audit.diagnosis.text
    assert "PREFILL_UNSTABLE" in {caveat.code for caveat in audit.caveats}
    assert "is_decoder=True" in audit.view["recommendations"][0]


def test_a_prefill_that_depends_on_what_follows_is_no_reference() -> None:
    """Where the probed positions themselves agree, nothing but the self-noise can tell."""
    model = model_of("bert", {**MEDIUM, "is_decoder": True})
    norm = model.bert.embeddings.LayerNorm

    def by_length(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        moved = output.clone()
        if output.shape[1] == len(PROMPTS["long"]) + 1:  # the prompt with one token of its continuation
            moved[:, -2] *= 1.001
        return moved

    handle = norm.register_forward_hook(by_length)
    audit = kvdrift.audit(model, prompts={"p": PROMPTS["long"]}, span=1, mode="kv_aligned")
    handle.remove()

    assert audit.verdict is Verdict.INCONCLUSIVE
    assert any("not a function of the tokens so far" in reason for reason in audit.view["reasons"])


def test_layers_that_run_more_than_once_are_refused() -> None:
    with pytest.raises(EngineUnavailable, match=r"runs its layer .* 6 times in one forward call"):
        kvdrift.audit(model_of("hrm_text", {**MEDIUM, "head_dim": 16}), prompts=PROMPTS)


def test_a_model_that_breaks_under_our_watch_is_not_our_bug() -> None:
    """A torch function that fails there fails in a line of kvdrift, whoever called it."""
    options = {"vocab_size": 128, "hidden_size": 64, "num_attention_heads": 4, "dim_head": 16, "dim_ff": 96}
    with pytest.raises(CaptureError, match=r"must match the size of tensor"):
        kvdrift.audit(model_of("cpmant", {**options, "num_hidden_layers": 2}), prompts=PROMPTS)


# Where transformers itself is wrong; each goes on failing until it is mended there.
NEMOTRON = {
    **{
        option: value for option, value in GROUPED.items() if option != "num_hidden_layers"
    },  # as many as there are kinds
    "head_dim": 16,
    "layers_block_type": ["linear_attention", "full_attention", "mlp"],
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 1,
    "expand": 2,
}
FINDINGS: dict[str, tuple[str, dict[str, Any], Site]] = {
    "nemotron_h_step_limit": ("nemotron_h", NEMOTRON, Site.SSM_STATE),
    "moshi_window": ("moshi", {**SMALL, "ffn_dim": 96, "num_key_value_heads": 2, "sliding_window": 8}, Site.K_CACHE),
}  # fmt: skip


@pytest.mark.parametrize("name", FINDINGS)
def test_a_known_finding_is_found_where_it_is(name: str) -> None:
    model_type, options, site = FINDINGS[name]

    audit = kvdrift.audit(model_of(model_type, options, torch.float32), prompts=PROMPTS)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (0, site)
    page = Path(__file__).parents[2] / "docs" / "findings" / f"{name}.md"
    assert page.is_file()
    assert page.with_suffix(".py").is_file()


def test_each_attention_module_of_a_layer_with_several_is_watched() -> None:
    """LongCat's layers have two attention modules each, in a list as long as the one of the layers."""
    model = build("longcat_flash")
    clean = kvdrift.audit(model, prompts=PROMPTS)

    def scale(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return (1.5 * output[0], *output[1:]) if kwargs["hidden_states"].shape[1] == 1 else output

    model.model.layers[1].self_attn[0].register_forward_hook(scale, with_kwargs=True)
    off = kvdrift.audit(model, prompts=PROMPTS)

    assert clean.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
    assert off.verdict is Verdict.MISMATCH
    assert off.first_failure is not None
    assert off.first_failure.layer == 2
