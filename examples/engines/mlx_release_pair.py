"""Two releases of mlx-lm, one with a fault that the other has not: PYTHONPATH=FOLDER python mlx_release_pair.py."""

from __future__ import annotations

import sys

import mlx.core as mx
import mlx_lm
from mlx_lm.models import gemma3n

import kvdrift
from kvdrift.engines.mlx.engine import MLXModel

TEXT = {
    "model_type": "gemma3n_text",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": 200,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 200,
    "sliding_window": 64,
    "laurel_rank": 8,
    "max_position_embeddings": 256,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1e6,
    "altup_num_inputs": 2,
    "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.0] * 4,
    "hidden_size_per_layer_input": 16,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
}
mx.set_default_device(mx.cpu)
mx.random.seed(0)
model = gemma3n.Model(gemma3n.ModelArgs(model_type="gemma3n", text_config=TEXT))
for kind in ("default", "batch"):
    prompts = {"p": [5, 17, 33, 48, 90, 121, 7]}
    audit = kvdrift.audit(MLXModel(model, cache=kind), prompts=prompts, mode="as_designed")
    sys.stdout.write(f"mlx-lm {mlx_lm.__version__}, {kind}: {audit}\n")
