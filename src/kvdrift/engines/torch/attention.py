"""What attention reads and computes, seen from outside of any kernel.

By a torch function mode, the `softmax` or `scaled_dot_product_attention` call that attention makes is watched while a
forward pass runs. An engine may also say what attention was called with (its own interface) and what went into its
cache. The innermost one wins: what a kernel really receives is the truth about scores, whatever the function around it
was told.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kvdrift.engines.torch.alike import made_alike
from kvdrift.engines.torch.at_kernel import at_product, at_sdpa, at_shown, at_softmax
from kvdrift.engines.torch.attended import PRODUCTS, SDPA, SOFTMAX, axis_of
from kvdrift.engines.torch.derived import SdpaCall, joined, saw_sdpa
from kvdrift.engines.torch.frames import Frame, ScoreRows
from kvdrift.engines.torch.masks import least_score
from kvdrift.engines.torch.shown import ShownKernel

_TO_FLOAT32 = Tensor.float
# What is looked at inside an attention module, and where nothing but the calls of torch tells what it is called with.
_LOOKED_AT = SOFTMAX | {SDPA}
_LOOKED_AT_KERNEL = _LOOKED_AT | PRODUCTS


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
    float64, so that a float64 run is one throughout.

    Each call that is seen costs as much as a small operation. Without `unpin` none matters but those of an attention
    module, so that the tap watches while there is such a frame (`during`), and no longer; `throughout` makes it watch
    all calls as well, for what depends on being watched.
    """

    def __init__(self, *, unpin: bool, throughout: bool = False) -> None:
        super().__init__()
        self._unpin = unpin
        self._throughout = unpin or throughout
        self._at_rest = False
        self._is_watching = False
        self._frame: Frame | None = None

    @property
    def frame(self) -> Frame | None:
        """The attention module that runs now, None outside of one."""
        return self._frame

    def open(self, frame: Frame) -> None:
        """Watch the calls of an attention module, as far as its scores are wanted."""
        self._frame = frame
        self._watch(frame.want_scores and not self._throughout)

    def close(self) -> Frame | None:
        """Return the attention module that ran, None if there was none; its calls are no longer watched."""
        frame, self._frame = self._frame, None
        self._watch(False)
        return frame

    def _watch(self, on: bool) -> None:
        if on and not self._is_watching:
            self.__enter__()  # type: ignore[no-untyped-call]
        elif self._is_watching and not on:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._is_watching = on

    def during(self) -> AbstractContextManager[object]:
        """Return what a forward pass runs in: the tap itself where it has to see all calls."""
        return self if self._throughout else nullcontext()

    def rest(self, at_rest: bool) -> None:
        """Lift nothing while a layer runs that keeps its own dtype."""
        self._at_rest = at_rest

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Every operation of a pass comes through here, so that each look at its arguments counts.
        if kwargs is None:
            kwargs = {}
        frame = self._frame
        looked_at = _LOOKED_AT if frame is None or not frame.at_kernel else _LOOKED_AT_KERNEL
        looks = frame is not None and frame.want_scores and func in looked_at
        if isinstance(func, ShownKernel):
            return self._shown(func, args, kwargs)
        if not looks and not self._unpin:
            return func(*args, **kwargs)
        if self._unpin and not self._at_rest:
            if func is _TO_FLOAT32:
                func = Tensor.double
            if kwargs and kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
            for arg in args:
                if arg is torch.float32:
                    args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
                    break
        if not looks or frame is None:
            return self.called_by_the_model(func, args, kwargs)
        if func is SDPA:
            if frame.at_kernel:
                return at_sdpa(frame, args, kwargs)
            saw_sdpa(frame, SdpaCall(*args, **kwargs))
        if frame.at_kernel and func in PRODUCTS:
            return at_product(frame, func, args, kwargs)
        out = self.called_by_the_model(func, args, kwargs)
        if func in SOFTMAX:
            scores = args[0] if args else kwargs["input"]
            axis = axis_of(args, kwargs)
            seen = at_softmax(frame, scores, out, axis) if frame.at_kernel else (scores, out)
            _saw_softmax(frame, *seen)
        return out

    def _shown(self, func: ShownKernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Call a kernel that shows its operands; of what it calls itself only casts are looked at."""
        frame, self._frame = self._frame, None
        try:
            with self if self._unpin else nullcontext():
                if frame is None or not (frame.at_kernel and frame.want_scores):
                    return func.kernel(*args, **kwargs)
                return at_shown(frame, func, args, kwargs)
        finally:
            self._frame = frame

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
    if frame.scored is not None and frame.at_kernel:
        heads = frame.scored.pair.left.shape[1]  # a call may have some of the heads
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
    return joined([matrix[lane.row][:, lane.row_index].transpose(0, 1) for lane in frame.lanes])
