"""Scores and probabilities that follow from the operands of an attention call, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvdrift.engines.torch.frames import Frame, Lane, ScoreRows
from kvdrift.engines.torch.masks import Reach, hide_masked
from kvdrift.engines.torch.operands import are_rounded


class SdpaCall(NamedTuple):
    """The arguments of `scaled_dot_product_attention`, with its names and defaults."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


def saw_sdpa(frame: Frame, call: SdpaCall) -> None:
    query, key = call.query, call.key
    if query.ndim != 4 or query.shape[0] != frame.n_rows:
        return
    if frame.kernel is None:
        frame.kernel = _kernel_name(call)
    scale = call.scale or query.shape[-1] ** -0.5
    if frame.operands is not None and are_rounded(*frame.operands, (query, key, scale)):
        query, key, scale = frame.operands
    reach = Reach() if call.is_causal else None  # torch counts from the first key, whatever was cached
    derived = derive_scores(frame, query, key, mask=call.attn_mask, reach=reach, scale=scale)
    if derived is not None:
        frame.seen.append(derived)


def _kernel_name(call: SdpaCall) -> str:
    """Name the SDPA backend that torch will choose; the choice is its own, asked through the function it uses."""
    choose = getattr(torch, "_fused_sdp_choice", None)
    if choose is None:
        return "sdpa"
    try:
        chosen = choose(*call[:6], scale=call.scale, enable_gqa=call.enable_gqa)
    except (RuntimeError, TypeError):
        return "sdpa"
    names = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "overrideable"}
    return f"sdpa:{names.get(int(chosen), chosen)}"


def derive_scores(
    frame: Frame,
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None,
    reach: Reach | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> ScoreRows | None:
    """Compute the probed rows of scores and probabilities in float64 from the operands of an attention call.

    `query` is [row of the batch, head, token, dim] and `key` [row of the batch, kv head, key, dim]. A single token may
    come with the query heads of a group in the place of the token axis, as transformers packs them for grouped-query
    attention. `mask` broadcasts to [row of the batch, head, token, key], from the right, as torch lets it. `reach`
    hides keys by place. `sinks` [head] are further scores that take their share of the
    probabilities, as keys without values. The result has [token, head, key], scores in logits, and is None if the
    operands are not those of the probed tokens. A NaN among the operands makes its scores NaN, and all probabilities of
    their row.
    """
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    parts = []
    for lane in frame.lanes:
        rows = None if mask is None else mask[lane.row if mask.shape[0] > 1 else 0]
        part = _derive_lane(frame, lane, query[lane.row], key[lane.row], rows, reach, scale, softcap)
        if part is None:
            return None
        parts.append(part)
    scores = joined(parts)
    if scores is None:
        return None
    probs = torch.softmax(_with_sinks(scores, sinks), dim=-1)[..., : scores.shape[-1]]
    return ScoreRows(scores.to(frame.wide), probs.to(frame.wide), measured=False)


def _derive_lane(
    frame: Frame,
    lane: Lane,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    reach: Reach | None,
    scale: float,
    softcap: float | None,
) -> Tensor | None:
    """Return the scores [token, head, key] of one row of the batch in float64."""
    packed = frame.q_len == 1 and query.shape[1] > 1
    if packed and frame.n_heads is not None and query.shape[0] * query.shape[1] != frame.n_heads:
        return None  # a caller's own function feeds the kernel something else than this token's heads
    if not packed:
        if query.shape[1] != frame.q_len:
            return None
        query = query[:, lane.row_index]  # first: a prompt has many tokens, and few of them are recorded
    q, k = query.double(), key.double()
    if q.shape[0] % k.shape[0]:
        return None
    k = k.repeat_interleave(q.shape[0] // k.shape[0], dim=0)
    scores = torch.matmul(q, k.transpose(1, 2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    keys = k.shape[1]
    if reach is not None:
        tokens = lane.row_index if not packed else torch.zeros(1, dtype=torch.int64, device=q.device)
        scores = scores.masked_fill(reach.hides(tokens, keys), -torch.inf)
    if mask is not None:
        rows = mask[..., :keys]
        if rows.shape[-1] not in (1, keys):
            return None  # not the mask of these keys, so these are not the operands of this call
        if not packed and rows.shape[-2] == frame.q_len:
            rows = rows[:, lane.row_index]
        scores = scores.masked_fill(~rows, -torch.inf) if rows.dtype == torch.bool else scores + rows.double()
        scores = hide_masked(scores, rows.dtype)
    if packed:
        scores = scores.reshape(-1, 1, keys)
    return scores.transpose(0, 1)


def _with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Append each head's sink to its rows of `scores` [row, head, key]."""
    if sinks is None or sinks.numel() != scores.shape[1]:
        return scores
    column = sinks.reshape(1, -1, 1).to(scores.dtype).expand(scores.shape[0], -1, 1)
    return torch.cat([scores, column], dim=-1)


def joined(parts: list[Tensor]) -> Tensor | None:
    return torch.cat(parts).contiguous() if parts else None
