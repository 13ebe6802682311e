"""A model of transformers, written as the files that mlx-lm reads.

mlx-lm reads checkpoints as they were published. transformers 5 writes many of them otherwise: options have other names,
one part of a model is the whole of it, weights lie under other names or turned. What is done about it here is told by
names alone; no value of a weight is computed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

Config = dict[str, Any]

# Types that are built as their text decoder alone, the part that mlx-lm runs: a tower wants another package, or
# options are those of the decoder.
DECODERS: Mapping[str, str] = {"gemma3": "gemma3_text", "gemma3n": "gemma3n_text", "llama4": "llama4_text"}
# What mlx-lm asks for and transformers 5 does not write any more.
_UNWRITTEN: Mapping[str, Mapping[str, Any]] = {
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "bailing_hybrid": {  # mlx-lm has two of that type, told apart by the class
        "architectures": ["BailingMoeV3ForCausalLM"],
        "head_dim": 16,
        "moe_shared_expert_intermediate_size": 32,
        "q_lora_rank": None,
    },
    "gemma3": {"model_type": "gemma3"},
    "gemma3n": {"model_type": "gemma3n"},
    "gemma4": {"text_config": {"global_head_dim": None}},
    "gemma4_text": {"global_head_dim": None},
    "gemma4_unified": {"text_config": {"global_head_dim": None, "hidden_size_per_layer_input": 0}},
    "glm_moe_dsa": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    "gpt2": {"n_ctx": 128},
    "gpt_neox": {"rotary_emb_base": 10000.0, "rotary_pct": 0.25},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "kimi_linear": {"rope_theta": 10000.0, "first_k_dense_replace": 1},  # the first is read, and nothing is turned
    "llama4": {"model_type": "llama4"},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "mamba2": {"intermediate_size": 128},
    "mellum": {"num_experts": 4},
    "mimo_v2_flash": {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "n_shared_experts": None,
    },
    "minimax_m2": {"shared_intermediate_size": 0},  # asked for, and not read
    "qwen3_5": {"model_type": "qwen3_5", "full_attention_interval": 2},  # saved as the text decoder that it is
    "qwen3_5_moe": {"model_type": "qwen3_5_moe", "full_attention_interval": 2},
    "qwen3_moe": {"num_experts": 4},
    "qwen3_next": {"full_attention_interval": 2},
}
# The option of transformers that an option of mlx-lm is, where mlx-lm has the second and the file has the first alone.
_CALLED: Mapping[str, str] = {
    "block_dim": "hidden_size",
    "layernorm_epsilon": "rms_norm_eps",
    "swa_head_dim": "head_dim",
    "swa_num_attention_heads": "num_attention_heads",
    "swa_v_head_dim": "v_head_dim",
}
# Options that mlx-lm wants by layer or as a group.
_DERIVED: Mapping[str, Callable[[Config], Any]] = {
    "hybrid_layer_pattern": lambda c: [int(kind == "sliding_attention") for kind in c["layer_types"]],
    "is_moe_layer": lambda c: [kind == "sparse" for kind in c["mlp_layer_types"]],
    "linear_attn_config": lambda c: {
        "kda_layers": [n for n, kind in enumerate(c["layer_types"], 1) if kind == "linear_attention"],
        "full_attn_layers": [n for n, kind in enumerate(c["layer_types"], 1) if kind != "linear_attention"],
        "num_heads": c["linear_num_heads"],
        "head_dim": c["linear_head_dim"],
        "short_conv_kernel_size": c["linear_conv_kernel_dim"],
    },
    "moe_layer_freq": lambda c: [int(kind == "sparse") for kind in c["mlp_layer_types"]],
    "rotary_dim": lambda c: int(c["head_dim"] * c["rope_parameters"].get("partial_rotary_factor", 1.0)),
    "sliding_window_size": lambda c: c["sliding_window"] - 1,  # transformers counts the token itself
    "swa_num_key_value_heads": lambda c: 2 * c["num_key_value_heads"],
    "swa_rope_theta": lambda c: c["rope_parameters"]["sliding_attention"]["rope_theta"],
}


# Weights as mlx-lm names them, where the files of transformers have other names: a pattern and what stands for it.
_NAMED: Mapping[str, Sequence[tuple[str, str]]] = {
    "bailing_hybrid": [(r"(\.layers\.[01]\.attention)\.dense\.", r"\1.o_proj.")],  # of the linear layers
    "gemma3": [(r"^", "language_model.")],
    "gemma3n": [(r"^model\.", "model.language_model.")],
    "gpt2": [(r"^transformer\.", "")],
    "gpt_oss": [(r"(\.experts\.(?:gate_up|down)_proj)$", r"\1.weight")],
    "kimi_linear": [(r"\.block_sparse_moe\.(gate|up|down)_proj", r".mlp.\1_proj")],  # of a layer without experts
    "llama4": [(r"^", "language_model.")],
    "llama4_text": [(r"^lm_head\.", "output.")],
    "nanochat": [
        (r"^model\.embed_tokens\.", "transformer.wte."),
        (r"^model\.layers\.", "transformer.h."),
        (r"\.self_attn\.o_proj\.", ".attn.c_proj."),
        (r"\.self_attn\.([qkv])_proj\.", r".attn.c_\1."),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."),
        (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    ],
    "olmo_hybrid": [
        (r"\.attention_layer_norm\.", ".input_layernorm."),
        (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
    ],
}
# Weights whose last two axes are the other way round in transformers.
_TURNED = {"gpt_oss": r"\.experts\.(gate_up|down)_proj$"}
# Weights that transformers has and never reads: rows of experts that give back what they are given.
_UNREAD = {"longcat_flash": r"\.mlp\.experts\.[4-7]\."}
# Weights that published files have and mlx-lm wants, though no layer reads them: of which shape, and all of zeros.
_NEVER_READ = {"gemma3n": [(r"(\.layers)\.1(\.self_attn\.(?:k_norm|k_proj|v_proj)\.)", r"\1.2\2")]}
# mlx-lm names the weights of these as transformers does in memory, and not as it writes them.
_AS_IN_MEMORY = frozenset({"qwen3_5_moe"})


def write_for_mlx(model: Any, kind: str, folder: Path) -> None:
    """Write a model into a folder as `save_pretrained` does, and then as mlx-lm reads it.

    Raises:
        ValueError: mlx-lm has no model of this type.
    """
    from mlx_lm.utils import _get_classes

    model.save_pretrained(folder, save_original_format=kind not in _AS_IN_MEMORY)
    path = folder / "config.json"
    config = _with(as_before_transformers_5(json.loads(path.read_text())), _UNWRITTEN.get(kind, {}))
    arguments = _get_classes(config)[1]
    required = [field.name for field in fields(arguments) if field.default is field.default_factory is MISSING]
    if "text_config" in required and "text_config" not in config and "from_dict" not in vars(arguments):
        config = {"model_type": config["model_type"], "text_config": config}
    renamed = [field.name for field in fields(arguments) if field.name in model.config.attribute_map]
    config = options_for_mlx(config, [*required, *renamed], model.config)
    if "text_config" in config and hasattr(arguments, "vocab_size"):  # a default, and the text decoder has the number
        config.setdefault("vocab_size", config["text_config"]["vocab_size"])
    path.write_text(json.dumps(config))
    if kind in _NAMED or kind in _UNREAD:
        _rewrite(folder / "model.safetensors", kind)


def _with(config: Config, other: Mapping[str, Any]) -> Config:
    """Return a configuration with other options, of which those that are groups are joined."""
    groups = {name: _with(config[name], value) for name, value in other.items() if isinstance(config.get(name), dict)}
    return {**config, **other, **groups}


def _rewrite(path: Path, kind: str) -> None:
    """Name, turn and leave out the weights of a file by the tables above."""
    import torch
    from safetensors.torch import load_file, save_file

    found = {}
    for name, weight in load_file(path).items():
        if re.search(_UNREAD.get(kind, "(?!)"), name):
            continue
        if re.search(_TURNED.get(kind, "(?!)"), name):
            weight = weight.transpose(-1, -2).contiguous()
        for pattern, other in _NAMED.get(kind, ()):
            name = re.sub(pattern, other, name)
        found[name] = weight
        for pattern, other in _NEVER_READ.get(kind, ()):
            if re.search(pattern, name):
                found[re.sub(pattern, other, name)] = torch.zeros_like(weight)
    save_file(found, path, metadata={"format": "pt"})


def options_for_mlx(config: Config, names: Sequence[str], own: Any) -> Config:
    """Return a configuration with the options `names` of mlx-lm that it lacks, as far as they are told otherwise in it.

    `own` is the object of transformers: it answers to names that it does not write.
    """
    found = dict(config)
    for name in names:
        if name in found or name in {"text_config", "rope_scaling"}:
            continue
        if _CALLED.get(name) in config:
            found[name] = config[_CALLED[name]]
        elif hasattr(own, name):
            found[name] = getattr(own, name)
        else:
            try:
                found[name] = _DERIVED[name](config)
            except KeyError:
                continue
    return found


def as_before_transformers_5(config: Config) -> Config:
    """Return a configuration with what mlx-lm reads of it: transformers 5 writes the settings of RoPE under
    `rope_parameters`, where mlx-lm 0.32.2 does not look for most architectures, and takes its default for."""
    rope = dict(config.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in rope.values()):  # by type of layer
        wide = dict(rope.get("full_attention") or {})
        near = dict(rope.get("sliding_attention") or {})
        rope = {**wide, **({"rope_local_base_freq": near["rope_theta"]} if "rope_theta" in near else {})}
    kept = {key: value for key, value in rope.items() if key != "rope_type" and value is not None}
    kept["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    heads = config.get("num_attention_heads")
    if heads and config.get("hidden_size"):
        kept["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    return {**config, **kept}
