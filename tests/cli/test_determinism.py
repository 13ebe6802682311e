"""Whether a model computes the same again, with planted causes of it not doing so, and the modes that it claims."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache

from kvdrift.engines.hf.engine import HFEngine
from kvdrift.errors import UsageError
from kvdrift.pipeline.determinism import Determinism, examine
from kvdrift.verdict.claims import parse_claim
from tests.support.command import kvdrift, refused
from tests.support.matrix import further
from tests.support.tiny import tiny_model

TEXT = {"p": [5, 9, 17, 3, 88, 61, 12, 40, 7]}


def examined(model: nn.Module, *claims: str, runs: int = 3, cache: str | Callable[[], Any] = "dynamic") -> Determinism:
    with HFEngine(model, cache=cache) as engine:
        return examine(engine, TEXT, None, n_runs=runs, claims=[parse_claim(text) for text in claims])


def states(found: Determinism) -> dict[str, str]:
    return {group.name: group.state for group in found.groups}


def answers(found: Determinism) -> list[str]:
    return [item.answer for item in found.answers]


@contextmanager
def changed(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _m, _i, out: change(out))
    try:
        yield
    finally:
        handle.remove()


def add_noise(size: float, values: torch.Tensor) -> torch.Tensor:
    return values * (1.0 + size * torch.randn(values.shape, dtype=values.dtype))


def mix_rows(size: float, values: torch.Tensor) -> torch.Tensor:
    return values + size * (values.mean(dim=0, keepdim=True) - values)


def sum_in_any_order(module: nn.Linear, values: torch.Tensor) -> torch.Tensor:
    order = torch.randperm(module.in_features)
    return nn.functional.linear(values[..., order], module.weight[:, order])


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.matrix)])
def test_a_model_as_it_is_computes_the_same_again_and_in_batches_up_to_rounding(dtype: str) -> None:
    found = examined(tiny_model("llama", dtype=getattr(torch, dtype)))

    assert states(found)["runs"] == "bit-identical"
    assert set(states(found)) == {"runs", "batch of 2", "neighbours of 2", "batch of 8", "neighbours of 8"}
    assert set(states(found).values()) <= {"bit-identical", "jitter"}
    assert states(found)["neighbours of 2"] == states(found)["neighbours of 8"] == "bit-identical"
    assert [group.n for group in found.groups] == [2, 2, 1, 8, 1]
    assert found.exit_code == 0


@pytest.mark.parametrize("size", [1e-5, *further(1e-2)])
def test_random_noise_is_different_from_its_layer_on(size: float) -> None:
    model: Any = tiny_model("llama", dtype=torch.float32)
    with changed(model.model.layers[1].mlp, partial(add_noise, size)):
        found = examined(model)

    runs = found.groups[0]
    assert (runs.name, runs.state, found.exit_code) == ("runs", "different", 1)
    assert all(str(item.first).endswith("layer 1 / mlp_out") for item in runs.changed)
    assert len(runs.changed) == runs.n == 2
    assert 0.1 * size < runs.size


def test_sums_in_another_order_each_time_are_jitter_with_its_size() -> None:
    model: Any = tiny_model("llama", dtype=torch.float32)
    module = model.model.layers[1].mlp.down_proj
    module.forward = partial(sum_in_any_order, module)
    found = examined(model)

    runs = found.groups[0]
    assert (runs.state, found.exit_code) == ("jitter", 0)
    assert 1e-9 < runs.size < 1e-5
    assert runs.fine is None
    assert "from layer 1 / mlp_out" in runs.text


def test_a_row_that_depends_on_its_neighbours_is_named_with_its_first_site() -> None:
    model: Any = tiny_model("llama", dtype=torch.float32)
    with changed(model.model.layers[1].input_layernorm, partial(mix_rows, 1e-3)):
        found = examined(model, "batch-invariant")

    by_name = {group.name: group for group in found.groups}
    assert by_name["runs"].state == "bit-identical"
    for name in ("batch of 2", "batch of 8", "neighbours of 2", "neighbours of 8"):
        assert by_name[name].state == "different"
        assert all(str(item.first).endswith("layer 1 / attn_norm_out") for item in by_name[name].changed)
    assert [item.where for item in by_name["batch of 8"].changed] == [f"row {n}" for n in range(8)]
    assert answers(found) == ["not in effect"]


def test_one_row_alone_that_changes_is_the_one_that_is_named() -> None:
    def second_row(values: torch.Tensor) -> torch.Tensor:
        if len(values) > 1:
            values[1] *= 1.001
        return values

    model: Any = tiny_model("llama", dtype=torch.float32)
    with changed(model.model.layers[2].self_attn.o_proj, second_row):
        found = examined(model)

    eight = next(group for group in found.groups if group.name == "batch of 8")
    assert eight.state == "different"
    assert [(item.where, str(item.first).split(" / ", 2)[2]) for item in eight.changed] == [
        ("row 1", "layer 2 / attn_out")
    ]


def test_a_race_that_only_some_runs_lose_is_seen_with_the_run() -> None:
    model: Any = tiny_model("llama", dtype=torch.float32)
    calls = iter(range(10**6))

    def sometimes(values: torch.Tensor) -> torch.Tensor:
        return values * 1.01 if next(calls) == 22 else values

    with changed(model.model.layers[0].self_attn.o_proj, sometimes):
        found = examined(model, runs=8)

    assert found.groups[0].state == "different"
    assert [str(item.first).split(" / ", 2)[2] for item in found.groups[0].changed] == ["layer 0 / attn_out"]


# ------------------------------------------------------------------------------------------------------------- claims


class RoundedCache(DynamicCache):  # type: ignore[misc]
    """A cache that hands back what its dtype holds."""

    dtype: Any = torch.float8_e4m3fn

    def update(self, key_states: Any, value_states: Any, *arguments: Any, **options: Any) -> Any:
        kept = [x.to(self.dtype).to(x.dtype) for x in (key_states, value_states)]
        return super().update(*kept, *arguments, **options)


class HalfCache(RoundedCache):
    dtype = torch.bfloat16


class KeysAlone(RoundedCache):
    def update(self, key_states: Any, value_states: Any, *arguments: Any, **options: Any) -> Any:
        keys = key_states.to(self.dtype).to(key_states.dtype)
        return DynamicCache.update(self, keys, value_states, *arguments, **options)


@pytest.mark.parametrize(
    ("cache", "claim", "answer"),
    [
        ("dynamic", "kv-dtype=float32", "in effect"),
        ("dynamic", "kv-dtype=fp8", "not in effect"),
        ("dynamic", "kv-dtype=bf16", "not in effect"),
        ("dynamic", "kv-dtype=int4", "not in effect"),
        ("dynamic", "kv-dtype=float64", "cannot tell"),
        (RoundedCache, "kv-dtype=fp8", "in effect"),
        (RoundedCache, "kv-dtype=fp8_e4m3", "in effect"),
        (RoundedCache, "kv-dtype=fp8_e5m2", "not in effect"),
        (RoundedCache, "kv-dtype=bf16", "not in effect"),
        (RoundedCache, "kv-dtype=float32", "not in effect"),
        (HalfCache, "kv-dtype=bf16", "in effect"),
        (HalfCache, "kv-dtype=fp8", "not in effect"),
        (KeysAlone, "kv-dtype=fp8", "not in effect"),
    ],
)
def test_the_dtype_of_a_cache_is_told_from_its_rows(cache: Any, claim: str, answer: str) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    with HFEngine(model, cache=cache) as engine:
        found = _claims_alone(engine, claim)

    assert found[0].answer == answer, found[0].why


def _claims_alone(engine: HFEngine, *claims: str) -> list[Any]:
    """Answer without the runs in batches, which these claims do not ask about."""
    from kvdrift.capture.repeats import run_alone
    from kvdrift.verdict.claims import answer

    tokens = (*TEXT["p"], 3, 4)
    first, again = (run_alone(engine, tokens, 2, engine.info.dtype, tuple(range(len(tokens)))) for _ in range(2))
    return [answer(parse_claim(claim), (), first, again, 2) for claim in claims]


@pytest.mark.parametrize(
    ("cache", "attention", "claims", "expected"),
    [
        ("dynamic", "sdpa", ("static-cache", "attention=sdpa"), ["not in effect", "in effect"]),
        ("static", "eager", ("static-cache", "attention=sdpa"), ["in effect", "not in effect"]),
        ("dynamic", "eager", ("attention=eager", "prefix-cache"), ["in effect", "not in effect"]),
    ],
)
def test_cache_kind_attention_and_prefix_are_told_from_what_was_read(
    cache: str, attention: str, claims: tuple[str, ...], expected: list[str]
) -> None:
    with HFEngine(tiny_model("llama", dtype=torch.float32, attention=attention), cache=cache) as engine:
        assert [item.answer for item in _claims_alone(engine, *claims)] == expected


def test_batch_invariance_of_a_model_without_batches_cannot_be_told() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    with HFEngine(model) as engine:
        assert _claims_alone(engine, "batch-invariant")[0].answer == "cannot tell"


def test_rounding_of_the_planted_cache_is_real() -> None:
    x = torch.randn(64)

    assert not torch.equal(x, x.to(torch.float8_e4m3fn).to(x.dtype))
    assert np.dtype(ml_dtypes.float8_e4m3fn).itemsize == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed", "unknown claim 'speed'"),
        ("kv-dtype=fp7", "unknown KV dtype 'fp7'"),
        ("kv-dtype", "unknown KV dtype ''"),
        ("attention", "takes the name of an implementation"),
        ("static-cache=1", "takes no value"),
    ],
)
def test_a_claim_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_claim(text)


def test_the_command(llama: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    done = kvdrift("determinism", llama, "--prompts", prompts, "--runs", "2", "--claim", "kv-dtype=bf16")

    assert (done.code, done.err) == (0, "")
    assert "runs: bit-identical" in done.out
    assert "kv-dtype=bfloat16: in effect" in done.out
    assert max(map(len, done.out.splitlines())) <= 60
    assert kvdrift("determinism", llama, "--prompts", prompts, "--runs", "2", "--claim", "kv-dtype=fp8").code == 1
    refused(kvdrift("determinism", llama, "--runs", "1"), 2, "--runs 1 compares nothing; give at least 2")
