"""A kernel that turns queries and keys by angles of float32: not a fault, whatever float64 shows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import Site
from kvdrift_bench.models.tiny import lively_model
from tests.support.matrix import further

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
    found = {item.mode: item.minimum_detectable for item in audit.evidence if item.instrument == "ladder"}
    assert all(size is not None and 1e-8 < size < 1e-3 for size in found.values()), "what is hidden is stated"


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
