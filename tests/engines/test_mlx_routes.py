"""Models of mlx-lm on other routes: clean batches, copies and files pass, and what is wrong on one of them is found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm.models import cache, gemma3_text, llama

import kvdrift
from kvdrift.engines.mlx import caches as kinds
from kvdrift.engines.mlx.engine import MLXModel
from kvdrift.engines.mlx.routes import Batching
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict

pytestmark = pytest.mark.xdist_group("mlx_routes")

PASSES = ("EXACT", "STRUCTURAL_DRIFT")
PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 31, 60, 61], "q": [7, 1, 70, 22, 13, 14, 15, 60, 61, 62, 11]}
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"num_hidden_layers": 2, "vocab_size": 96, "head_dim": 16, "rms_norm_eps": 1e-5}
ROUTES = ["prefix_reuse", "export_import", "batch_padded", "select_rows"]


def tiny(module: Any, **options: Any) -> Any:
    mx.random.seed(0)
    with mx.stream(mx.cpu):
        name = module.__name__.rpartition(".")[2]
        model = module.Model(module.ModelArgs.from_dict({"model_type": name, **SIZES, **options}))
        model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.2 if p.ndim > 1 else p, model.parameters()))
        mx.eval(model.parameters())
    return model


def windowed() -> Any:
    return tiny(gemma3_text, sliding_window=8, sliding_window_pattern=2, query_pre_attn_scalar=16)


def audited(model: Any, scenarios: list[str]) -> Audit:
    return kvdrift.audit(MLXModel(model), prompts=PROMPTS, span=2, scenarios=scenarios)


def verdicts(audit: Audit) -> dict[str, str]:
    return {row["name"]: row["verdict"] for row in audit.view["scenarios"] if row["applicable"]}


@pytest.mark.parametrize("make", [lambda: tiny(llama), pytest.param(windowed, marks=pytest.mark.matrix)])
def test_a_clean_model_passes_on_every_route(make: Any) -> None:
    found = verdicts(audited(make(), ROUTES))

    assert sorted(found) == sorted(ROUTES)
    assert set(found.values()) <= set(PASSES), found


@pytest.mark.parametrize("batching", [Batching("right"), Batching(step=4)], ids=["on the right", "in pieces"])
def test_a_batch_that_is_fed_in_another_way_passes(batching: Batching) -> None:
    model = MLXModel(windowed(), batching=batching)
    audit = kvdrift.audit(model, prompts=PROMPTS, span=2, scenarios=["batch_padded", "select_rows"])

    assert set(verdicts(audit).values()) <= set(PASSES), verdicts(audit)


def test_padding_on_the_right_that_stays_there_is_found() -> None:
    with changed(cache.BatchKVCache, "finalize", lambda self: None):
        model = MLXModel(tiny(llama), batching=Batching("right"))
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2, scenarios=["batch", "batch_padded"])

    assert {name: verdict in PASSES for name, verdict in verdicts(audit).items()} == {
        "batch": True,
        "batch_padded": False,
    }


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    yield
    setattr(owner, name, before)


def unpadded_mask(self: Any, n: int, return_array: bool = False, **options: Any) -> Any:
    return cache.create_causal_mask(n, offset=self._idx, **options)


def test_padding_that_is_seen_is_found_in_the_shorter_row() -> None:
    with changed(cache.BatchKVCache, "make_mask", unpadded_mask):
        audit = audited(tiny(llama), ["batch_padded"])

    failure = audit.first_failure
    assert audit.verdict is Verdict.MISMATCH
    assert failure is not None
    assert (failure.prompt, failure.layer, str(failure.site)) == ("q / padded / row 1", 0, "attn_probs")


def test_a_row_that_is_taken_for_another_is_found_when_rows_are_selected() -> None:
    kept = cache.BatchKVCache.filter
    with changed(cache.BatchKVCache, "filter", lambda self, rows: kept(self, mx.array([0, 1]))):
        audit = audited(tiny(llama), ["batch_padded", "select_rows"])

    assert {name: verdict in PASSES for name, verdict in verdicts(audit).items()} == {
        "batch_padded": True,
        "select_rows": False,
    }
    assert audit.first_failure is not None
    assert str(audit.first_failure.site) == "k_cache"


def test_a_file_that_loses_the_place_in_the_ring_is_found() -> None:
    load = cache.load_prompt_cache

    def load_at_the_start(path: str) -> Any:
        loaded = load(path)
        for each in loaded:
            if hasattr(each, "_idx"):
                each._idx = 0
        return loaded

    with changed(cache, "load_prompt_cache", load_at_the_start):
        audit = audited(windowed(), ["prefix_reuse", "export_import"])

    assert verdicts(audit)["prefix_reuse"] in PASSES
    assert verdicts(audit)["export_import"] == "MISMATCH"


def test_what_mlx_lm_cannot_do_says_so() -> None:
    rows = {row["name"]: row for row in audited(windowed(), ["beams", "rewind", "context_shift"]).view["scenarios"]}

    assert "beam search" in rows["beams"]["reasons"][0]
    assert "a ring whose overwritten rows" in rows["rewind"]["reasons"][0]
    assert "moves its keys" in rows["context_shift"]["reasons"][0]


def test_a_cache_without_a_batch_says_so() -> None:
    with pytest.raises(ValueError, match="no batch of QuantizedKVCache"):
        kinds.batched(tiny(llama), "quantized", (0, 1))
