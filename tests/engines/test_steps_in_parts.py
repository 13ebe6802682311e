"""Steps that run their model chunk by chunk, or with tokens behind those that were asked for: seen as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kvdrift
from kvdrift.errors import CaptureError
from kvdrift.vocabulary.evidence import Verdict
from tests.support.matrix import further
from tests.support.own_decoder import PROMPTS, Decoder, Layer, engine

PASSES = (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
Run = Callable[[Decoder, Tensor, list[Any], int], Tensor]


def drop_behind(cache: list[Any], length: int) -> None:
    cache[:] = [None if rows is None else tuple(each[:, :, :length] for each in rows) for rows in cache]


def in_chunks(size: int, moved: int = 0) -> Run:
    """Chunk by chunk; a fault counts the positions of later chunks from `moved` on."""

    def run(model: Decoder, ids: Tensor, cache: list[Any], start: int) -> Tensor:
        parts = [
            model(part, cache, start + at * size + (moved if at else 0))
            for at, part in enumerate(torch.split(ids, size, 1))
        ]
        return torch.cat(parts, 1)

    return run


def without_the_key_before(model: Decoder, ids: Tensor, cache: list[Any], start: int) -> Tensor:
    """Chunks of 4 tokens, each of which forgets the last key of the one before."""
    parts = []
    for at, part in enumerate(torch.split(ids, 4, 1)):
        parts.append(model(part, cache, start + 4 * at))
        if ids.shape[1] > 1:
            for rows in cache:
                for each in rows:
                    each[:, :, -1] = 0.0
    return torch.cat(parts, 1)


def padded(many: int, *, few: int = 1, stays: bool = False) -> Run:
    """Prefills are filled up to a multiple of `many` tokens and decode steps to `few`; a fault lets the rows of the
    padding stay in the cache."""

    def run(model: Decoder, ids: Tensor, cache: list[Any], start: int) -> Tensor:
        n = ids.shape[1]
        logits: Tensor = model(F.pad(ids, (0, -n % (many if n > 1 else few)), value=1), cache, start)
        drop_behind(cache, start + n + stays * (n == 1))
        return logits[:, :n]

    return run


def audited(run: Run, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = Decoder([Layer(n) for n in range(2)])
    own = engine(model, dtype)
    own.step = lambda ids, cache, start: run(model, ids, cache, start)
    return kvdrift.audit(own, prompts=PROMPTS, span=2, **options)


@pytest.mark.parametrize(
    ("run", "dtype", "ladder"),
    [
        (in_chunks(4), torch.float32, "model"),
        (padded(8), torch.bfloat16, "off"),
        (padded(1, few=4), torch.float32, "model"),
        *further(
            (in_chunks(16), torch.float32, "model"),
            (in_chunks(3), torch.bfloat16, "off"),
            (in_chunks(8), torch.float16, "model"),
            (padded(16), torch.float32, "model"),
            (padded(8, few=4), torch.bfloat16, "model"),
        ),
    ],
)
def test_a_step_in_parts_passes(run: Run, dtype: torch.dtype, ladder: str) -> None:
    audit = audited(run, dtype, ladder=ladder)

    assert audit.verdict in PASSES, (audit.first_failure, audit.decision.reasons)
    assert "11 to 15 keys" in repr(audit) or "12 to 15 keys" in repr(audit) or "12 to 16 keys" in repr(audit)


@pytest.mark.parametrize(
    ("run", "dtype", "ladder"),
    [
        (in_chunks(4, moved=1), torch.float32, "model"),
        (padded(8, few=4, stays=True), torch.float32, "model"),
        *further(
            (without_the_key_before, torch.float32, "model"),
            (without_the_key_before, torch.bfloat16, "off"),
            (padded(8, few=4, stays=True), torch.bfloat16, "model"),
            (in_chunks(8, moved=1), torch.bfloat16, "model"),
        ),
    ],
)
def test_a_fault_of_a_step_in_parts_is_found(run: Run, dtype: torch.dtype, ladder: str) -> None:
    assert audited(run, dtype, ladder=ladder).verdict is Verdict.MISMATCH


class WithTable(Decoder):
    """A decoder that is called with a table before its tokens, whose length says nothing of them."""

    def forward(self, table: Tensor, *args: Any) -> Tensor:
        return super().forward(*args)


@pytest.mark.parametrize("length", [1, 16])
def test_what_does_not_count_tokens_is_no_part(length: int) -> None:
    model = WithTable([Layer(n) for n in range(2)])
    own = engine(model)
    own.step = lambda ids, cache, start: model(torch.arange(length), ids, cache, start)
    audit = kvdrift.audit(own, prompts=PROMPTS, span=2)

    assert audit.verdict in PASSES, (audit.first_failure, audit.decision.reasons)


class OneModule(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.ones(64, 8))

    def forward(self, ids: Tensor, cache: Any, start: int) -> Tensor:
        return self.weights[ids] @ self.weights.mT


def test_a_model_of_one_module_is_told_what_to_pass_instead() -> None:
    own = kvdrift.TorchEngine(OneModule(), step=OneModule(), new_cache=lambda most: [])
    with pytest.raises(CaptureError, match=r"OneModule is one module without parts.*pass a kvdrift\.Engine"):
        kvdrift.audit(own, prompts=PROMPTS)
