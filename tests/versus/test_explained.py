"""Two functions, neither of which breaks a law of its own: nobody is blamed, and what differs is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import kvdrift
from kvdrift.versus.compare import EngineComparison
from kvdrift.versus.laws import kept_elsewhere
from kvdrift.versus.rotation import rotation
from kvdrift.versus.settings import about, differing
from kvdrift.versus.values import PassValues
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.sites import Site
from tests.support.every_kind import with_lora
from tests.support.tiny import tiny_model

PROMPTS = {"p": [5, 9, 17, 3, 22, 41, 7, 11]}


class AsItIs(torch.nn.Module):
    """A step that is left out."""

    def forward(self, value: Any) -> Any:
        return value


def built(name: str, **options: Any) -> Any:
    """Return a tiny model of a class of transformers, of the same weights each time, norms that are not one."""
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**{**sizes, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    chance = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=chance)
            weight.copy_(1.0 + 0.2 * drawn if "norm" in key else drawn / weight.shape[-1] ** 0.5)
    return model


def compared(a: Any, b: Any) -> EngineComparison:
    found = kvdrift.compare(a, b, prompts=PROMPTS, span=2)
    assert isinstance(found, EngineComparison)
    return found


def no_norm_behind_attention(model: Any) -> None:
    for layer in model.model.layers:
        layer.post_attention_layernorm = AsItIs()


def no_norm_of_queries(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_norm = AsItIs()


def heads_of_keys_swapped(model: Any) -> None:
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.self_attn.k_proj.weight
            weight.copy_(weight.view(2, 8, -1).flip(0).reshape(16, -1).clone())


def no_sink(model: Any) -> None:
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks[2] = -1e4


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SINKS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CODE: dict[str, tuple[str, dict[str, Any], Callable[[Any], None], str, str]] = {
    "no_norm_behind_attention": (
        "Gemma2", {}, no_norm_behind_attention,
        "layer 0 / resid_attn", "A takes a norm of attn_out before it is added, and B does not",
    ),
    "no_norm_of_queries": (
        "Qwen3", {}, no_norm_of_queries,
        "layer 0 / q_norm", "B hands q_proj on as it is: the step that makes q_norm is left out there",
    ),
    "heads_of_keys_swapped": (
        "Llama", {}, heads_of_keys_swapped,
        "layer 0 / k_proj", "heads stand in another order: head 0 of B is head 1 of A",
    ),
    "no_sink": ("GptOss", SINKS, no_sink, "layer 0 / attn_ctx", "attention has other sinks: of head 2"),
}  # fmt: skip
SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str, str]] = {
    "residual_multiplier": (
        "Granite", {"residual_multiplier": 0.5}, {"residual_multiplier": 1.0}, "layer 0 / resid_attn",
        "resid_attn is layer_in plus 0.5 times attn_out in A, and layer_in plus attn_out in B (settings: "
        "residual_multiplier 0.5 in A, 1.0 in B)",
    ),
    "embedding_multiplier": (
        "Granite", {"embedding_multiplier": 1.0}, {"embedding_multiplier": 12.0}, "layer 0 / layer_in",
        "B is A times 12 (settings: embedding_multiplier 1.0 in A, 12.0 in B)",
    ),
    "window": (
        "Mistral", {"sliding_window": None}, {"sliding_window": 4}, "layer 0 / k_cache",
        "attention has the window None in A and 4 in B (settings: sliding_window None in A, 4 in B)",
    ),
    "part_of_a_head": (
        "Phi3", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "layer 0 / q_rope", "RoPE turns 8 of the 8 elements of a head in A, and 4 in B",
    ),
    "experts": (
        "Qwen3Moe", {**MOE, "norm_topk_prob": True}, {**MOE, "norm_topk_prob": False}, "layer 0 / mlp_out",
        "the settings differ: norm_topk_prob True in A, False in B",
    ),
}  # fmt: skip


def expect(found: EngineComparison, place: str, words: str) -> None:
    assert found.verdict == "MISMATCH"
    assert found.guilty is None, found.decision.conclusion
    assert found.decision.first is not None
    assert str(found.decision.first.place) == place
    assert found.decision.cause is not None
    assert words in found.decision.cause[1]


@pytest.mark.parametrize("case", CODE)
def test_a_step_of_one_engine_alone_is_named_and_nobody_is_blamed(case: str) -> None:
    name, options, edit, place, words = CODE[case]
    one, two = built(name, **options), built(name, **options)
    edit(two)

    expect(compared(one, two), place, words)


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_that_differs_is_named_and_nobody_is_blamed(case: str) -> None:
    name, of_a, of_b, place, words = SETTINGS[case]

    expect(compared(built(name, **of_a), built(name, **of_b)), place, words)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_that_was_merged_differs_by_rounded_weights() -> None:
    found = compared(with_lora(), with_lora().merge_and_unload())

    expect(found, "layer 0 / q_proj", "as much as weights make that one side alone has rounded to bfloat16")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_of_another_size_is_more_than_rounded_weights() -> None:
    found = compared(with_lora(lora_alpha=8), with_lora(lora_alpha=16).merge_and_unload())

    expect(found, "layer 0 / q_proj", "other weights")


@pytest.mark.filterwarnings("ignore")  # of torchao, on kernels that it lacks here
def test_packed_weights_of_one_side_are_compared_by_what_they_make() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    packed = built("Llama")
    quantize_(packed, Int8WeightOnlyConfig())
    found = compared(built("Llama"), packed)

    expect(found, "layer 0 / q_proj", "other weights")
    assert any(caveat.code == "WEIGHTS" and "B does not show" in caveat.text for caveat in found.decision.caveats)


def test_positions_added_in_one_engine_blame_nobody() -> None:
    one, two = (tiny_model("gpt2", dtype=torch.float32) for _ in "ab")
    with torch.no_grad():
        two.transformer.wpe.weight.zero_()

    expect(compared(one, two), "layer 0 / layer_in", "positions that are added")


def test_a_sum_that_one_layer_alone_breaks_convicts() -> None:
    """The clean layers of that engine keep the law, so that it is one of its own."""
    one, two = built("Llama"), built("Llama")
    layer = two.model.layers[1]
    plain = layer.forward
    layer.forward = lambda *args, **options: plain(*args, **options) * 1.001
    found = compared(one, two)

    assert found.guilty == "B"
    assert found.decision.first is not None
    assert str(found.decision.first.place) == "layer 1 / layer_out"


def test_an_engine_of_one_layer_has_no_other_that_could_keep_the_sum() -> None:
    place = Place(0, Site.RESID_ATTN)
    rows = {place: {3: np.ones(2)}, Place(0, Site.LAYER_IN): {3: np.ones(2)}, Place(0, Site.ATTN_OUT): {3: np.ones(2)}}
    values = PassValues(rows=rows)

    assert not kept_elsewhere(values, place, 1, lambda item: item.size > 0.0)
    assert kept_elsewhere(values, Place(0, Site.ATTN_CTX), 1, lambda item: item.size > 0.0)


def test_settings_that_one_side_lacks_count_where_their_group_is_known() -> None:
    one = {"rope.type": "default", "layers": ["a", "b"], "of_a_alone": 1, "factor": 2}
    two = {"rope.type": "yarn", "rope.factor": 2.0, "layers": ["a", "c"], "factor": 3}
    found = differing(one, two)

    assert found == {
        "factor": (2, 3), "layers[1]": ("b", "c"), "rope.factor": (None, 2.0), "rope.type": ("default", "yarn"),
    }  # fmt: skip
    assert about(found, Site.MLP_OUT) == "", "a factor is not an activation"
    assert "rope.type 'default' in A, 'yarn' in B" in about(found, Site.Q_ROPE)


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_rotations_of_other_pairs_are_told_apart(pairs: str) -> None:
    """One side turns halves; what the other does is told where it differs, and its base where it does not."""
    rng = np.random.default_rng(0)
    place, source = Place(0, Site.Q_ROPE), Place(0, Site.Q_PROJ)
    positions = [4, 5, 6, 7]
    before = {at: rng.standard_normal(16) for at in positions}

    def turned(how: str, base: float) -> PassValues:
        after = {}
        for at, row in before.items():
            x = row.reshape(2, 8)
            angles = at * base ** (-np.arange(4) / 4)
            first, second = (slice(0, 4), slice(4, 8)) if how == "halves" else (slice(0, 8, 2), slice(1, 8, 2))
            y = x.copy()
            y[:, first] = x[:, first] * np.cos(angles) - x[:, second] * np.sin(angles)
            y[:, second] = x[:, second] * np.cos(angles) + x[:, first] * np.sin(angles)
            after[at] = y.reshape(-1)
        return PassValues(rows={source: dict(before), place: after}, heads={0: (2, 8)})

    one, two = turned("halves", 100.0), turned(pairs, 100.0 if pairs == "neighbours" else 400.0)
    found = rotation(one, two, place, positions)

    assert found is not None
    assert found[0] == ("rope_pairs" if pairs == "neighbours" else "rope_base")
    if pairs == "halves":
        assert found[1] == "the base of RoPE is 100 in A and 400 in B"
