"""Operands of a kernel that were rounded once more are told from operands that are other ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvdrift.engines.torch.operands import are_rounded

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SCALE = 24**-0.5
Operands = tuple[Tensor, Tensor, float]


def operands(dtype: torch.dtype, n_keys: int = 9) -> Operands:
    random = torch.Generator().manual_seed(n_keys)
    query = torch.randn(1, 4, 1, 24, generator=random, dtype=torch.float64)
    key = torch.randn(1, 2, n_keys, 24, generator=random, dtype=torch.float64)
    return query.to(dtype), key.to(dtype), SCALE


def repeated(key: Tensor) -> Tensor:
    return key.repeat_interleave(2, dim=1)


def wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def prescaled(query: Tensor, key: Tensor, scale: float) -> Operands:
    return (wide(query) * (scale * 1.1)).to(query.dtype), repeated(key), 1.0 / 1.1


def smoothed(query: Tensor, key: Tensor, scale: float) -> Operands:
    return query, repeated((wide(key) - wide(key).mean(2, keepdim=True)).to(key.dtype)), scale


def cast(query: Tensor, key: Tensor, scale: float) -> Operands:
    narrow = torch.float16 if query.dtype != torch.float16 else torch.bfloat16
    return query.to(narrow), repeated(key).to(narrow), scale


def both(query: Tensor, key: Tensor, scale: float) -> Operands:
    return prescaled(query, key, scale)[0], smoothed(query, key, scale)[1], 1.0 / 1.1


@pytest.mark.parametrize("n_keys", [2, 5, 60])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [prescaled, smoothed, cast, both])
def test_one_more_rounding_is_seen(change: Callable[..., Operands], dtype: torch.dtype, n_keys: int) -> None:
    called = operands(dtype, n_keys)

    assert are_rounded(*called, change(*called))


def stale_slot(query: Tensor, key: Tensor, scale: float) -> Operands:
    key = key.clone()
    key[:, :, 3] = key[:, :, 2]
    return query, repeated(key), scale


def stale_slot_smoothed(query: Tensor, key: Tensor, scale: float) -> Operands:
    return smoothed(*stale_slot(query, key, scale)[:1], stale_slot(query, key, scale)[1][:, ::2], scale)


def one_element(query: Tensor, key: Tensor, scale: float) -> Operands:
    query, key, scale = prescaled(query, key, scale)
    query[0, 1, 0, 5] *= 1.0 + 8.0 * torch.finfo(query.dtype).eps
    return query, key, scale


FAULTS: dict[str, Callable[..., Operands]] = {
    "scale": lambda q, k, s: (q, repeated(k), s * 1.001),
    "scale by one in ten thousand": lambda q, k, s: (q, repeated(k), s * 1.0001),
    "scale under smoothed keys": lambda q, k, s: (q, smoothed(q, k, s)[1], s * 1.0001),
    "prescaled by another scale": lambda q, k, s: (prescaled(q, k, s * 1.001)[0], repeated(k), 1.0 / 1.1),
    "query": lambda q, k, s: ((wide(q) * 1.003).to(q.dtype), repeated(k), s),
    "keys": lambda q, k, s: (q, repeated((wide(k) * 1.003).to(k.dtype)), s),
    "keys by a percent": lambda q, k, s: (q, repeated((wide(k) * 1.01).to(k.dtype)), s),
    "heads tiled": lambda q, k, s: (q, k.repeat(1, 2, 1, 1), s),
    "order": lambda q, k, s: (q, repeated(k.flip(2)), s),
    "key lost": lambda q, k, s: (q, repeated(k)[:, :, 1:], s),
    "rotated elsewhere": lambda q, k, s: (q.roll(1, -1), repeated(k), s),
    "stale slot": stale_slot,
    "stale slot under smoothed keys": stale_slot_smoothed,
    "one element": one_element,
    "NaN": lambda q, k, s: (prescaled(q, k, s)[0] * float("nan"), repeated(k), 1.0 / 1.1),
    "NaN among smoothed keys": lambda q, k, s: (q, smoothed(q, k, s)[1] * float("nan"), s),
    "no scale": lambda q, k, s: (q, repeated(k), 0.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAULTS)
def test_other_operands_are_not_a_rounding(name: str, dtype: torch.dtype) -> None:
    called = operands(dtype)

    assert not are_rounded(*called, FAULTS[name](*called))


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_a_group_may_stand_where_tokens_do(dtype: torch.dtype) -> None:
    query, key, scale = operands(dtype)
    packed = prescaled(query, key, scale)[0].reshape(1, 2, 2, 24)

    assert are_rounded(query, key, scale, (packed, key, 1.0 / 1.1))
    assert not are_rounded(query, key, scale, (packed.flip(2), key, 1.0 / 1.1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_are_not_a_rounding(dtype: torch.dtype) -> None:
    query, key, scale = operands(dtype)

    assert not are_rounded(query, key, scale, (query.clone(), repeated(key), scale))
