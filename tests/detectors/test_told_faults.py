"""Faults of decode in decoders of one's own are told by what lies around them.

Rows of other layers, results of experts, and operands of prefill where a kernel shows none. Each has a right twin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvdrift
from kvdrift.pipeline.audit import Audit
from tests.support.own_decoder import (
    DIM,
    PROMPTS,
    WIDTH,
    Attention,
    Decoder,
    Layer,
    by_query_head,
    causal,
    engine,
    plain,
)

PASSES = (kvdrift.Verdict.EXACT, kvdrift.Verdict.STRUCTURAL_DRIFT)


def _audited(layers: list[Layer], **options: Any) -> Audit:
    made = engine(Decoder(layers), torch.bfloat16, n_layers=len(layers))
    return kvdrift.audit(made, prompts={"p": PROMPTS["p"]}, span=3, **options)


# ----------------------------------------------------------------------------------- kernels that show no operands

Change = Callable[[dict[str, Any]], None]


def _hidden(change: Change | None) -> Callable[..., Tensor]:
    """Attention of which a decode step shows nothing, as a compiled kernel: by numpy, on operands that were changed."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        if not decoding:
            return plain(query, keys, values, start, decoding)
        wide = np.float64 if query.dtype == torch.float64 else np.float32
        rows = [query, by_query_head(keys), by_query_head(values)]
        q, k, v = (row.detach().double().numpy().astype(wide)[0] for row in rows)
        call = {"q": q, "k": k, "v": v, "scale": DIM**-0.5, "cap": None, "seen": np.ones(k.shape[1], dtype=bool)}
        if change is not None:
            change(call)
        scores = np.einsum("hqd,hkd->hqk", call["q"], call["k"]) * call["scale"]
        scores = scores if call["cap"] is None else call["cap"] * np.tanh(scores / call["cap"])
        scores = np.where(call["seen"], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        context = np.einsum("hqk,hkd->hqd", weights / weights.sum(-1, keepdims=True), call["v"])
        return torch.from_numpy(context)[None].to(query.dtype)

    return core


def _set(name: str, value: Callable[[Any], Any]) -> Change:
    def change(call: dict[str, Any]) -> None:
        call[name] = value(call[name])

    return change


def _other_slot(call: dict[str, Any]) -> None:
    call["k"][:, 4], call["v"][:, 4] = call["k"][:, 6].copy(), call["v"][:, 6].copy()


HIDDEN: dict[str, tuple[Change, tuple[str, ...]]] = {
    "scale": (_set("scale", lambda scale: 1.3 * scale), ("score_scale",)),
    "cap": (_set("cap", lambda _: 1.5), ("softcap_wrong",)),
    "last key": (_set("seen", lambda seen: np.arange(len(seen)) < len(seen) - 1), ("key_lost_last",)),
    "window": (_set("seen", lambda seen: np.arange(len(seen)) >= len(seen) - 5), ("window_too_short",)),
    "slot": (_other_slot, ("slot_aliased",)),
    "query heads": (_set("q", lambda q: np.roll(q, 1, axis=0)), ("q_heads_permuted",)),
    "kv heads": (_set("v", lambda v: v[[2, 3, 0, 1]]), ("head_group_wrong", "heads_tiled")),
    "noise": (_set("v", lambda v: v + np.cos(np.arange(v.size).reshape(v.shape) ** 2)), ("between_projections",)),
}


@pytest.mark.parametrize(
    "name", [name if name in ("cap", "noise") else pytest.param(name, marks=pytest.mark.matrix) for name in HIDDEN]
)
def test_what_a_kernel_does_with_operands_that_nobody_saw_is_named(name: str) -> None:
    change, causes = HIDDEN[name]
    audit = _audited([Layer(0), Layer(1, _hidden(change))])

    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, "attn_ctx")  # type: ignore[union-attr]
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause in causes, audit.diagnosis


def test_such_a_kernel_that_is_right_passes() -> None:
    assert _audited([Layer(0), Layer(1, _hidden(None))]).verdict in PASSES


# ------------------------------------------------------------------------------------------------ rows of other layers


class _Reads(Attention):
    """Attention of which decode steps read the rows of another layer of the cache, but for the new one."""

    other = 0

    def forward(self, x: Tensor, cache: list[Any], start: int) -> Tensor:
        kept = cache[self.number]
        if x.shape[1] == 1 and start > 0:
            cache[self.number] = cache[self.other]
        out = super().forward(x, cache, start)
        if x.shape[1] == 1 and start > 0:
            cache[self.number] = tuple(
                torch.cat([old, new[:, :, -1:]], dim=2) for old, new in zip(kept, cache[self.number], strict=True)
            )
        return out


class _ReadsLongBefore(_Reads):
    """The same with the rows of the layer in front of the last token once more: a layer that is right."""

    other = 3


@pytest.mark.parametrize("kind", [_Reads, _ReadsLongBefore])
def test_rows_of_a_layer_that_is_far_below_are_named(kind: type[_Reads]) -> None:
    layers = [Layer(n) for n in range(4)]
    layers[3].attention = kind(3)
    # A step has one token more in the layers below.
    audit = _shortened(layers) if kind is _Reads else _audited(layers)

    if kind is _ReadsLongBefore:
        assert audit.verdict in PASSES
        return
    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (3, "k_cache")  # type: ignore[union-attr]
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == "kv_of_other_layer", audit.diagnosis
    assert "of layer 0" in audit.diagnosis.text


