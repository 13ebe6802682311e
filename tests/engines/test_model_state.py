"""What a call leaves in the model is put back, so that the next scenario and the next audit start from a clean one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import kvdrift
from kvdrift.engines.torch.state import ModelState

PROMPT = {"p": [5, 9, 17, 3, 44, 2, 8]}


def vision_language() -> Any:
    text = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 1, "intermediate_size": 16, "out_hidden_size": 32}
    ids = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        return Qwen2_5_VLForConditionalGeneration(config).eval()


def test_what_generate_leaves_in_a_model_is_put_back() -> None:
    model = vision_language()
    for _ in range(2):
        audit = kvdrift.audit(model, prompts=PROMPT, span=2, scenarios=["decode", "generate_greedy"])
        assert audit.exit_code == 0, audit.decision.reasons
        assert model.model.rope_deltas is None


def test_attributes_buffers_and_contents_come_back() -> None:
    model: Any = torch.nn.Linear(2, 2)
    model.register_buffer("table", torch.zeros(3))
    model.seen, model.last = [1], None
    state = ModelState(model)
    assert state.restore(with_buffers=True) == ()
    model.seen.append(2)
    model.last, model.more = torch.ones(2), 5
    model.table.add_(1.0)
    assert sorted(state.restore(with_buffers=True)) == ["last", "more", "seen", "table"]
    assert (model.seen, model.last, hasattr(model, "more")) == ([1], None, False)
    assert not bool(model.table.any())
