"""Several adapters in one projection, of which a row takes one: their products stand inside attention, and have
operands as those of queries and keys have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from tests.support.matrix import further
from tests.support.own_decoder import PROMPTS, Decoder, Layer, engine


class SeveralAdapters(nn.Module):
    """Adds the update of the adapter that each row asks for; `forgets` that of another one in a decode step."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.forgets = base, False
        self.down = nn.Parameter(0.1 * torch.randn(3, 4, base.in_features))
        self.up = nn.Parameter(0.1 * torch.randn(3, base.out_features, 4))

    def forward(self, x: Tensor) -> Tensor:
        asked = torch.full((len(x),), 0 if self.forgets and x.shape[1] == 1 else 2)
        inner = torch.einsum("btf,brf->btr", x, self.down[asked])
        out: Tensor = self.base(x)
        return out + torch.einsum("btr,bor->bto", inner, self.up[asked])


def audited(attention: str, monkeypatch: pytest.MonkeyPatch, *, forgets: bool = False) -> Audit:
    if attention == "products":
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", by_products)
    model = Decoder([Layer(0), Layer(1)])
    torch.manual_seed(2)
    for layer in model.layers:
        for name in ("q_proj", "v_proj", "o_proj"):
            setattr(layer.attention, name, SeveralAdapters(getattr(layer.attention, name)))
    model.layers[1].attention.q_proj.forgets = forgets  # type: ignore[union-attr]
    return kvdrift.audit(engine(model), prompts=PROMPTS, span=2)


def by_products(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * (options.get("scale") or query.shape[-1] ** -0.5)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif options.get("is_causal"):
        scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype).triu(1)
    return torch.matmul(torch.softmax(scores, dim=-1), value)


@pytest.mark.parametrize("attention", ["kernel", *further("products")])
def test_products_of_adapters_are_not_taken_for_those_of_queries_and_keys(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The positive control changes what attention reads, and nothing that an adapter multiplies."""
    audit = audited(attention, monkeypatch)

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), audit.decision.reasons


def test_an_adapter_that_decode_takes_for_another_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    audit = audited("kernel", monkeypatch, forgets=True)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, "q_proj")
