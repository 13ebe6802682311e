"""What an earlier run left in memory must not help a decode step: other tokens are computed in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import kvdrift
from kvdrift.capture.modes import capture_prompt
from kvdrift.engines.displace import other_tokens
from kvdrift.engines.hf.engine import HFEngine
from kvdrift.vocabulary.facts import Prompt
from kvdrift.vocabulary.plan import Mode
from kvdrift_bench.models.tiny import lively_model

PROMPTS = {"a": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12], "b": [11, 23, 4, 40, 9, 31, 7]}
N_SLOTS = 64


class Pool:
    """Attention that reads K and V from one pool for all sequences, as a paged engine does; slot i is position i."""

    def __init__(self, *, decode_writes: bool) -> None:
        self.decode_writes = decode_writes
        self.rows: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> Any:
        n_new, n_all = query.shape[2], key.shape[2]
        if (module.layer_idx, key.dtype) not in self.rows:
            shape = (*key.shape[:2], N_SLOTS, key.shape[3])
            self.rows[module.layer_idx, key.dtype] = key.new_zeros(shape), key.new_zeros(shape)
        pool = self.rows[module.layer_idx, key.dtype]
        if n_new > 1 or self.decode_writes:
            for held, given in zip(pool, (key, value), strict=True):
                held[:, :, n_all - n_new : n_all] = given[:, :, n_all - n_new :]
        keys, values = (held[:, :, :n_all] for held in pool)
        return sdpa_attention_forward(module, query, keys, values, mask, **options)


def pooled(name: str, *, decode_writes: bool) -> Any:
    AttentionInterface.register(name, Pool(decode_writes=decode_writes).attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    return lively_model("llama", torch.bfloat16, name)


@pytest.mark.parametrize("mode", ["as_designed", "kv_aligned"])
def test_a_decode_step_that_never_writes_its_row_into_a_pool_is_found(mode: Any) -> None:
    audit = kvdrift.audit(pooled("pool_unwritten", decode_writes=False), prompts=PROMPTS, mode=mode, span=3)
    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert audit.first_failure is not None
    assert audit.first_failure.layer == 0
    assert audit.first_failure.site in ("attn_scores", "v_cache", "k_cache", "attn_probs", "attn_ctx")


def test_a_pool_into_which_decode_writes_is_clean() -> None:
    audit = kvdrift.audit(pooled("pool_written", decode_writes=True), prompts=PROMPTS, span=3)
    assert audit.exit_code == 0, audit.decision.reasons


def test_a_scenario_does_not_find_the_rows_of_its_reference_in_the_pool() -> None:
    """Its reference is the prefill of the same text, and `chunked_prefill` has a chunk of one token."""
    found, clean = (
        kvdrift.audit(pooled(f"pool_{writes}", decode_writes=writes), prompts=PROMPTS, scenarios=["chunked_prefill"])
        for writes in (False, True)
    )
    assert (found.verdict, clean.exit_code) == (kvdrift.Verdict.MISMATCH, 0)


def test_other_tokens_differ_at_every_place_and_are_those_of_the_text() -> None:
    tokens = (5, 9, 5, 17, 9)
    others = other_tokens(tokens, 64)
    assert all(a != b for a, b in zip(tokens, others, strict=True))
    assert set(others) <= set(tokens)
    assert other_tokens((63, 63), 64) == (0, 0)
    assert other_tokens((63,), None) == (64 % 65,)


def test_the_aligned_step_still_runs_on_the_bytes_that_prefill_wrote() -> None:
    prompt = Prompt("p", tuple(PROMPTS["a"]), (3, 5))
    with HFEngine(lively_model("llama", torch.bfloat16)) as engine:
        pairs = [item.pair for item in capture_prompt(engine, prompt, tuple(Mode), "bfloat16")]
    (aligned,) = (pair for pair in pairs if pair.mode is Mode.KV_ALIGNED and pair.decode.pass_name == "decode")
    held = {(read.layer, read.site): read for read in aligned.prefill.cache_reads()}
    for read in aligned.decode.cache_reads():
        known = held[read.layer, read.site]
        n_past = len(read.slots) - 1
        assert n_past >= len(prompt.prompt)
        assert (read.rows[:n_past].view("uint16") == known.rows[:n_past].view("uint16")).all()


@pytest.mark.parametrize("factor", [1.5, 1.0])
def test_a_head_that_is_wrong_for_a_single_row_is_found(factor: float) -> None:
    """A decode step asks for the logits of one row, as a generation loop does."""
    model = lively_model("llama", torch.bfloat16)
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: forward(x) * (factor if x.shape[-2] == 1 else 1.0)
    audit = kvdrift.audit(model, prompts=PROMPTS, span=2)
    if factor == 1.0:
        assert audit.exit_code == 0, audit.decision.reasons
    else:
        assert audit.verdict is kvdrift.Verdict.MISMATCH
        assert audit.first_failure is not None
        assert (audit.first_failure.layer, audit.first_failure.site) == (None, "logits")
