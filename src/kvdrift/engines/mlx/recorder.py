"""Watches a model of mlx-lm: modules are called through a class of their own, attention through mx.fast.

An object of mlx stays what it is: only its class is another one while it is watched, whose call is the original one
with a look before and after it. So no path in the model changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import base
from numpy.typing import NDArray

from kvdrift.engines.base import Sink, require_planted
from kvdrift.engines.mlx.arrays import to_mlx, to_numpy
from kvdrift.engines.mlx.caches import slots_of
from kvdrift.trace.model import Array
from kvdrift.vocabulary.facts import AttentionSpec, Plant
from kvdrift.vocabulary.sites import Site

Floats = NDArray[np.float64]

_SEED = 20261  # of what layer inputs are changed by; any fixed number does

# What the parts of a layer are called in mlx-lm, by the site of their output.
_PARTS: dict[Site, tuple[str, ...]] = {
    Site.ATTN_NORM_OUT: ("input_layernorm", "attention_norm", "ln_1", "norm1", "operator_norm"),
    Site.ATTN_OUT: ("self_attn", "attention", "attn", "linear_attn", "mixer"),
    Site.MLP_OUT: ("mlp", "feed_forward", "block_sparse_moe", "ffn"),
}
_FFN_NORMS = ("pre_feedforward_layernorm", "pre_mlp_layernorm", "ffn_norm", "ln_2", "post_attention_layernorm")
_INSIDE: dict[Site, tuple[str, ...]] = {
    Site.Q_PROJ: ("q_proj", "wq"),
    Site.K_PROJ: ("k_proj", "wk"),
    Site.V_PROJ: ("v_proj", "wv"),
    Site.Q_NORM: ("q_norm", "q_layernorm", "query_norm"),
    Site.K_NORM: ("k_norm", "k_layernorm", "key_norm"),
}


@dataclass(slots=True)
class MLXCall:
    """One forward call that is being recorded: `start` tokens were cached before it, `probe` are positions."""

    start: int
    q_len: int
    probe: tuple[int, ...]
    sink: Sink | None
    replace: Mapping[int, Array]
    plant: Plant | None
    cache: Sequence[Any]
    was_planted: bool = False
    layer: int | None = None
    kv_len: int | None = None
    kernels: set[str] = field(default_factory=set)

    @property
    def rows(self) -> list[int]:
        return [position - self.start for position in self.probe]


class MLXRecorder:
    """Knows where each site of one model is read; idle until a call is armed."""

    def __init__(self, model: Any, layers: Sequence[Any], recorded: frozenset[int]) -> None:
        self._model, self._layers, self._recorded = model, layers, recorded
        self.call: MLXCall | None = None
        self.shift = 0.0
        self._axes: dict[tuple[int | None, Site], int] = {}
        self.is_surveying = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the model while the context is open."""
        with ExitStack() as stack:
            for index, layer in enumerate(self._layers):
                stack.enter_context(_watched(layer, self._enter(index), self._leave(index)))
                for module, site in _parts_of(layer):
                    before = self._reads(index, Site.RESID_ATTN) if site is Site.FFN_NORM_OUT else None
                    stack.enter_context(_watched(module, before, self._gives(index, site)))
            inner = _holder(self._model, self._layers)
            norm, embedding = (_child(inner, names) for names in (("norm", "ln_f"), ("embed_tokens", "wte")))
            if norm is not None:
                stack.enter_context(_watched(norm, self._final, self._gives(None, Site.FINAL_NORM_OUT)))
            if embedding is not None:
                stack.enter_context(_watched(embedding, None, self._gives(None, Site.EMBED_OUT)))
            stack.enter_context(_patched(mx.fast, "scaled_dot_product_attention", self._attend))
            stack.enter_context(_patched(mx.fast, "rms_norm", _wide_norm))
            stack.enter_context(_patched(base, "quantized_scaled_dot_product_attention", self._attend_packed))
            yield

    def _enter(self, index: int) -> Callable[[Any], Any]:
        def enter(x: Any) -> Any:
            call = self.call
            if call is None:
                return x
            call.layer = index
            x = self._replaced(call, index, x)
            self._put(index, Site.LAYER_IN, x)
            if call.sink is not None and call.sink.inputs is not None and (index, Site.LAYER_IN) in self._axes:
                call.sink.inputs[index] = self._by_token(index, Site.LAYER_IN, x)
            return x

        return enter

    def _leave(self, index: int) -> Callable[[Any], Any]:
        gives = self._gives(index, Site.LAYER_OUT)

        def leave(out: Any) -> Any:
            out = gives(out)
            call = self.call
            if call is not None:
                call.layer = None
                if call.sink is not None and call.sink.inputs is not None and index == len(self._layers) - 1:
                    call.sink.inputs[index + 1] = self._by_token(index, Site.LAYER_OUT, _first(out))
            return out

        return leave

    def _final(self, x: Any) -> Any:
        call = self.call
        return x if call is None else self._replaced(call, len(self._layers), x)

    def _replaced(self, call: MLXCall, key: int, x: Any) -> Any:
        axis = self._axes.get((key, Site.LAYER_IN), 1)
        if key in call.replace and x.ndim >= 3:
            first = mx.moveaxis(x, axis, 0)
            x = mx.moveaxis(to_mlx(call.replace[key]).astype(x.dtype).reshape(first.shape), 0, axis)
        if key == 0 and self.shift:
            rng = np.random.default_rng((_SEED, call.start, call.q_len, 1))
            x = x * (1.0 + self.shift * mx.array(rng.standard_normal(x.shape), dtype=mx.float64)).astype(x.dtype)
        return x

    def _reads(self, index: int, site: Site) -> Callable[[Any], Any]:
        def reads(x: Any) -> Any:
            self._put(index, site, x)
            return x

        return reads

    def _gives(self, index: int | None, site: Site) -> Callable[[Any], Any]:
        def gives(out: Any) -> Any:
            call = self.call
            if call is None:
                return out
            plant = call.plant
            if plant is not None and (plant.layer, plant.site) == (index, site):
                call.was_planted = True
                first = _first(out) * plant.factor
                out = (first, *out[1:]) if isinstance(out, tuple) else first
            self._put(index, site, _first(out))
            return out

        return gives

    def _put(self, layer: int | None, site: Site, x: Any) -> None:
        """Send the probed rows of `x` [1, token, ...] to the sink, a flat vector each."""
        call = self.call
        boundary = site in (Site.LAYER_IN, Site.LAYER_OUT)
        if call is None or call.sink is None or not call.probe:
            return
        if self.is_surveying:
            axes = [axis for axis in (1, 2) if axis < x.ndim - 1 and x.shape[axis] == call.q_len]
            if axes and (layer, site) not in self._axes:
                self._axes[layer, site] = axes[0]
        axis = self._axes.get((layer, site))
        if axis is None or axis >= x.ndim or x.shape[axis] != call.q_len:
            return
        if layer is None or layer in self._recorded or boundary:
            call.sink.add_rows(layer, site, call.probe, self._by_token(layer, site, x)[call.rows])

    def _by_token(self, layer: int | None, site: Site, x: Any) -> Array:
        """Return the rows [token, feature] of a tensor whose token axis was found in the survey: some models have
        several streams in front of it."""
        values = np.moveaxis(to_numpy(x), self._axes[layer, site], 0)
        return np.ascontiguousarray(values).reshape(len(values), -1)

    def _attend(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the kernel of mlx, and record what it reads and gives."""
        call = self.call
        if call is None or call.layer is None:
            return original(*args, **kwargs)
        q, k, v = self._planted(call, *args[:3])
        self._read(call, call.layer, q, k, v, kwargs)
        out = original(q, k, v, *args[3:], **kwargs)
        self._put(call.layer, Site.ATTN_CTX, out.transpose(0, 2, 1, 3))
        call.kernels.add("mx.fast")
        return out

    def _attend_packed(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same of a quantised cache, whose rows are recorded as they are read: dequantised."""
        call = self.call
        if call is None or call.layer is None:
            return original(*args, **kwargs)
        size = {name: kwargs[name] for name in ("group_size", "bits")}
        k, v = (mx.dequantize(*packed, **size) for packed in args[1:3])
        self._read(call, call.layer, args[0], k, v, kwargs)
        out = original(*args, **kwargs)
        self._put(call.layer, Site.ATTN_CTX, out.transpose(0, 2, 1, 3))
        call.kernels.add("quantized_matmul")
        return out

    def _planted(self, call: MLXCall, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
        plant = call.plant
        if plant is None or plant.layer != call.layer:
            return q, k, v
        if plant.site is Site.Q_ROPE:
            q, call.was_planted = q * plant.factor, True
        for site, rows in ((Site.K_CACHE, k), (Site.V_CACHE, v)):
            if plant.site is not site:
                continue
            place = np.flatnonzero(self._slots(call, rows.shape[2]) == plant.slot)
            if len(place):
                factors = np.ones(rows.shape[2])
                factors[place[0]] = plant.factor
                rows = rows * mx.array(factors, dtype=mx.float64).astype(rows.dtype)[None, None, :, None]
                call.was_planted = True
            k, v = (rows, v) if site is Site.K_CACHE else (k, rows)
        return q, k, v

    def _slots(self, call: MLXCall, n_keys: int) -> Any:
        assert call.layer is not None
        cache = call.cache[call.layer] if call.layer < len(call.cache) else None
        return slots_of(cache, n_keys, call.q_len, call.start + call.q_len)

    def _read(self, call: MLXCall, layer: int, q: Any, k: Any, v: Any, options: Mapping[str, Any]) -> None:
        """Record queries [1, head, token, dim] and the rows [1, kv head, key, dim] that attention reads."""
        call.kv_len = call.kv_len if call.kv_len is not None else int(k.shape[2])
        if call.sink is None or not call.probe or layer not in self._recorded or q.shape[2] != call.q_len:
            return
        slots = self._slots(call, k.shape[2])
        self._put(layer, Site.Q_ROPE, q.transpose(0, 2, 1, 3))
        for site, rows in ((Site.K_CACHE, k), (Site.V_CACHE, v)):
            call.sink.add_cache_read(layer, site, call.probe, slots, to_numpy(rows[0].transpose(1, 0, 2)))
        sinks = options.get("sinks")
        mask = _mask(options.get("mask"), call.q_len, k.shape[2])
        given = None if sinks is None else tuple(float(s) for s in np.ravel(to_numpy(sinks.astype(mx.float32))))
        biased = mask is not None and bool((np.isfinite(mask) & (mask != 0.0) & (mask > -1e4)).any())
        call.sink.add_attention(layer, AttentionSpec(float(options["scale"]), sinks=given, is_biased=biased))
        queries = to_numpy(q[0]).astype(np.float64)[:, call.rows]
        scores = _scores(queries, to_numpy(k[0]).astype(np.float64), float(options["scale"]))
        if mask is not None:
            seen = np.broadcast_to(mask, (*mask.shape[:-2], call.q_len, k.shape[2]))[..., call.rows, :]
            scores = scores + seen.reshape(-1, *seen.shape[-2:])
            scores = np.where(scores < -1e30, -np.inf, scores)
        probs = _softmax(scores, given)
        dtype = np.float64 if q.dtype == mx.float64 else np.float32
        for site, values in ((Site.ATTN_SCORES, scores), (Site.ATTN_PROBS, probs)):
            call.sink.add_rows(layer, site, call.probe, values.transpose(1, 0, 2).astype(dtype), slots)

    @contextmanager
    def armed(self, call: MLXCall) -> Iterator[None]:
        """Record the forward call made inside the context.

        Raises:
            CaptureError: the call has a fault to commit, and what it is about was not met.
        """
        self.call = call
        try:
            yield
        finally:
            self.call = None
        require_planted(call.plant, was_planted=call.was_planted)


def _wide_norm(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The norm of mlx; in float64, in which its kernel computes no finer than in float32, by its definition."""
    if args[0].dtype != mx.float64 or len(args) != 3 or kwargs:
        return original(*args, **kwargs)
    x, weight, eps = args
    normal = x * mx.rsqrt(mx.mean(mx.square(x), axis=-1, keepdims=True) + mx.array(eps, dtype=mx.float64))
    return normal if weight is None else normal * weight.astype(mx.float64)


def _scores(queries: Floats, keys: Floats, scale: float) -> Floats:
    """Scores [head, token, key] of queries [head, token, dim] and keys [kv head, key, dim], in float64."""
    keys = np.repeat(keys, len(queries) // len(keys), axis=0)
    scores: Floats = np.einsum("htd,hsd->hts", queries, keys) * scale
    return scores


def _softmax(scores: Floats, sinks: tuple[float, ...] | None) -> Floats:
    """Probabilities of scores [head, token, key]; sinks [head] take their share and have no key."""
    largest = scores.max(axis=-1, keepdims=True)
    extra = np.zeros_like(largest)
    if sinks is not None:
        column = np.asarray(sinks)[:, None, None]
        largest = np.maximum(largest, column)
        extra = np.exp(column - largest)
    exponentials = np.exp(scores - largest)
    probs: Floats = exponentials / (exponentials.sum(axis=-1, keepdims=True) + extra)
    return probs


def _mask(mask: Any, q_len: int, n_keys: int) -> Floats | None:
    """What a mask adds to scores [..., token, key] in float64, None for nothing."""
    if mask is None:
        return None
    if isinstance(mask, str):
        hidden = np.arange(n_keys)[None, :] > np.arange(q_len)[:, None] + n_keys - q_len
        return np.where(hidden, -np.inf, 0.0)
    if mask.dtype == mx.bool_:
        return np.where(np.array(mask), 0.0, -np.inf)
    return to_numpy(mask).astype(np.float64)


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def _child(module: Any, names: Sequence[str]) -> Any:
    return next((found for name in names if callable(found := getattr(module, name, None))), None)


def _parts_of(layer: Any) -> Iterator[tuple[Any, Site]]:
    """Yield the modules of a layer whose outputs are sites."""
    for site, names in _PARTS.items():
        if (module := _child(layer, names)) is not None:
            yield module, site
    if (norm := _child(layer, _FFN_NORMS)) is not None:
        yield norm, Site.FFN_NORM_OUT
    attention = _child(layer, _PARTS[Site.ATTN_OUT])
    for site, names in _INSIDE.items():
        if attention is not None and (module := _child(attention, names)) is not None:
            yield module, site


def _holder(model: Any, layers: Sequence[Any]) -> Any:
    """The module whose own list the layers are."""
    found = [module for _, module in model.named_modules() if isinstance(module.get("layers"), list)]
    return next((module for module in found if module["layers"] and module["layers"][0] is layers[0]), model)


@contextmanager
def _watched(module: Any, before: Callable[[Any], Any] | None, after: Callable[[Any], Any] | None) -> Iterator[None]:
    """Call a module with a look at its first argument and at its output while the context is open."""
    original = type(module)

    def call(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        x = x if before is None else before(x)
        out = original.__call__(self, x, *args, **kwargs)
        return out if after is None else after(out)

    module.__class__ = type(original.__name__, (original,), {"__call__": call})
    try:
        yield
    finally:
        module.__class__ = original


@contextmanager
def _patched(place: Any, name: str, through: Callable[..., Any]) -> Iterator[None]:
    """Call a function of a module through another one while the context is open."""
    original = getattr(place, name)
    setattr(place, name, lambda *args, **kwargs: through(original, args, kwargs))
    try:
        yield
    finally:
        setattr(place, name, original)


__all__ = ["MLXCall", "MLXRecorder"]