def _shortened(layers: list[Layer]) -> Audit:
    """An audit of a decoder in which the last layer gets the rows below without their newest one."""
    attention = layers[3].attention
    original = attention.forward

    def forward(x: Tensor, cache: list[Any], start: int) -> Tensor:
        below = cache[0]
        if x.shape[1] == 1 and start > 0:
            cache[0] = tuple(rows[:, :, :-1] for rows in below)
        out = original(x, cache, start)
        cache[0] = below
        return out

    attention.forward = forward  # type: ignore[method-assign]
    return _audited(layers)


# ------------------------------------------------------------------------------------------------------------- experts


class _Experts(nn.Module):
    """Two of three experts for each token, and one beside them that every token goes to, with a gate of its own."""

    def __init__(self, fault: str | None) -> None:
        super().__init__()
        self.fault = fault
        self.router, self.shared_gate = nn.Linear(WIDTH, 3, bias=False), nn.Linear(WIDTH, 1, bias=False)
        self.experts, self.shared_expert = nn.ModuleList(_expert() for _ in range(3)), _expert()

    def forward(self, x: Tensor) -> Tensor:
        fault = self.fault if x.shape[1] == 1 else None
        weights, chosen = torch.softmax(self.router(x), -1).topk(2, -1)
        if fault != "not normalised":
            weights = weights / weights.sum(-1, keepdim=True)
        if fault == "second left out":
            weights = weights * torch.tensor([1.0, 0.0], dtype=weights.dtype)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            taken = chosen == number
            tokens = taken.any(-1)
            if tokens.any():
                out[tokens] += expert(x[tokens]) * (weights * taken).sum(-1)[tokens][:, None]
        beside = self.shared_expert(x) * (1.0 if fault == "gate lost" else torch.sigmoid(self.shared_gate(x)))
        total: Tensor = out + (0.0 * beside if fault == "shared left out" else beside)
        return total


def _expert() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.SiLU(), nn.Linear(WIDTH, WIDTH, bias=False))


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("shared left out", "shared_expert_missing"),
        ("gate lost", "shared_expert_weight"),
        ("second left out", "expert_missing"),
        ("not normalised", "expert_weights"),
    ],
)
@pytest.mark.parametrize("ladder", ["model", pytest.param("off", marks=pytest.mark.matrix)])
def test_the_expert_that_decode_adds_otherwise_is_named(fault: str, cause: str, ladder: Any) -> None:
    layers = [Layer(0), Layer(1)]
    layers[1].mlp = _Experts(fault)  # type: ignore[assignment]
    audit = _audited(layers, ladder=ladder)

    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, "mlp_out")  # type: ignore[union-attr]
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == cause, audit.diagnosis


def test_right_experts_pass() -> None:
    layers = [Layer(0), Layer(1)]
    layers[1].mlp = _Experts(None)  # type: ignore[assignment]
    assert _audited(layers).verdict in PASSES


class _Gated(nn.Module):
    """A gated part without experts, whose gate is called so."""

    def __init__(self, *, is_faulty: bool) -> None:
        super().__init__()
        self.is_faulty = is_faulty
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x)) if self.is_faulty and x.shape[1] == 1 else F.silu(self.gate(x))
        out: Tensor = self.down(gate * self.up(x))
        return out


@pytest.mark.parametrize("is_faulty", [True, False])
def test_a_gate_without_experts_is_no_router(is_faulty: bool) -> None:
    layers = [Layer(0), Layer(1)]
    layers[1].mlp = _Gated(is_faulty=is_faulty)  # type: ignore[assignment]
    audit = _audited(layers)

    assert (audit.verdict in PASSES) is not is_faulty
    if is_faulty:
        assert audit.diagnosis is not None
        assert audit.diagnosis.cause == "between_products", audit.diagnosis


# ------------------------------------------------------------------------------------------------- rows of decode's own


class _Latent(nn.Module):
    """Latent attention: the cache keeps normed latent rows, from which the keys and values of all slots are made."""

    rank = 12

    def __init__(self, *, is_faulty: bool) -> None:
        super().__init__()
        self.is_faulty = is_faulty
        self.q_proj, self.kv_a = nn.Linear(WIDTH, 4 * DIM, bias=False), nn.Linear(WIDTH, self.rank, bias=False)
        self.kv_norm = nn.RMSNorm(self.rank, eps=1e-6)
        self.k_up, self.v_up = (nn.Linear(self.rank, 4 * DIM, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(4 * DIM, WIDTH, bias=False)

    def forward(self, x: Tensor, cache: list[Any], start: int) -> Tensor:
        latent = self.kv_a(x)
        if not (self.is_faulty and x.shape[1] == 1 and start > 0):
            latent = self.kv_norm(latent)
        rows = latent if cache[1] is None else torch.cat([cache[1][0][:, 0], latent], dim=1)
        cache[1] = rows[:, None], rows[:, None]
        query, keys, values = (
            torch.unflatten(each, -1, (-1, DIM)).transpose(1, 2)
            for each in (self.q_proj(x), self.k_up(rows), self.v_up(rows))
        )
        context = F.scaled_dot_product_attention(query, keys, values, attn_mask=causal(query, keys, start))
        out: Tensor = self.o_proj(context.transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("is_faulty", [True, False])
def test_a_norm_in_front_of_the_cache_that_is_left_out_is_told_by_the_products_around_it(is_faulty: bool) -> None:
    """Part of the new row differs, or all of it; it is not stale, since decode wrote it."""
    layers = [Layer(0), Layer(1)]
    layers[1].attention = _Latent(is_faulty=is_faulty)  # type: ignore[assignment]
    audit = _audited(layers)

    assert (audit.verdict in PASSES) is not is_faulty
    if is_faulty:
        assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, "k_cache")  # type: ignore[union-attr]
        assert audit.diagnosis is not None
        assert audit.diagnosis.cause == "between_projections", audit.diagnosis
        assert audit.diagnosis.shape is not None
