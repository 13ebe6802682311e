"""Decoders that nobody of the project wrote: what they do in ways of their own passes, and its faults are found.

Each way is a class of computations that no library shares; beside each stands a fault of the same code.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from tests.support.foreign import DIM, FAULTY, HEADS, HIDDEN, Attention, Norm, engine_of, rotated, wide

pytestmark = pytest.mark.xdist_group("foreign_code")

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12]}
PASSES = (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)


class Windowed(Attention):
    """Keys behind a window of 6 stay in the cache, hidden by a mask."""

    def visible(self, start: int, tokens: int) -> Tensor:
        seen = torch.arange(start + tokens)[None] > torch.arange(start, start + tokens)[:, None] - self.window(tokens)
        return super().visible(start, tokens) & seen

    def window(self, tokens: int) -> int:
        return 6


class WiderInDecode(Windowed):
    def window(self, tokens: int) -> int:
        return 7 if tokens == 1 else 6


class Chunked(Attention):
    """A token sees the keys of its own chunk of 8 alone (Llama 4)."""

    def visible(self, start: int, tokens: int) -> Tensor:
        own = torch.arange(start, start + tokens)[:, None] // 8 == torch.arange(start + tokens)[None] // 8
        return super().visible(start, tokens) & (own | (tokens == 1 and self.forgets))

    forgets = False


class ChunkForgotten(Chunked):
    forgets = True


class Sinks(Attention):
    """One more column of scores for each head, behind the keys (gpt-oss), and less the largest of its row."""

    def build(self) -> None:
        super().build()
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def weighed(self, scores: Tensor, v: Tensor) -> Tensor:
        if self.loses(scores.shape[2]):
            return super().weighed(scores, v)
        column = self.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        both = torch.cat([scores, column], -1)
        return torch.softmax(both - both.amax(-1, keepdim=True), -1)[..., :-1].to(v.dtype) @ v

    def loses(self, tokens: int) -> bool:
        return False


class SinksLost(Sinks):
    def loses(self, tokens: int) -> bool:
        return tokens == 1


class Pages(Attention):
    """Pages of 4 slots; decode hands them on in the order in which a table lists them."""

    def read(self, rows: dict[str, Tensor], length: int, tokens: int) -> tuple[Tensor, Tensor]:
        k, v = super().read(rows, length, tokens)
        if tokens > 1:
            return k, v
        order = [*range(4, 8), *range(4), *range(8, length)]
        return k[:, :, order], v[:, :, self.of_values(order)]

    def of_values(self, order: list[int]) -> list[int]:
        return order


class PagesOfKeysAlone(Pages):
    def of_values(self, order: list[int]) -> list[int]:
        return sorted(order) if self.index == FAULTY else order


class RotatedWhereRead(Attention):
    """Keys are stored as they are, and rotated where they are read: decode counts all positions from another token."""

    of_keys, of_queries = 3, 3

    def turn(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotated(q, positions + (self.of_queries if len(positions) == 1 else 0)), k

    def read(self, rows: dict[str, Tensor], length: int, tokens: int) -> tuple[Tensor, Tensor]:
        k, v = super().read(rows, length, tokens)
        return rotated(k, torch.arange(length) + (self.of_keys if tokens == 1 else 0)), v


class KeysRotatedAlone(RotatedWhereRead):
    of_queries = 0


class OneHeadRotated(Attention):
    """One head of queries stands at the next position."""

    def turn(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        right, key = super().turn(q, k, positions)
        if len(positions) > 1:
            return right, key
        return torch.cat([right[:, :2], rotated(q[:, 2:3], positions + 1), right[:, 3:]], 1), key


class Fused(Attention):
    """Decode reads norm and projections from one kernel: neither the norm nor a projection is called."""

    def project(self, x: Tensor, norm: Norm) -> tuple[Tensor, ...]:
        if x.shape[1] > 1:
            return super().project(x, norm)
        h = wide(x)
        root = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return tuple((h @ (wide(made.weight) * self.of(made, norm)).T * root).to(x.dtype) for made in self.made())

    def of(self, made: nn.Module, norm: Norm) -> Tensor:
        return wide(norm.weight)


class FusedWithoutAWeight(Fused):
    """The weight of the norm is not part of the keys' matrix."""

    def of(self, made: nn.Module, norm: Norm) -> Tensor:
        bare = made is self.k_proj and self.index == FAULTY
        return torch.ones_like(wide(norm.weight)) if bare else wide(norm.weight)


class Capped(Attention):
    """Scores under a cap that nothing but the code knows."""

    def scored(self, scores: Tensor) -> Tensor:
        return scores if self.loses(scores.shape[2]) else 5.0 * torch.tanh(scores / 5.0)

    def loses(self, tokens: int) -> bool:
        return False


class CapLost(Capped):
    def loses(self, tokens: int) -> bool:
        return tokens == 1


class CappedInDecodeAlone(Capped):
    def loses(self, tokens: int) -> bool:
        return tokens > 1


