"""The attention interface of transformers, watched: q, K, V, mask and scale as handed to attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from kvdrift.engines.torch.attention import AttentionTap
from kvdrift.engines.torch.derived import derive_scores
from kvdrift.engines.torch.frames import Frame, Reads, ScoreRows
from kvdrift.engines.torch.masks import Reach, as_tensor, biases, tells_padding
from kvdrift.vocabulary.facts import AttentionSpec

OnCall = Callable[[Tensor, Tensor], None]  # of the query and the values of a call

# Tensors that the attention interface may be handed and that change no score.
_HARMLESS = {"position_ids", "cache_position", "attention_mask"}


def _spec(query: Tensor, mask: object, options: Mapping[str, Any]) -> AttentionSpec:
    """Read how attention is called: the names are those of the attention interface."""
    scale, sinks = options.get("scaling"), options.get("s_aux")
    softcap, window = options.get("softcap"), options.get("sliding_window")
    return AttentionSpec(
        scale=float(scale) if scale is not None else query.shape[-1] ** -0.5,
        softcap=None if softcap is None else float(softcap),
        window=None if window is None else int(window),
        sinks=tuple(float(sink) for sink in sinks.flatten().double()) if isinstance(sinks, Tensor) else None,
        is_biased=(isinstance(mask, Tensor) and mask.is_floating_point() and biases(mask)) or _has_unknown(options),
    )


def _has_unknown(options: Mapping[str, Any]) -> bool:
    """Whether attention is handed numbers of which nothing is known here, such as a bias by position."""
    return any(
        isinstance(value, Tensor) and value.is_floating_point()
        for name, value in options.items()
        if name not in _HARMLESS and name != "s_aux"
    )


def _reach(frame: Frame, module: nn.Module, mask: object, n_keys: int, options: Mapping[str, Any]) -> Reach | None:
    """Which keys a kernel sees that gets no mask of places, and so knows them by itself, as those of flash attention
    do: the last token of a call is that of the last key. None: its mask says which."""
    is_causal = options.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not is_causal or not (mask is None or tells_padding(mask, frame.n_rows)):
        return None
    window = options.get("sliding_window")
    return Reach(n_keys - frame.q_len if frame.first is None else frame.first, None if window is None else int(window))


def _derived(frame: Frame, query: Tensor, key: Tensor, *, given: object, **options: Any) -> ScoreRows | None:
    """The scores and probabilities that follow from a call of the interface with the mask `given`. It is looked at
    here, since most calls have a softmax that is seen."""
    return derive_scores(frame, query, key, mask=as_tensor(given, frame.n_rows, query), **options)


@contextmanager
def watched_interface(current_tap: Callable[[], AttentionTap], on_call: OnCall | None = None) -> Iterator[None]:
    """Wrap every attention function that models look up while the context is open.

    The look-up itself is wrapped, not the registry: names, configurations and functions that a caller registered stay
    as they are. `on_call` hears of calls outside any frame, for the survey.
    """
    from transformers import AttentionInterface

    # Looked up by string: mypy must not see an assignment to a method, and only this class is touched.
    name = "get_interface"
    original = getattr(AttentionInterface, name)
    own = AttentionInterface.__dict__.get(name)

    def get_interface(self: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return _watch(original(self, *args, **kwargs), current_tap, on_call)

    setattr(AttentionInterface, name, get_interface)
    try:
        yield
    finally:
        if own is None:
            delattr(AttentionInterface, name)
        else:
            setattr(AttentionInterface, name, own)


def _watch(
    function: Callable[..., Any],
    current_tap: Callable[[], AttentionTap],
    on_call: OnCall | None,
) -> Callable[..., Any]:
    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        frame = current_tap().frame
        if frame is None or frame.module is not module:
            if on_call is not None:
                on_call(query, value)
            return function(module, query, key, value, *args, **kwargs)
        reads = frame.on_plant(frame, Reads(query, key, value))
        frame.on_inputs(frame, reads)
        assert reads.query is not None
        assert reads.key is not None
        assert reads.value is not None
        query, key, value = reads.query, reads.key, reads.value
        mask = args[0] if args else kwargs.get("attention_mask")
        scaling, softcap = kwargs.get("scaling"), kwargs.get("softcap")
        frame.on_spec(frame, _spec(query, mask, kwargs))
        sinks = kwargs.get("s_aux")
        frame.sinks = sinks if isinstance(sinks, Tensor) else None
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        frame.operands = query, key, float(scale)
        frame.derive = partial(
            _derived,
            frame,
            given=mask,
            reach=_reach(frame, module, mask, key.shape[2], kwargs),
            scale=scale,
            softcap=softcap,
            sinks=frame.sinks,
        )
        frame.fallback = partial(frame.derive, query, key)
        out = function(module, query, key, value, *args, **kwargs)
        context = out[0] if isinstance(out, tuple) else out
        if isinstance(context, Tensor):
            frame.values, frame.context = value, context
            frame.on_context(frame, context)
        return out

    return attention


__all__ = ["watched_interface"]
