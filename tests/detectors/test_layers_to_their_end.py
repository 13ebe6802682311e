"""Without the ladder a layer counts as judged if something behind its attention was."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from tests.support.own_decoder import PROMPTS, WIDTH, Attention, Core, Decoder, RMSNorm, by_query_head, engine, plain


def _rounded_otherwise(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
    """Decode keeps its scores and probabilities in float32, so that every row of its context has other bits."""
    if not decoding or query.dtype == torch.float64:
        return plain(query, keys, values, start, decoding)
    scores = query.float() @ by_query_head(keys).float().mT * query.shape[-1] ** -0.5
    context: Tensor = scores.softmax(-1) @ by_query_head(values).float() * (1.0 + 2.0**-8)
    return context.to(query.dtype)


class Bare(nn.Module):
    """A layer whose feed-forward part is no module; that of layer 1 is too large in decode, where there is a fault."""

    def __init__(self, number: int, core: Core, is_faulty: bool) -> None:
        super().__init__()
        self.norm, self.attention = RMSNorm(), Attention(number, core)
        self.up, self.down = nn.Parameter(torch.zeros(WIDTH, WIDTH)), nn.Parameter(torch.zeros(WIDTH, WIDTH))
        self.is_faulty = is_faulty

    def forward(self, x: Tensor, cache: list[Any], start: int) -> Tensor:
        decoding = x.shape[1] == 1 and start > 0
        x = x + self.attention(self.norm(x), cache, start)
        inner = F.silu(F.linear(F.rms_norm(x, (WIDTH,)), self.up))
        return x + F.linear(inner, self.down) * (1.2 if self.is_faulty and decoding else 1.0)


def _audit(core: Core = plain, *, is_faulty: bool = False) -> Audit:
    layers = [Bare(n, core, is_faulty and n == 1) for n in range(2)]
    return kvdrift.audit(engine(Decoder(layers), torch.bfloat16), prompts=PROMPTS, span=2, ladder="off")


def test_a_fault_behind_attention_is_found_at_the_output_of_its_layer() -> None:
    audit = _audit(is_faulty=True)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, "layer_out")


def test_a_layer_of_which_nothing_is_known_behind_its_attention_is_no_pass() -> None:
    """Where attention differs by rounding, the inputs of what follows are not the same bits."""
    assert _audit().verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
    for is_faulty in (False, True):
        audit = _audit(_rounded_otherwise, is_faulty=is_faulty)
        assert audit.verdict is Verdict.INCONCLUSIVE
        assert "behind their attention" in audit.view["hypotheses"]["conclusion"]
