"""A decode kernel that fills its tile with rows of zeros behind the query: right ones pass, and faults are found."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvdrift.engines.torch.attended import rows_of_padding
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import Site
from tests.support.matrix import further
from tests.support.own_decoder import SCALE, Core, audited, by_query_head, plain


def in_a_tile(rows: int, *, by_kernel: bool, factor: float = 1.0, lost: int = 0) -> Core:
    """Attention whose decode steps hand the kernel so many rows, of which one is the query."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        if not decoding:
            return plain(query, keys, values, start, decoding)
        tile = F.pad(query * factor, (0, 0, 0, rows - 1))
        keys, values = by_query_head(keys), by_query_head(values)
        seen = (torch.arange(keys.shape[2]) >= lost).expand(rows, -1)
        if by_kernel:
            return F.scaled_dot_product_attention(tile, keys, values, attn_mask=seen)[:, :, :1]
        scores = (tile @ keys.mT * SCALE).masked_fill(~seen, -torch.inf)
        return torch.matmul(scores.softmax(-1), values)[:, :, :1]

    return core


@pytest.mark.parametrize(
    ("rows", "by_kernel", "dtype"),
    [
        (8, True, torch.bfloat16),
        (8, False, torch.bfloat16),
        *further((16, False, torch.float32), (2, True, torch.float16)),
    ],
)
def test_rows_of_zeros_behind_a_query_are_not_recorded(rows: int, by_kernel: bool, dtype: torch.dtype) -> None:
    audit = audited(in_a_tile(rows, by_kernel=by_kernel), dtype)

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), (audit.first_failure, audit.decision.reasons)


@pytest.mark.parametrize(
    ("factor", "lost", "site"), [(1.1, 0, Site.Q_ROPE), (1.0, 1, Site.ATTN_SCORES)], ids=["query", "key"]
)
@pytest.mark.parametrize("by_kernel", [True, pytest.param(False, marks=pytest.mark.matrix)])
def test_a_fault_of_such_a_kernel_is_found(factor: float, lost: int, site: Site, by_kernel: bool) -> None:
    audit = audited(in_a_tile(8, by_kernel=by_kernel, factor=factor, lost=lost), torch.bfloat16)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (1, site)


def test_rows_behind_the_tokens_are_padding_only_if_they_hold_zeros() -> None:
    """Query heads of a group may stand in the axis of tokens."""
    query = torch.zeros(1, 2, 4, 8)
    query[:, :, 0] = 1.0
    assert rows_of_padding(query, 1) == 3
    assert rows_of_padding(query, 4) == 0
    for value in (1e-30, float("nan")):
        query[0, 1, 2, 5] = value
        assert rows_of_padding(query, 1) == 0
