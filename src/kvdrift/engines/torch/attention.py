"""What attention reads and computes, seen from outside of any kernel.

By a torch function mode, the `softmax` or `scaled_dot_product_attention` call that attention makes is watched while a
forward pass runs. An engine may also say what attention was called with (its own interface) and what went into its
cache. The innermost one wins: what a kernel really receives is the truth about scores, whatever the function around it
was told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kvdrift.engines.base import Sink
from kvdrift.engines.torch.alike import made_alike
from kvdrift.engines.torch.attended import (
    PRODUCTS,
    SDPA,
    SOFTMAX,
    OperandPair,
    by_head,
    scores_product,
    values_product,
    with_copy,
)
from kvdrift.engines.torch.masks import biases, hide_masked, least_score
from kvdrift.engines.torch.operands import are_of_rounded, are_rounded
from kvdrift.engines.torch.scored import Scored, scored_by
from kvdrift.engines.torch.softmax import MOST_SPANS, weighs_keys
from kvdrift.vocabulary.facts import AttentionSpec

_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_TO_FLOAT32 = Tensor.float

# Products that may make scores are kept up to so many.
_MOST_PRODUCTS = 4


@dataclass(slots=True)
class ScoreRows:
    """Scores and probabilities of the probed rows, [row, head, key]; `measured` tells whether the model computed them
    itself or they were derived from the operands of its kernel."""

    scores: Tensor
    probs: Tensor
    measured: bool


@dataclass(frozen=True, slots=True)
class Lane:
    """One recorded row of a batch: which one, the slots of padding before its tokens, and what of it is recorded.

    `row_index` are the places of `positions` among the tokens of the call.
    """

    row: int
    pad: int
    positions: tuple[int, ...]
    row_index: Tensor
    sink: Sink


@dataclass(slots=True)
class Reads:
    """What attention reads: query [row, head, token, dim], key and value [row, kv head, key, dim]; None: not seen."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None


@dataclass(slots=True)
class Frame:
    """One attention module while it runs.

    `at_kernel` says that nothing tells what attention is called with but the calls of torch themselves, which are then
    recorded, and changed for the positive control.
    """

    layer: int
    module: nn.Module
    q_len: int
    lanes: tuple[Lane, ...]
    n_rows: int
    n_heads: int | None
    on_inputs: Callable[[Frame, Reads], None]
    on_context: Callable[[Frame, Tensor], None]
    on_spec: Callable[[Frame, AttentionSpec], None]
    on_plant: Callable[[Frame, Reads], Reads]
    wide: torch.dtype  # dtype in which scores are kept
    want_scores: bool = True
    seen: list[ScoreRows] = field(default_factory=list)
    fallback: Callable[[], ScoreRows | None] | None = None
    derive: Callable[[Tensor, Tensor], ScoreRows | None] | None = None  # the same of another query and other keys
    operands: tuple[Tensor, Tensor, float] | None = None  # query, key and scale that attention was called with
    kernel: str | None = None
    kv_len: int | None = None
    sinks: Tensor | None = None
    spec: AttentionSpec | None = None
    values: Tensor | None = None
    context: Tensor | None = None
    at_kernel: bool = False
    products: list[OperandPair] = field(default_factory=list)  # those that may be of queries and keys
    scored: Scored | None = None  # what of them the softmax that was seen weighs

    def score_rows(self) -> ScoreRows | None:
        """Return the rows of the one matching softmax or SDPA call; with none or several of them, or one that did not
        weigh the keys, those derived from the arguments of the attention interface."""
        seen = self.seen[0] if len(self.seen) == 1 else None
        if seen is not None and not self._weighs_something_else(seen) and not self._follows_from_rounded(seen):
            return seen
        return self.fallback() if self.fallback is not None else None

    def _follows_from_rounded(self, rows: ScoreRows) -> bool:
        """Whether scores in float32 are those of operands that were rounded once more on the way."""
        derive = self.derive
        if derive is None or self.operands is None or not rows.measured or rows.scores.dtype.itemsize <= 2:
            return False

        def derived(query: Tensor, key: Tensor) -> Tensor | None:
            found = derive(query, key)
            return None if found is None else found.scores

        return are_of_rounded(rows.scores, *self.operands, derived)

    def _weighs_something_else(self, rows: ScoreRows) -> bool:
        """Whether the softmax that was seen is none of the keys, such as one over partial results."""
        keys, columns = self.kv_len, rows.scores.shape[-1]
        values, context = self.values, self.context
        if not rows.measured or self.fallback is None or keys is None or columns == keys > MOST_SPANS:
            return False
        if values is None or context is None or values.ndim != 4 or context.ndim != 4:
            return False
        if values.shape[2] != keys or rows.probs.shape[1] != context.shape[2] or context.shape[2] % values.shape[1]:
            return False
        return not weighs_keys(
            rows.scores,
            rows.probs,
            self._derived,
            [values[lane.row] for lane in self.lanes],
            [context[lane.row][lane.row_index] for lane in self.lanes],
        )

    def _derived(self) -> tuple[Tensor, Tensor] | None:
        """Scores and probabilities that follow from the arguments of the attention interface."""
        derived = None if self.fallback is None else self.fallback()
        return None if derived is None else (derived.scores, derived.probs)


