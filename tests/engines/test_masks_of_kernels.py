"""Kernels that get no mask of scores: blocks of keys and a function of places, as flex attention does, or which keys
are no padding, as flash attention does. What they attend to is derived from what they are given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    MistralConfig,
    MistralForCausalLM,
    masking_utils,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import kvdrift
from kvdrift.engines.torch.masks import Reach, as_tensor
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.evidence import Verdict
from tests.support.every_kind import PROMPTS, SMALL, lively

PASSES = (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
# Whose masks the kernel below is given; None: nobody's, so that it knows the places of tokens by itself.
GIVEN = {"blocks": "flex_attention", "padding": "flash_attention_2", "nothing": None}


class Kernel:
    """Attention with an online softmax, which shows none of its scores in calls of torch.

    In a decode step it does not read the first key while `is_faulty`.
    """

    def __init__(self) -> None:
        self.is_faulty = False
        self.masks: set[str] = set()

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        self.masks.add(type(attention_mask).__name__)
        n_tokens, n_keys = query.shape[2], key.shape[2]
        own, keys = torch.arange(n_tokens)[:, None] + n_keys - n_tokens, torch.arange(n_keys)
        hidden = (keys > own)[None, None]
        if (window := options.get("sliding_window")) is not None:
            hidden = hidden | (keys <= own - window)
        if isinstance(attention_mask, BlockMask):
            rows = torch.arange(len(query))[:, None, None, None]
            hidden = ~attention_mask.mask_mod(
                rows, torch.zeros(1, dtype=torch.int64), torch.arange(n_tokens)[:, None], keys
            )
        elif attention_mask is not None:
            hidden = hidden | ~attention_mask[:, None, None, :n_keys].bool()
        if self.is_faulty and n_tokens == 1:
            hidden = hidden | (keys == 0)
        wide = query.dtype if query.dtype == torch.float64 else torch.float32
        groups = query.shape[1] // key.shape[1]
        key, value = (each.to(wide).repeat_interleave(groups, dim=1) for each in (key, value))
        scores = (query.to(wide) @ key.transpose(2, 3) * options["scaling"]).masked_fill(hidden, -torch.inf)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True).clamp(min=-1e30))
        context = weights @ value / weights.sum(-1, keepdim=True).clamp(min=1e-30)
        return context.to(query.dtype).transpose(1, 2).contiguous(), None


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    def uncompiled(*, _compile: bool = False, **options: Any) -> BlockMask:
        return create_block_mask(**options)

    monkeypatch.setattr(masking_utils, "create_block_mask", uncompiled)  # the same blocks, without a compiler
    kernel = Kernel()
    AttentionInterface.register("given", kernel)
    yield kernel
    AttentionInterface._global_mapping.pop("given", None)
    AttentionMaskInterface._global_mapping.pop("given", None)


def audited(form: str, *, window: bool = False, **options: Any) -> Audit:
    if (name := GIVEN[form]) is not None:
        AttentionMaskInterface.register("given", ALL_MASK_ATTENTION_FUNCTIONS[name])
    small = {**SMALL, "sliding_window": 4} if window else SMALL
    model = lively(MistralForCausalLM, MistralConfig(**small)) if window else lively()
    model.config._attn_implementation = "given"
    return kvdrift.audit(model, prompts=PROMPTS, **{"span": 2, **options})


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("form", GIVEN)
def test_a_kernel_that_gets_no_mask_of_scores_is_causal(form: str, window: bool, kernel: Kernel) -> None:
    """Chunks of a prefill begin behind cached keys, and rows of a batch have padding in front."""
    scenarios = "decode" if form == "nothing" else "decode,chunked_prefill,batch_padded"

    audit = audited(form, window=window, scenarios=scenarios)

    assert audit.verdict in PASSES, audit.decision.reasons
    assert {row["verdict"] for row in audit.view["scenarios"]} <= {"EXACT", "STRUCTURAL_DRIFT"}
    assert ("BlockMask" in kernel.masks) == (form == "blocks")


@pytest.mark.parametrize("form", GIVEN)
def test_a_key_that_such_a_kernel_does_not_read_in_decode_is_found(form: str, kernel: Kernel) -> None:
    kernel.is_faulty = True

    audit = audited(form, ladder="off")

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (0, "attn_ctx")
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause is Cause.KEY_LOST_FIRST


def test_blocks_that_are_not_listed_are_hidden_whatever_the_function_says() -> None:
    """A table of blocks that was made for fewer keys hides those behind, as the kernel does."""

    def everything(row: Tensor, head: Tensor, token: Tensor, key: Tensor) -> Tensor:
        return token >= 0

    def first(row: Tensor, head: Tensor, token: Tensor, key: Tensor) -> Tensor:
        return key < 2

    query = torch.zeros(2, 4, 3, 8)
    mask = create_block_mask(first, None, None, 3, 6, device="cpu", BLOCK_SIZE=2)
    assert as_tensor(mask, 2, query).shape == (1, 1, 3, 6)  # type: ignore[union-attr]
    assert as_tensor(mask, 2, query)[0, 0].tolist() == [[True, True, False, False, False, False]] * 3  # type: ignore[index]

    mask.mask_mod = everything
    assert as_tensor(mask, 2, query)[0, 0].tolist() == [[True, True, False, False, False, False]] * 3  # type: ignore[index]


def test_a_token_sees_the_keys_of_its_window_behind_those_that_were_cached() -> None:
    assert Reach(2).hides(torch.tensor([0, 1]), 5).tolist() == [[False] * 3 + [True] * 2, [False] * 4 + [True]]
    assert Reach(2, window=2).hides(torch.tensor([1]), 5).tolist() == [[True, True, False, False, True]]
