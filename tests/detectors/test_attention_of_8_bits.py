"""Attention of operands of 8 bits whose mean and steps come from all that a call reads (SageAttention): right in both
passes, and not an alarm; a mean, a step or a factor that is another one is found all the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kvdrift
from kvdrift.replay.attention import Operands, attend
from kvdrift.replay.eight_bits import Kernel, Way, ways
from kvdrift.replay.narrow import as_8_bits
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.facts import AttentionSpec
from kvdrift_bench.models.tiny import lively_model
from tests.support.kernels import attention_of

# An audit takes about a second, one with the ladder two.
_GENERATOR = np.random.default_rng(7)
PROMPTS = {f"p{n}": [int(token) for token in _GENERATOR.integers(0, 128, n)] for n in (11, 14, 21)}
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


Change = Callable[[Tensor], Tensor]


def unchanged(numbers: Tensor) -> Tensor:
    return numbers


@dataclass(frozen=True)
class Sage:
    """A kernel: `queries` and `keys` are how many rows share a step, `mean` makes that of keys [row, head, key, dim]
    wrong, `step` that of integers [row, head, key, 1]."""

    queries: int = 1
    keys: int = 1
    values: str = "float32"
    mean: Change = unchanged
    step: Change = unchanged

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        q, k, v = (each.to(wide) for each in (query, key, value))
        k = k - self.mean(k.mean(2, keepdim=True).expand_as(k).clone())
        (q, of_q), (k, of_k) = _integers(q, self.queries), _integers(k, self.keys)
        scores = (q.double() @ k.double().mT).to(wide) * (of_q * self.step(of_k.clone()).mT * scale)
        n, m = scores.shape[-2:]
        scores = scores.masked_fill(~torch.ones(n, m, dtype=torch.bool).tril(m - n), -torch.inf)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        kept, v = weights, v
        if self.values == "float16":
            kept, v = weights.half().to(wide), value.half().to(wide)
        if self.values == "float8":
            step = v.abs().amax(2, keepdim=True) / 448
            kept = (weights * 448).to(torch.float8_e4m3fn).to(wide) / 448
            v = (v / step).to(torch.float8_e4m3fn).to(wide) * step
        context = kept @ v / weights.sum(-1, keepdim=True)
        return context.to(query.dtype).transpose(1, 2).contiguous()


def _integers(rows: Tensor, block: int) -> tuple[Tensor, Tensor]:
    n = rows.shape[2]
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -n % block))
    step = torch.unflatten(padded, 2, (-1, block)).abs().amax((-1, -2)) / 127
    step = step.repeat_interleave(block, -1)[..., :n, None]
    return torch.round(rows / step), step


def times(factor: float, keys: slice = slice(None), heads: slice = slice(None)) -> Change:
    def changed(numbers: Tensor) -> Tensor:
        numbers[:, heads, keys] *= factor
        return numbers

    return changed


def of_another_head(mean: Tensor) -> Tensor:
    return mean.roll(2, 1)


def of_the_call_before(mean: Tensor) -> Tensor:
    """The last key alone is smoothed by the mean of the keys before it, as far as the mean tells: another one."""
    mean[:, :, -1:] = 0.9 * mean[:, :, -1:]
    return mean


def of_the_block_before(step: Tensor) -> Tensor:
    step[:, :, 4:8] = step[:, :, 0:4].clone()
    return step


def in_decode(then: Attend, first: Attend) -> Attend:
    def way(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return (then if query.shape[2] == 1 else first)(query, key, value, scale)

    return way


def fine(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    n, m = query.shape[2], key.shape[2]
    mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return found.transpose(1, 2).contiguous()


def audited(way: Attend, dtype: str, ladder: Any) -> Any:
    def unseen(*args: Any) -> Tensor:
        with torch._C.DisableTorchFunction():
            return way(*args)

    model = lively_model("llama", getattr(torch, dtype))
    with attention_of(model, unseen):
        return kvdrift.audit(model, prompts=PROMPTS, span=3, ladder=ladder)


def codes(audit: Any) -> set[str]:
    return {caveat["code"] for caveat in audit.view["caveats"]}


matrix = pytest.mark.matrix


@pytest.mark.parametrize(
    ("kernel", "dtype", "ladder"),
    [
        (Sage(), "float32", "model"),
        (Sage(queries=64, keys=64, values="float16"), "bfloat16", "off"),
        (Sage(queries=64, keys=64), "float16", "model"),
        (Sage(queries=4, keys=4), "float16", "off"),
        pytest.param(Sage(values="float16"), "bfloat16", "model", marks=matrix),
        pytest.param(Sage(values="float8"), "float32", "model", marks=matrix),
        pytest.param(Sage(values="float8"), "float16", "off", marks=matrix),
        pytest.param(Sage(queries=4, keys=4), "float32", "model", marks=matrix),
        pytest.param(Sage(queries=64), "float32", "model", marks=matrix),
        pytest.param(Sage(queries=128, keys=64), "bfloat16", "model", marks=matrix),
    ],
)
def test_keys_that_are_smoothed_and_rounded_to_8_bits_pass(kernel: Sage, dtype: str, ladder: Any) -> None:
    audit = audited(kernel, dtype, ladder)
    assert audit.exit_code == 0, (audit.first_failure, audit.evidence)
    assert ("OPERANDS_OF_8_BITS" in codes(audit)) == (ladder == "model")


RIGHT, BLOCKS = Sage(), Sage(queries=4, keys=4)


@pytest.mark.parametrize(
    ("way", "dtype", "ladder"),
    [
        (in_decode(replace(RIGHT, step=times(1.05)), RIGHT), "float32", "model"),
        (in_decode(replace(RIGHT, mean=of_another_head), RIGHT), "float16", "model"),
        (in_decode(replace(BLOCKS, step=of_the_block_before), BLOCKS), "bfloat16", "off"),
        (replace(RIGHT, step=times(1.05)), "float32", "model"),
        (in_decode(RIGHT, fine), "float32", "model"),
        pytest.param(in_decode(replace(RIGHT, step=times(1.05)), RIGHT), "bfloat16", "off", marks=matrix),
        pytest.param(in_decode(replace(RIGHT, mean=of_the_call_before), RIGHT), "float16", "off", marks=matrix),
        pytest.param(in_decode(replace(RIGHT, mean=of_the_call_before), RIGHT), "float32", "model", marks=matrix),
        pytest.param(
            in_decode(replace(BLOCKS, step=times(1.05, slice(4, 8))), BLOCKS), "float16", "model", marks=matrix
        ),
        pytest.param(
            in_decode(replace(RIGHT, step=times(1.05, heads=slice(1, 2))), RIGHT), "float16", "off", marks=matrix
        ),
        pytest.param(replace(RIGHT, mean=of_another_head), "float32", "model", marks=matrix),
        pytest.param(in_decode(fine, RIGHT), "float32", "model", marks=matrix),
        pytest.param(in_decode(RIGHT, fine), "float16", "off", marks=matrix),
    ],
)
def test_a_mean_a_step_or_a_factor_that_is_another_one_is_found(way: Attend, dtype: str, ladder: Any) -> None:
    audit = audited(way, dtype, ladder)
    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure.site == "attn_ctx"
    assert "OPERANDS_OF_8_BITS" not in codes(audit)


# --------------------------------------------------------------------------------------------- what is told by numbers


def operands_of(n_keys: int, position: int, dim: int = 16) -> tuple[Operands, tuple[Tensor, Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, 2, n_keys, dim, generator=draw, dtype=torch.float64) for _ in range(3))
    key = key + 2.0
    at = query[0, :, position].numpy()
    keys, values = (each[0].transpose(0, 1).numpy() for each in (key, value))
    return Operands(at, keys, values, np.arange(n_keys), position, AttentionSpec(scale=0.25), is_alone=False), (
        query,
        key,
        value,
    )


def left_by(way: Way, operands: Operands, context: np.ndarray[Any, Any]) -> float:
    error = np.linalg.norm(context - attend(operands).context)
    return float(np.linalg.norm(context - attend(way.of(operands, context)).context) / error)


@pytest.mark.parametrize(
    ("kernel", "way"),
    [
        (Sage(), Way("int8", is_smoothed=True)),
        (Sage(queries=16, keys=16), Way("int8", is_smoothed=True, block=16, in_blocks=True)),
        (Sage(queries=32, values="float16"), Way("int8", is_smoothed=True, in_blocks=True, values="float16")),
        (
            Sage(keys=256, values="float8"),
            Way("int8", is_smoothed=True, block=0, values="float8 by channel", weights="float8"),
        ),
    ],
)
def test_the_way_in_which_a_kernel_rounds_leaves_least(kernel: Sage, way: Way) -> None:
    operands, tensors = operands_of(60, 50)
    context = kernel(*tensors, 0.25)[0, 50].numpy()
    found = {each: left_by(each, operands, context) for each in ways(60)}
    assert found[way] <= 0.05
    assert min(found.values()) >= found[way] - 0.01


def test_a_step_that_is_fitted_takes_up_no_factor() -> None:
    """The step of a query rounds it, and makes it no larger: a score scale that is off by 2 % leaves
    twice what the ladder lets a way leave."""
    operands, tensors = operands_of(40, 30)
    way = Way("int8", is_smoothed=True, in_blocks=True)
    right, wrong = (Sage(queries=16)(*tensors, 0.25 * factor)[0, 30].numpy() for factor in (1.0, 1.02))
    assert left_by(way, operands, right) <= 0.05
    assert left_by(way, operands, wrong) >= 2.0 / 8.0


@pytest.mark.parametrize(("beside", "is_taken"), [(0.2, True), (1.5, False)])
def test_a_way_that_leaves_most_of_an_error_is_not_taken(beside: float, is_taken: bool) -> None:
    operands, _ = operands_of(60, 50)
    rounded = attend(Way("int8").of(operands, np.zeros(0))).context
    error = rounded - attend(operands).context
    noise = np.random.default_rng(4).standard_normal(error.shape)
    noise *= beside * np.linalg.norm(error) / np.linalg.norm(noise)
    passes = ("prefill", "decode")
    _, allowed = as_8_bits(
        dict.fromkeys(passes, operands), dict.fromkeys(passes, rounded + noise), "float32", None, Kernel()
    )
    assert (allowed > 0.0) == is_taken


def test_others_are_looked_for_in_vain_so_often_and_no_more() -> None:
    kernel = Kernel()
    assert [*kernel.others(30)] == [*ways(30)]
    first, *_ = ways(30)
    kernel.note(first)
    assert first not in kernel.others(30)
    for _ in range(4):
        kernel.note(None)
    assert not [*kernel.others(30)]
    assert kernel.known == [first]


def test_operands_without_keys_or_with_nan_are_rounded_to_no_error() -> None:
    empty = Operands(np.ones((2, 4)), np.ones((0, 1, 4)), np.ones((0, 1, 4)), np.arange(0), 3, AttentionSpec(scale=1.0))
    broken = empty.changed(keys=np.full((2, 1, 4), np.nan), values=np.ones((2, 1, 4)), slots=np.arange(2))
    zeros = broken.changed(query=np.zeros((2, 4)), keys=np.zeros((2, 1, 4)))
    with np.errstate(invalid="ignore"):
        for way in ways(8):
            assert attend(way.of(empty, np.zeros(8))).context.shape == (2, 4)
            assert np.isnan(attend(way.of(broken, np.zeros(8))).context).all()
            assert np.isfinite(attend(way.of(zeros.changed(is_alone=False), np.zeros(8))).context).all()
