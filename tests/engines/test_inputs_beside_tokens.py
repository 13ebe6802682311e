"""Models that take images: fed with text alone they say so, and with an image the first call of a sequence gets it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import kvdrift
from kvdrift.errors import UsageError
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from tests.support.every_kind import PROMPTS, SMALL, lively

IMAGE = 90
PASSES = (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)


def qwen() -> Any:
    config = Qwen2_5_VLConfig(
        text_config={
            **SMALL,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": SMALL["hidden_size"],
        },
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    return lively(Qwen2_5_VLForConditionalGeneration, config)


def llava() -> Any:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(text_config=LlamaConfig(**SMALL), vision_config=vision, image_token_index=IMAGE)
    return lively(LlavaForConditionalGeneration, config)


PATCHES = {"pixel_values": torch.randn(16, 1176, generator=torch.Generator().manual_seed(0))}
WITH_IMAGE = [5, 92, *[IMAGE] * 4, 93, 7, 9]
QWEN = {
    **PATCHES,
    "image_grid_thw": torch.tensor([[1, 4, 4]]),
    "mm_token_type_ids": torch.tensor([[int(token == IMAGE) for token in WITH_IMAGE]]),
}


def audited(model: Any, prompts: Any, **options: Any) -> Audit:
    return kvdrift.audit(model, prompts=prompts, span=2, **options)


def test_text_alone_is_said() -> None:
    audit = audited(llava(), PROMPTS)

    assert audit.verdict in PASSES
    assert "text alone was fed" in next(c.text for c in audit.caveats if c.code == "TEXT_ALONE")


def test_an_image_goes_with_the_first_call_of_each_sequence() -> None:
    model = qwen()
    seen: list[tuple[int, bool]] = []
    model.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append((args[0].shape[1], "pixel_values" in kwargs)), with_kwargs=True
    )

    audit = audited(model, {"p": WITH_IMAGE}, inputs=QWEN)

    assert audit.verdict in PASSES
    assert "TEXT_ALONE" not in {caveat.code for caveat in audit.caveats}
    assert {has_image for n_tokens, has_image in seen if n_tokens >= len(WITH_IMAGE)} >= {True}
    assert not any(has_image for n_tokens, has_image in seen if n_tokens == 1)
    assert model.model.rope_deltas is None  # as it was before, whatever the calls left there


def test_positions_that_forget_the_image_are_found() -> None:
    """A decode step that counts tokens, where an image takes fewer positions than it has tokens."""
    model = qwen()

    def forget(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            module.rope_deltas = torch.zeros_like(module.rope_deltas)

    model.model.register_forward_pre_hook(forget, with_kwargs=True)
    audit = audited(model, {"p": WITH_IMAGE}, inputs=QWEN)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (0, "q_rope")


@pytest.mark.parametrize(
    ("make", "prompts", "options", "said"),
    [
        (llava, PROMPTS, {}, r"the prompt 'a' has 0 places for the inputs \(pixel_values\), tokens \[90\]"),
        (lively, PROMPTS, {}, r"the model's config names no token that stands for an image"),
        (llava, {"p": WITH_IMAGE}, {"scenarios": "rewind"}, r"leave out scenarios and lengths, or inputs"),
    ],
)
def test_inputs_that_do_not_fit_are_told(make: Any, prompts: Any, options: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        audited(make(), prompts, inputs=PATCHES, **options)
