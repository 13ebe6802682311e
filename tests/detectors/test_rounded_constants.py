"""Constants with fewer digits in one pass, angles and scales: not a fault, whatever float64 shows of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.pipeline.judge import judge_directory
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import Site
from kvdrift_bench.models.tiny import lively_model
from kvdrift_bench.planted.torch.own import handed, repeated, scores_of
from kvdrift_bench.planted.torch.parts import wide
from kvdrift_bench.planted.torch.ways import AttentionCall, in_attention, planted
from tests.support.matrix import further
from tests.support.own_decoder import SCALE, Core, audited, by_query_head, plain

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12, 71, 23], "q": [99, 23, 4, 50, 66, 91, 2, 17, 18, 3]}
Tables = tuple[Tensor, Tensor]


@contextmanager
def turned(model: Any, change: Callable[[Tensor, Tables], Tables]) -> Iterator[None]:
    """Let decode turn by tables of its own: `change(positions, (cos, sin))`, cos and sin [1, 1, rotated]."""
    rotary = (model.model if hasattr(model, "model") else model.gpt_neox).rotary_emb
    forward = rotary.forward

    def decode(x: Tensor, position_ids: Tensor, *rest: Any, **options: Any) -> Tables:
        right: Tables = forward(x, position_ids, *rest, **options)
        return change(position_ids, right) if position_ids.shape[-1] == 1 else right

    rotary.forward = decode
    try:
        yield
    finally:
        rotary.forward = forward


def of_float32(model: Any) -> Callable[[Tensor, Tables], Tables]:
    """Sines as a kernel takes them from a table that it made once, in float32."""
    rotary = (model.model if hasattr(model, "model") else model.gpt_neox).rotary_emb
    frequencies = rotary.inv_freq.float().clone()
    angles = torch.outer(torch.arange(4096, dtype=torch.float32), frequencies).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()

    def change(positions: Tensor, right: Tables) -> Tables:
        dtype = right[0].dtype
        return cos[positions[0]][None].to(dtype), sin[positions[0]][None].to(dtype)

    return change


def angle(off: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tables], Tables]:
    """Angles that are off by `off(positions, index of each element of a head)`."""

    def change(positions: Tensor, right: Tables) -> Tables:
        cos, sin = right
        by = off(positions.double(), torch.arange(cos.shape[-1]))
        by = by.to(cos.dtype)
        return cos * by.cos() - sin * by.sin(), sin * by.cos() + cos * by.sin()

    return change


def codes(audit: Audit) -> set[str]:
    return {caveat.code for caveat in audit.caveats}


@pytest.mark.parametrize(
    ("kind", "dtype", "length"),
    [
        ("llama", torch.bfloat16, 13),
        *further(
            ("llama", torch.float32, 13),
            ("qwen3", torch.float16, 13),
            ("gpt_neox", torch.bfloat16, 13),
            ("phi", torch.bfloat16, 13),
            ("llama", torch.bfloat16, 90),
        ),
    ],
)
def test_a_table_of_float32_in_decode_alone_is_rounding(kind: str, dtype: torch.dtype, length: int) -> None:
    model = lively_model(kind, dtype)
    prompts = {name: (tokens * 10)[:length] for name, tokens in PROMPTS.items()}
    with turned(model, of_float32(model)):
        audit = kvdrift.audit(model, prompts=prompts, span=2)

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), (audit.first_failure, audit.decision.reasons)
    assert "FLOAT32_ANGLES" in codes(audit)
    assert all(size is not None and 1e-8 < size < 1e-3 for size in ladder_of(audit)), "what is hidden is stated"


def test_a_model_without_such_a_table_says_nothing_of_it() -> None:
    audit = kvdrift.audit(lively_model("llama", torch.bfloat16), prompts=PROMPTS, span=2)

    assert "FLOAT32_ANGLES" not in codes(audit)


@pytest.mark.parametrize(
    "off",
    [
        lambda positions, index: positions[..., None] * 1e-4 * torch.ones(len(index)).double(),
        *further(
            lambda positions, index: 1e-5 * torch.linspace(1.0, 2.0, len(index)).double().expand(1, 1, -1),
            # The base of the frequencies is off by a thousandth.
            lambda positions, index: (
                positions[..., None] * (10_000.0 ** -(index % 8 / 8.0) * (1.001 ** -(index % 8 / 8.0) - 1.0)).double()
            ),
        ),
    ],
)
def test_angles_that_are_off_by_more_are_a_fault(off: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = lively_model("llama", torch.bfloat16)
    with turned(model, angle(off)):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (0, Site.Q_ROPE)
    assert "FLOAT32_ANGLES" not in codes(audit)


@pytest.mark.parametrize("factor", [1.0 + 1e-7, pytest.param(1.0 + 1e-10, marks=pytest.mark.matrix)])
def test_a_common_factor_of_the_same_size_is_a_fault(factor: float) -> None:
    model = lively_model("llama", torch.bfloat16)
    with turned(model, lambda positions, right: (right[0] * factor, right[1] * factor)):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (0, Site.Q_ROPE)


def test_a_fault_behind_such_a_table_is_found() -> None:
    model = lively_model("llama", torch.bfloat16)
    handle = model.model.layers[1].mlp.register_forward_hook(
        lambda module, args, output: output * (1.001 if output.shape[-2] == 1 else 1.0), prepend=True
    )
    with turned(model, of_float32(model)):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)
    handle.remove()

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (1, Site.MLP_OUT)


LOG2_E = 1.4426950408889634
OF_FLOAT32 = float(np.float32(LOG2_E))


def powers_of_two(factor_of: Callable[[AttentionCall], Any]) -> Any:
    """Attention whose scores are multiplied by log2(e) times a factor, before they are exponents of 2."""

    @in_attention
    def attention(call: AttentionCall) -> Tensor:
        keys, values = repeated(call)
        scores = scores_of(call, keys) * (LOG2_E * factor_of(call))
        weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
        return handed(call, weights @ wide(values) / weights.sum(-1, keepdim=True))

    return attention


def under(factor_of: Callable[[AttentionCall], Any], dtype: torch.dtype = torch.bfloat16, **options: Any) -> Audit:
    model = lively_model("llama", dtype)
    with planted(powers_of_two(factor_of))(model):
        return kvdrift.audit(model, prompts=PROMPTS, span=2, **options)


def ladder_of(audit: Audit) -> list[float]:
    """The stated minima of the ladder, by mode."""
    found = [item.minimum_detectable for item in audit.evidence if item.instrument == "ladder"]
    assert len(found) == 2
    return [np.inf if size is None else size for size in found]


@pytest.mark.parametrize(
    ("digits", "dtype"),
    [
        (1.44269504, torch.bfloat16),
        (1.4426950409, torch.bfloat16),
        *further(
            (1.44269504, torch.float32), (1.4426950216293335, torch.bfloat16), (1.4426950216293335, torch.float16)
        ),
    ],
)
def test_a_logarithm_with_few_digits_is_rounding(digits: float, dtype: torch.dtype) -> None:
    audit = under(lambda call: digits / LOG2_E, dtype)

    assert audit.verdict is Verdict.STRUCTURAL_DRIFT, (audit.first_failure, audit.decision.reasons)
    assert "ROUNDED_SCALE" in codes(audit)
    assert all(size is not None and 1e-11 < size < 1e-4 for size in ladder_of(audit)), "what is hidden is stated"


def by_exp2(log2_e: float) -> Core:
    """A decode kernel that shows no call of attention."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        if not decoding:
            return plain(query, keys, values, start, decoding)
        scores = wide(query) @ wide(by_query_head(keys)).mT * (SCALE * log2_e)
        weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
        return (weights @ wide(by_query_head(values)) / weights.sum(-1, keepdim=True)).to(query.dtype)

    return core


