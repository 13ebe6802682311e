"""Which calls of torch are seen while a pass is recorded: those of attention modules, and at float64 all of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from kvdrift.engines.hf.engine import HFEngine
from kvdrift.engines.torch.attention import AttentionTap
from kvdrift.errors import CaptureError
from kvdrift.trace.model import Trace
from kvdrift.vocabulary.sites import Site
from tests.support.tiny import tiny_model

TOKENS = (3, 5, 7, 11)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each function came through the tap."""
    found: Counter[str] = Counter()
    original = AttentionTap.__torch_function__

    def counted(self: AttentionTap, func: Any, *args: Any) -> Any:
        found[getattr(func, "__name__", str(func))] += 1
        return original(self, func, *args)

    monkeypatch.setattr(AttentionTap, "__torch_function__", counted)
    return found


def record(engine: HFEngine, trace: Trace) -> None:
    sequence = engine.new_sequence(len(TOKENS))
    sequence.extend(TOKENS, probe=(2, 3), sink=trace)
    sequence.close()


def new_trace(rung: str) -> Trace:
    return Trace("p", "prefill", "test", rung, TOKENS)


def n_modes() -> int:
    return int(torch._C._len_torch_function_stack())


def test_a_native_pass_is_watched_inside_attention_alone(seen: Counter[str]) -> None:
    with HFEngine(tiny_model("llama", dtype=torch.bfloat16)) as engine:
        seen.clear()
        trace = new_trace("bfloat16")
        record(engine, trace)

    n_layers = len(trace.attention)
    assert seen["scaled_dot_product_attention"] == n_layers
    assert seen["linear"] == 4 * n_layers  # queries, keys, values and what attention hands on; none of the MLP
    assert not {"silu", "rsqrt", "embedding"} & seen.keys()
    assert sum(row.site is Site.ATTN_SCORES for row in trace.rows) == n_layers


def test_a_pass_at_float64_is_watched_throughout(seen: Counter[str]) -> None:
    with HFEngine(tiny_model("llama", dtype=torch.bfloat16)) as engine, engine.at("float64"):
        seen.clear()
        record(engine, new_trace("float64"))

    assert {"silu", "rsqrt", "embedding"} <= seen.keys()


def test_a_call_of_which_nothing_is_recorded_is_not_watched(seen: Counter[str]) -> None:
    with HFEngine(tiny_model("llama", dtype=torch.bfloat16)) as engine:
        seen.clear()
        sequence = engine.new_sequence(len(TOKENS))
        sequence.extend(TOKENS)
        sequence.close()

    assert not seen


@pytest.mark.parametrize("part", ["q_proj", "o_proj"])
def test_a_model_that_fails_inside_attention_leaves_nothing_on_watch(part: str) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    before = n_modes()

    def fail(*_: Any) -> None:
        raise RuntimeError("out of order")

    with HFEngine(model) as engine:
        handle = getattr(model.model.layers[1].self_attn, part).register_forward_pre_hook(fail)
        with pytest.raises(CaptureError, match="out of order"):
            record(engine, new_trace("bfloat16"))
        assert n_modes() == before
        handle.remove()
        trace = new_trace("bfloat16")
        record(engine, trace)

    assert n_modes() == before
    assert any(row.site is Site.ATTN_SCORES for row in trace.rows)