class ByHand(Attention):
    """Decode takes its weights from `exp`, so that no softmax is seen."""

    def weighed(self, scores: Tensor, v: Tensor) -> Tensor:
        if scores.shape[2] > 1:
            return super().weighed(scores, v)
        weights = self.powers(scores - scores.amax(-1, keepdim=True))
        return (weights @ v.to(weights.dtype)) / weights.sum(-1, keepdim=True)

    def powers(self, x: Tensor) -> Tensor:
        return torch.exp(x)


class CoarsePowers(ByHand):
    """Powers of two by a straight line between whole exponents."""

    def powers(self, x: Tensor) -> Tensor:
        whole = torch.floor(x * 1.4426950408889634)
        return torch.where(
            torch.isfinite(x), torch.ldexp(1.0 + x * 1.4426950408889634 - whole, whole.clamp(min=-90).int()), 0.0
        )


class Grouped(Attention):
    """Decode hands its kernel each kv head once, and prefill a copy for each query head."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        if q.shape[2] > 1:
            return super().attend(q, k, v, visible)
        return F.scaled_dot_product_attention(q, self.of_groups(k), v, enable_gqa=True)

    def of_groups(self, k: Tensor) -> Tensor:
        return k


class GroupsExchanged(Grouped):
    def of_groups(self, k: Tensor) -> Tensor:
        return k.flip(1) if self.index == FAULTY else k


class Latent(Attention):
    """Keys and values are expanded from latent rows in prefill; decode attends to the latent rows (DeepSeek-V2)."""

    rank, turned = 24, 8

    def build(self) -> None:
        self.q_proj = nn.Linear(HIDDEN, HEADS * (DIM + self.turned), bias=False)
        self.k_down = nn.Linear(HIDDEN, self.rank + self.turned, bias=False)
        self.latent_norm = Norm(self.rank)
        self.kv_up = nn.Linear(self.rank, HEADS * 2 * DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * DIM, HIDDEN, bias=False)

    @classmethod
    def new_rows(cls, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            "latent": torch.zeros(1, length, cls.rank, dtype=dtype),
            "turned": torch.zeros(1, 1, length, cls.turned, dtype=dtype),
        }

    def forward(self, x: Tensor, rows: dict[str, Tensor], start: int, norm: Norm) -> Tensor:
        x = norm(x)
        tokens, length = x.shape[1], start + x.shape[1]
        positions = torch.arange(start, length)
        q = self.q_proj(x).view(1, tokens, HEADS, -1).transpose(1, 2)
        plain, turned = q[..., :DIM], rotated(q[..., DIM:], positions)
        down = self.k_down(x)
        rows["latent"][:, start:length] = self.latent_norm(down[..., : self.rank])
        rows["turned"][:, :, start:length] = rotated(down[:, None, :, self.rank :], positions)
        latent, keys = rows["latent"][:, :length], self.turned_keys(rows["turned"][:, :, :length], tokens)
        of_keys, of_values = self.kv_up.weight.view(HEADS, 2, DIM, self.rank).unbind(1)
        scale = (DIM + self.turned) ** -0.5
        if tokens > 1:
            k, v = self.kv_up(latent).view(1, length, HEADS, 2, DIM).permute(3, 0, 2, 1, 4)
            k = torch.cat([k, keys.expand(1, HEADS, length, self.turned)], -1)
            scores = wide(torch.cat([plain, turned], -1)) @ wide(k).mT * scale
            context = super().weighed(scores.masked_fill(~self.visible(start, tokens), -torch.inf), v)
        else:
            inward = torch.einsum("bhtd,hdr->bhtr", plain, of_keys)
            scores = torch.einsum("bhtr,bnr->bhtn", wide(inward), wide(latent)) + wide(turned) @ wide(keys).mT
            weights = torch.softmax(scores * scale, -1).to(x.dtype)
            context = torch.einsum("bhtr,hdr->bhtd", weights @ latent[:, None], of_values)
        out: Tensor = self.o_proj(context.transpose(1, 2).reshape(1, tokens, -1))
        return out

    def turned_keys(self, keys: Tensor, tokens: int) -> Tensor:
        return keys


class LatentOfTheWidthOfHeads(Latent):
    """Latent rows are as wide as a query of prefill."""

    rank = DIM


class LatentTurnLost(Latent):
    def turned_keys(self, keys: Tensor, tokens: int) -> Tensor:
        return torch.zeros_like(keys) if tokens == 1 and self.index == FAULTY else keys


RIGHT: tuple[type[Attention], ...] = (
    Windowed,
    Chunked,
    Sinks,
    Pages,
    RotatedWhereRead,
    Fused,
    Capped,
    ByHand,
    Grouped,
    Latent,
    LatentOfTheWidthOfHeads,
)
CORE = (Windowed, Sinks, Pages, RotatedWhereRead, Fused, Latent)
# Where each fault begins, and the causes that are right for it; none where values of another form tell no cause.
FAULTS: dict[type[Attention], tuple[int, str, tuple[str, ...]]] = {
    WiderInDecode: (0, "attn_scores", ("window_off_by_one",)),
    ChunkForgotten: (0, "attn_scores", ("mask_leak",)),
    SinksLost: (0, "attn_probs", ("sink_missing",)),
    PagesOfKeysAlone: (FAULTY, "k_cache", ("slot_aliased", "slots_swapped", "slots_shifted", "v_permuted")),
    FusedWithoutAWeight: (FAULTY, "k_cache", ("between_projections",)),
    KeysRotatedAlone: (0, "k_cache", ("rope_position_offset_k",)),
    OneHeadRotated: (0, "q_rope", ("rope_position_offset", "rope_position_offset_q")),
    CapLost: (0, "attn_scores", ("softcap_missing",)),
    CappedInDecodeAlone: (0, "attn_scores", ("softcap_wrong",)),
    CoarsePowers: (0, "attn_ctx", ("exp_approximated",)),
    GroupsExchanged: (FAULTY, "k_cache", ("kv_heads_permuted", "blocks_permuted", "head_group_wrong")),
    LatentTurnLost: (FAULTY, "attn_scores", ()),
}


_WAYS = {way.__name__: way for way in [*RIGHT, *FAULTS]}


@cache
def _audited(way: str, dtype: str) -> Audit:
    return kvdrift.audit(engine_of(_WAYS[way], getattr(torch, dtype)), prompts=PROMPTS, span=3)


def audited(attention: type[Attention], dtype: str = "bfloat16") -> Audit:
    return _audited(attention.__name__, dtype)


@pytest.mark.parametrize(
    ("attention", "dtype"),
    [
        pytest.param(way, dtype, marks=[] if way in CORE and dtype == "bfloat16" else [pytest.mark.matrix])
        for way in RIGHT
        for dtype in ("bfloat16", "float16", "float32")
    ],
)
def test_a_right_way_of_ones_own_passes(attention: type[Attention], dtype: str) -> None:
    audit = audited(attention, dtype)

    assert audit.verdict in PASSES, (audit.first_failure, audit.view["reasons"])


@pytest.mark.parametrize(
    "attention",
    [
        pytest.param(
            way,
            marks=[]
            if way in (WiderInDecode, SinksLost, KeysRotatedAlone, CapLost, LatentTurnLost)
            else [pytest.mark.matrix],
        )
        for way in FAULTS
    ],
)
def test_a_fault_of_such_code_is_found_where_it_begins(attention: type[Attention]) -> None:
    audit, (layer, site, causes) = audited(attention), FAULTS[attention]

    assert audit.verdict is Verdict.MISMATCH
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (layer, site)  # type: ignore[union-attr]
    assert audit.diagnosis is not None
    if causes:
        assert audit.diagnosis.cause in causes, audit.diagnosis
    else:
        assert audit.diagnosis.cause == "unexplained", audit.diagnosis
    if audit.diagnosis.cause in ("unexplained", "between_projections"):
        assert audit.diagnosis.shape is not None


def test_attention_in_two_forms_is_named() -> None:
    caveats = {item["code"]: item["text"] for item in audited(Latent).view["caveats"]}

    assert "q_rope, k_cache, v_cache are of other shapes in decode" in caveats["OTHER_FORM"]
    assert "TRACE_OFFSET" not in caveats
    assert "OTHER_FORM" not in {item["code"] for item in audited(Windowed).view["caveats"]}


def test_a_fused_kernel_is_named_and_without_a_ladder_it_is_not_a_pass() -> None:
    caveats = {item["code"]: item["text"] for item in audited(Fused).view["caveats"]}
    assert "one pass alone shows q_proj, k_proj, v_proj in 3 layers" in caveats["FUSED"]
    assert "TRACE_OFFSET" not in caveats

    alone = kvdrift.audit(engine_of(Fused), prompts=PROMPTS, span=3, ladder="off")
    assert alone.verdict is Verdict.INCONCLUSIVE
    assert "are shown by one pass alone" in alone.decision.reasons[0]
    assert alone.view["recommendations"][0].startswith("Run it again with the precision ladder")


def test_queries_and_keys_that_are_turned_alike_are_named() -> None:
    caveats = {item["code"]: item["text"] for item in audited(RotatedWhereRead).view["caveats"]}

    assert "turned alike against those of prefill in 3 layers, the first 0" in caveats["OTHER_FRAME"]
    assert "OTHER_FRAME" not in {item["code"] for item in audited(Windowed).view["caveats"]}


def test_the_order_of_pages_is_no_difference_and_that_of_keys_alone_is_one() -> None:
    def differing(way: type[Attention]) -> int:
        measured = audited(way).suite.judged.measured
        rows = measured.table.select("kv_aligned", "float64")
        return int((rows.is_at(*(site for site in kvdrift.Site if site == "k_cache")) & (rows.rel_l2 > 1e-3)).sum())

    assert differing(Pages) == 0
    assert differing(PagesOfKeysAlone) > 0