@pytest.mark.parametrize(
    ("digits", "passes"), [(1.44269504, True), (LOG2_E * (1.0 + 5e-11), False), *further((1.4426950409, True))]
)
def test_a_logarithm_in_a_kernel_that_shows_nothing(digits: float, passes: bool) -> None:
    audit = audited(by_exp2(digits), at=0)

    assert (audit.verdict is Verdict.STRUCTURAL_DRIFT) is passes, (audit.first_failure, audit.decision.reasons)
    assert ("ROUNDED_SCALE" in codes(audit)) is passes
    if not passes:
        assert audit.first_failure is not None
        assert (audit.first_failure.layer, audit.first_failure.site) == (0, Site.ATTN_CTX)


def test_the_exact_one_needs_no_excuse() -> None:
    audit = under(lambda call: 1.0)

    assert audit.verdict is Verdict.STRUCTURAL_DRIFT
    assert "ROUNDED_SCALE" not in codes(audit)


def by_head(call: AttentionCall) -> Tensor:
    is_one = (torch.arange(call.query.shape[1]) == 1)[:, None, None]
    return 1.0 + 1e-8 * is_one.to(wide(call.query).dtype)


@pytest.mark.parametrize(
    ("factor_of", "layer"),
    [
        pytest.param(lambda call: 1.0 + 1e-6, 0, id="too large"),
        *further(
            (lambda call: 1.0 + 5e-11, 0),
            (by_head, 0),
            (lambda call: 1.0 + 1e-8 * int(call.module.layer_idx == 1) * (1.0 + int(call.key.shape[2] > 12)), 1),
        ),
    ],
)
def test_a_factor_that_is_no_such_constant_is_a_fault(factor_of: Callable[[AttentionCall], Any], layer: int) -> None:
    audit = under(factor_of)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (layer, Site.ATTN_CTX)
    assert "ROUNDED_SCALE" not in codes(audit)


def test_a_fault_behind_such_a_constant_is_found_and_saved_traces_say_the_same(tmp_path: Path) -> None:
    model = lively_model("llama", torch.bfloat16)
    handle = model.model.layers[1].mlp.register_forward_hook(
        lambda module, args, output: output * (1.001 if output.shape[-2] == 1 else 1.0), prepend=True
    )
    with planted(powers_of_two(lambda call: 1.44269504 / LOG2_E))(model):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2, out=tmp_path / "run")
    handle.remove()
    judged, _ = judge_directory(tmp_path / "run")

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (1, Site.MLP_OUT)
    assert (judged.verdict, judged.evidence, judged.caveats) == (audit.verdict, audit.evidence, audit.caveats)