def _without_sinks(frame: Frame, scores: Tensor, probs: Tensor, sinks: Tensor) -> ScoreRows:
    """Cut off the last column, the sink's, and add back what was taken off each row before its softmax: the largest
    score, the sink's included.

    That constant changes no probability and depends on what else is in the row, so that it would look like a fault of
    every score. The sink's own column tells it; where that is lost, the scores that follow from the operands do. The
    result is rounded as the model's is.
    """
    wide = scores.double()
    shift = sinks.detach().flatten().double()[None, :, None] - wide[..., -1:]
    wide = wide[..., :-1]
    derived = None if torch.isfinite(shift).all() or frame.fallback is None else frame.fallback()
    if derived is not None and derived.scores.shape == wide.shape:
        seen = torch.isfinite(derived.scores) & (wide > least_score(scores.dtype))
        gap = torch.where(seen, derived.scores.double() - wide, 0.0).sum(-1, keepdim=True)
        shift = torch.where(torch.isfinite(shift), shift, gap / seen.sum(-1, keepdim=True).clamp(min=1))
    shift = torch.where(torch.isfinite(shift), shift, 0.0)
    return ScoreRows((wide + shift).to(scores.dtype), probs[..., :-1], measured=True)


class AttentionTap(TorchFunctionMode):
    """Watches torch calls during a forward pass; with `unpin`, casts that pin an operation to float32 are lifted to
    float64, so that a float64 run is one throughout."""

    def __init__(self, *, unpin: bool) -> None:
        super().__init__()
        self._unpin = unpin
        self._at_rest = False
        self.frame: Frame | None = None

    def rest(self, at_rest: bool) -> None:
        """Lift nothing while a layer runs that keeps its own dtype."""
        self._at_rest = at_rest

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Every operation of a pass comes through here, so that each look at its arguments counts.
        if kwargs is None:
            kwargs = {}
        if self._unpin and not self._at_rest:
            if func is _TO_FLOAT32:
                func = Tensor.double
            if kwargs and kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
            for arg in args:
                if arg is torch.float32:
                    args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
                    break
        frame = self.frame
        if frame is None or not frame.want_scores:
            return self.called_by_the_model(func, args, kwargs)
        if func is SDPA:
            if frame.at_kernel:
                return _at_sdpa(frame, args, kwargs)
            _saw_sdpa(frame, _SdpaCall(*args, **kwargs))
        if frame.at_kernel and func in PRODUCTS and not kwargs:
            return _at_product(frame, func, args)
        out = self.called_by_the_model(func, args, kwargs)
        if func in SOFTMAX:
            scores = args[0] if args else kwargs["input"]
            if frame.at_kernel:
                _at_softmax(frame, scores)
            _saw_softmax(frame, scores, out)
        return out

    def called_by_the_model(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function. A lifted value may meet one that some code keeps in float32: both are made alike. The lowest
        number of float64, which masks are made of, has no place in a tensor of the default dtype."""
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            if not self._unpin or self._at_rest or "out" in kwargs:  # what is written into a copy would be lost
                raise
            if func is torch.full and "dtype" not in kwargs:
                return func(*args, **kwargs, dtype=torch.float64)
            alike = made_alike(func, (*args, *kwargs.values()))
            if alike is None:
                raise
        return func(*alike[: len(args)], **dict(zip(kwargs, alike[len(args) :], strict=True)))


def _at_sdpa(frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the kernel, and record what it is called with and what it gives."""
    given = dict(zip(_SDPA_ARGUMENTS, args, strict=False)) | kwargs
    query = given["query"]
    if query.ndim != 4 or query.shape[0] != frame.n_rows or frame.kv_len is not None:
        return SDPA(*args, **kwargs)
    reads = frame.on_plant(frame, Reads(query, given["key"], given["value"]))
    frame.on_inputs(frame, reads)
    given |= {"query": reads.query, "key": reads.key, "value": reads.value}
    mask, scale = given.get("attn_mask"), given.get("scale")
    biased = isinstance(mask, Tensor) and mask.is_floating_point() and biases(mask)
    frame.on_spec(frame, AttentionSpec(float(scale or query.shape[-1] ** -0.5), is_biased=biased))
    _saw_sdpa(frame, _SdpaCall(**given))
    context = SDPA(**given)
    frame.on_context(frame, context.transpose(1, 2))
    return context


def _at_product(frame: Frame, func: Any, args: tuple[Any, ...]) -> Any:
    """Call a product, and record it if it is one of queries and keys, or of probabilities and values.

    Which product makes the scores is known when they go through a softmax; the positive control is planted before.
    """
    if frame.scored is not None:
        found = values_product(func, args, frame.n_rows, frame.q_len, frame.scored.pair.right.shape[2])
        if found is None:
            return func(*args)
        reads = frame.on_plant(frame, Reads(value=found.right))
        frame.on_inputs(frame, reads)
        value = reads.value
        if value is not found.right and value is not None:
            args = with_copy(func, args, 1)
            written = values_product(func, args, frame.n_rows, frame.q_len, value.shape[2])
            assert written is not None
            written.right.copy_(value)
        out = func(*args)
        context = by_head(out, found)
        if context is not None:
            frame.on_context(frame, context)
        frame.scored = None
        frame.products.clear()
        return out
    found = scores_product(func, args, frame.n_rows, frame.q_len)
    if found is None:
        return func(*args)
    planted = frame.on_plant(frame, Reads(found.left, found.right))
    for index, (before, after) in enumerate(((found.left, planted.query), (found.right, planted.key))):
        if after is not None and after is not before:
            args = with_copy(func, args, index)
            written = scores_product(func, args, frame.n_rows, frame.q_len)
            assert written is not None
            (written.left, written.right)[index].copy_(after)
    is_whole = planted.query is not None and planted.key is not None
    frame.products.append(OperandPair(planted.query, planted.key) if is_whole else found)  # type: ignore[arg-type]
    del frame.products[:-_MOST_PRODUCTS]
    return func(*args)


def _at_softmax(frame: Frame, scores: Tensor) -> None:
    """Record the queries and keys whose product went into a softmax, and how they were scored on the way."""
    if frame.kv_len is not None or frame.scored is not None or not frame.products or scores.ndim < 3:
        return
    with torch._C.DisableTorchFunction():
        frame.scored = scored = scored_by(frame.products, scores)
    if scored is None:
        return
    frame.on_inputs(frame, Reads(scored.pair.left, scored.pair.right))
    has_sink = scores.shape[-1] > scored.pair.right.shape[2]
    if scored.scale is not None and (scored.sinks is not None or not has_sink):
        frame.on_spec(frame, AttentionSpec(scored.scale, sinks=scored.sinks))


def _saw_softmax(frame: Frame, scores: Tensor, probs: Tensor) -> None:
    rows = _select_rows(frame, scores), _select_rows(frame, probs)
    if rows[0] is None or rows[1] is None:
        return
    frame.kernel = frame.kernel or "softmax"
    if frame.sinks is not None and frame.sinks.numel() == rows[0].shape[1] and _ends_in_sink(frame, rows[0]):
        frame.seen.append(_without_sinks(frame, rows[0], rows[1], frame.sinks))
        return
    n_keys = rows[0].shape[-1] if frame.kv_len is None else min(frame.kv_len, rows[0].shape[-1])
    keys = slice(0, n_keys) if frame.scored is None else frame.scored.keys
    frame.seen.append(ScoreRows(rows[0][..., keys], rows[1][..., keys], measured=True))


def _ends_in_sink(frame: Frame, scores: Tensor) -> bool:
    """Whether the last column of `scores` is the sink's. Sinks may also come in behind the softmax, as a factor of the
    output; then the last column is a key, and nearer to the score of that key than to the sink.

    A constant that was taken off each row is measured on the other columns.
    """
    if frame.kv_len is None or frame.sinks is None or scores.shape[-1] != frame.kv_len or frame.fallback is None:
        return True
    derived = frame.fallback()
    if derived is None or derived.scores.shape != scores.shape or scores.shape[-1] < 2:
        return True
    if bool((scores[..., -1] < least_score(scores.dtype)).any()):
        return False  # a key may be masked, the sink is not
    wide, wanted = scores.double(), derived.scores.double()
    seen = torch.isfinite(wanted[..., :-1]) & (wide[..., :-1] > least_score(scores.dtype))
    gap = torch.where(seen, wanted[..., :-1] - wide[..., :-1], 0.0).sum(-1) / seen.sum(-1).clamp(min=1)
    last = wide[..., -1] + gap
    sinks = frame.sinks.detach().flatten().double()[None]
    return bool((last - sinks).abs().sum() < (last - wanted[..., -1]).abs().sum())


def _select_rows(frame: Frame, value: Tensor) -> Tensor | None:
    """Return [row, head, key] of the probed rows, those of one lane after the other, or None if this is not the score
    matrix of the frame's tokens."""
    heads, n_rows = frame.n_heads, frame.n_rows
    if value.ndim == 4 and value.shape[0] == n_rows and value.shape[2] == frame.q_len:
        matrix = value
    elif value.ndim == 3 and value.shape[1] == frame.q_len and value.shape[0] % n_rows == 0:
        matrix = value.reshape(n_rows, -1, *value.shape[1:])
    elif frame.q_len == 1 and value.ndim >= 3 and heads and value[..., 0].numel() == n_rows * heads:
        matrix = value.reshape(n_rows, heads, 1, -1)
    else:
        return None
    if heads is not None and matrix.shape[1] != heads:
        return None
    return _joined([matrix[lane.row][:, lane.row_index].transpose(0, 1) for lane in frame.lanes])


def _joined(parts: list[Tensor]) -> Tensor | None:
    return torch.cat(parts).contiguous() if parts else None


class _SdpaCall(NamedTuple):
    """The arguments of `scaled_dot_product_attention`, with its names and defaults."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


def _saw_sdpa(frame: Frame, call: _SdpaCall) -> None:
    query, key = call.query, call.key
    if query.ndim != 4 or query.shape[0] != frame.n_rows:
        return
    if frame.kernel is None:
        frame.kernel = _kernel_name(call)
    scale = call.scale or query.shape[-1] ** -0.5
    if frame.operands is not None and are_rounded(*frame.operands, (query, key, scale)):
        query, key, scale = frame.operands
    derived = derive_scores(frame, query, key, mask=call.attn_mask, is_causal=call.is_causal, scale=scale)
    if derived is not None:
        frame.seen.append(derived)


def _kernel_name(call: _SdpaCall) -> str:
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
    is_causal: bool,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> ScoreRows | None:
    """Compute the probed rows of scores and probabilities in float64 from the operands of an attention call.

    `query` is [row of the batch, head, token, dim] and `key` [row of the batch, kv head, key, dim]. A single token may
    come with the query heads of a group in the place of the token axis, as transformers packs them for grouped-query
    attention. `mask` broadcasts to [row of the batch, head, token, key], from the right, as torch lets it. `is_causal`
    is aligned to the top left, as torch defines it. `sinks` [head] are further scores that take their share of the
    probabilities, as keys without values. The result has [token, head, key], scores in logits, and is None if the
    operands are not those of the probed tokens. A NaN among the operands makes its scores NaN, and all probabilities of
    their row.
    """
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    parts = []
    for lane in frame.lanes:
        rows = None if mask is None else mask[lane.row if mask.shape[0] > 1 else 0]
        part = _derive_lane(frame, lane, query[lane.row], key[lane.row], rows, is_causal, scale, softcap)
        if part is None:
            return None
        parts.append(part)
    scores = _joined(parts)
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
    is_causal: bool,
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
    if is_causal:
        hidden = torch.arange(keys, device=q.device)[None, :] > lane.row_index[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
    if mask is not None:
        rows = mask[..., :keys]
        if rows.shape[-1] not in (1, keys):
            return None  # not the mask of these keys, so these are not the operands of this call
        if not packed and rows.shape[-2] == frame.q_len:
            rows = rows[:, lane.row_index]
        scores = scores.masked_fill(~rows, -torch.inf) if rows.dtype == torch.bool else scores + rows.double()
    scores = hide_masked(scores, torch.float32 if mask is None else mask.dtype)
    if packed:
        scores = scores.reshape(-1, 1, keys)
    return scores.transpose(0, 1)


def _with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Append each head's sink to its rows of `scores` [row, head, key]."""
    if sinks is None or sinks.numel() != scores.shape[1]:
        return scores
    column = sinks.reshape(1, -1, 1).to(scores.dtype).expand(scores.shape[0], -1, 1)
    return torch.cat([scores, column], dim=-1)
