"""Watches a model of mlx-lm: modules are called through a class of their own, attention through mx.fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import base
from numpy.typing import NDArray

from kvdrift.engines.base import Shifts, Sink, require_planted
from kvdrift.engines.mlx.arrays import to_mlx, to_numpy
from kvdrift.engines.mlx.caches import rows_held, slots_of, states_of
from kvdrift.engines.mlx.watched import PARTS, child_of, parts_of, patched, watched
from kvdrift.engines.mlx.wide import wide_experts, wide_layer_norm, wide_norm
from kvdrift.trace.model import Array, Slots
from kvdrift.vocabulary.facts import AttentionSpec, Plant
from kvdrift.vocabulary.sites import Site

Floats = NDArray[np.float64]

_SEED = 20261  # of what layer inputs are changed by; any fixed number does


@dataclass(frozen=True, slots=True)
class ProbedRow:
    """One row of a call that is recorded: its number, its padding on the left, and the positions that are probed.

    `length` is how many tokens it then has where padding stands behind them, None where it does not.
    """

    row: int
    pad: int
    positions: tuple[int, ...]
    sink: Sink
    length: int | None = None


@dataclass(slots=True)
class MLXCall:
    """One forward call that is being recorded: `start` columns were cached before it, the padding of `pads` [row]
    among them."""

    start: int
    q_len: int
    pads: tuple[int, ...]
    lanes: tuple[ProbedRow, ...]
    replace: Mapping[int, Array]
    plant: Plant | None
    cache: Sequence[Any]
    was_planted: bool = False
    layer: int | None = None
    kv_len: int | None = None
    kernels: set[str] = field(default_factory=set)
    # Keys that attention was handed, their columns, and the layer.
    read: list[tuple[Any, Slots, int]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Columns in the cache after the call."""
        return self.start + self.q_len

    @property
    def probed(self) -> list[ProbedRow]:
        return [lane for lane in self.lanes if lane.positions]

    def columns(self, lane: ProbedRow) -> list[int]:
        """Where the probed positions of a row are among what is fed."""
        return [position + lane.pad - self.start for position in lane.positions]

    @property
    def inputs(self) -> dict[int, Array] | None:
        """Where the layer inputs of all tokens go, if the only row wants them."""
        return self.lanes[0].sink.inputs if len(self.lanes) == 1 and len(self.pads) == 1 else None


class MLXRecorder(Shifts):
    """Knows where each site of one model is read; idle until a call is armed."""

    def __init__(self, model: Any, layers: Sequence[Any], recorded: frozenset[int]) -> None:
        self._model, self._layers, self._recorded = model, layers, recorded
        self.call: MLXCall | None = None
        self._axes: dict[tuple[int | None, Site], int] = {}  # of tokens
        self._row_axes: dict[tuple[int | None, Site], int] = {}  # of the rows of a batch
        self.is_surveying = False
        self.windows: Sequence[int | None] = ()  # of the model's own, by layer
        # Latent attention multiplies with the cached rows themselves when a token comes alone, and with keys that are
        # made of them in a prefill: what enters attention is then not the same in both.
        self._latent = {index for index, layer in enumerate(layers) if _is_latent(layer)}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the model while the context is open."""
        with ExitStack() as stack:
            for index, layer in enumerate(self._layers):
                stack.enter_context(watched(layer, self._enter(index), self._leave(index)))
                for module, site in parts_of(layer):
                    before = self._reads(index, Site.RESID_ATTN) if site is Site.FFN_NORM_OUT else None
                    stack.enter_context(watched(module, before, self._gives(index, site)))
            inner = _holder(self._model, self._layers)
            norm, embedding = (child_of(inner, names) for names in (("norm", "ln_f"), ("embed_tokens", "wte")))
            if norm is not None:
                stack.enter_context(watched(norm, self._final, self._gives(None, Site.FINAL_NORM_OUT)))
            if embedding is not None:
                stack.enter_context(watched(embedding, None, self._gives(None, Site.EMBED_OUT)))
            stack.enter_context(patched(mx.fast, "scaled_dot_product_attention", self._attend))
            stack.enter_context(patched(mx.fast, "rms_norm", wide_norm))
            stack.enter_context(patched(mx.fast, "layer_norm", wide_layer_norm))
            stack.enter_context(patched(mx, "gather_mm", wide_experts))
            stack.enter_context(patched(base, "quantized_scaled_dot_product_attention", self._attend_packed))
            yield

    def _enter(self, index: int) -> Callable[[Any], Any]:
        def enter(x: Any) -> Any:
            call = self.call
            if call is None:
                return x
            call.layer = index
            x = self._replaced(call, index, x)
            self._put(index, Site.LAYER_IN, x)
            if call.inputs is not None and (index, Site.LAYER_IN) in self._axes:
                call.inputs[index] = self._by_token(index, Site.LAYER_IN, x, 0)
            return x

        return enter

    def _leave(self, index: int) -> Callable[[Any], Any]:
        gives = self._gives(index, Site.LAYER_OUT)

        def leave(out: Any) -> Any:
            out = gives(out)
            call = self.call
            if call is not None:
                call.layer = None
                if call.inputs is not None and index == len(self._layers) - 1:
                    call.inputs[index + 1] = self._by_token(index, Site.LAYER_OUT, _first(out), 0)
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
        """Send what `x` [row, token, ...] holds at the probed positions to the sinks, a flat vector each."""
        call = self.call
        if call is None or not call.probed:
            return
        if self.is_surveying:
            axes = [axis for axis in (1, 2) if axis < x.ndim - 1 and x.shape[axis] == call.q_len]
            if axes and (layer, site) not in self._axes:
                self._axes[layer, site] = axes[0]
                self._row_axes[layer, site] = next((axis for axis in range(axes[0]) if x.shape[axis] == 1), 0)
        axis = self._axes.get((layer, site))
        if axis is None or axis >= x.ndim or x.shape[axis] != call.q_len:
            return
        if self.records(layer) or site in (Site.LAYER_IN, Site.LAYER_OUT):
            for lane in call.probed:
                values = self._by_token(layer, site, x, lane.row)
                lane.sink.add_rows(layer, site, lane.positions, values[call.columns(lane)])

    def records(self, layer: int | None) -> bool:
        """Whether a layer is recorded; what stands outside the layers always is."""
        return layer is None or layer in self._recorded

    def _by_token(self, layer: int | None, site: Site, x: Any, row: int) -> Array:
        """Return [token, feature] of one row of a tensor whose axes were found in the survey: some models have heads
        in front of the tokens, or several streams in front of the rows."""
        values = to_numpy(mx.take(x, mx.array([row]), axis=self._row_axes[layer, site]))
        values = np.moveaxis(values, self._axes[layer, site], 0)
        return np.ascontiguousarray(values).reshape(len(values), -1)

    def _attend(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the kernel of mlx, and record what it reads and gives."""
        call = self.call
        if call is None or call.layer is None:
            return original(*args, **kwargs)
        q, k, v = self._planted(call, *args[:3])
        self._read(call, call.layer, q, k, v, kwargs)
        out = original(q, k, v, *args[3:], **kwargs)
        if call.layer not in self._latent:
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
            columns = self._columns(call, k)
            factors = np.ones((len(call.pads), rows.shape[2]))
            for row, pad in enumerate(call.pads):
                factors[row, columns - pad == plant.slot] = plant.factor
            if (factors != 1.0).any():
                rows = rows * mx.array(factors, dtype=mx.float64).astype(rows.dtype)[:, None, :, None]
                call.was_planted = True
            k, v = (rows, v) if site is Site.K_CACHE else (k, rows)
        return q, k, v

    def _columns(self, call: MLXCall, k: Any) -> Any:
        """The columns [key] of the batch that attention is handed: the position of a row's key plus its padding."""
        assert call.layer is not None
        n_keys = int(k.shape[2])
        if call.layer < len(call.cache):
            columns = slots_of(call.cache[call.layer], n_keys, call.q_len, call.length)
            call.read.append((k, columns, call.layer))
            return columns
        shared = _shared(call, k)
        return slots_of(None, n_keys, call.q_len, call.length) if shared is None else shared[1]

    def _window(self, call: MLXCall, layer: int, k: Any) -> int | None:
        """How many tokens a layer sees by the cache that the model makes for what it reads."""
        if layer >= len(call.cache):
            shared = _shared(call, k)
            layer = len(self.windows) if shared is None else shared[2]
        return self.windows[layer] if layer < len(self.windows) else None

    def _read(self, call: MLXCall, layer: int, q: Any, k: Any, v: Any, options: Mapping[str, Any]) -> None:
        """Record queries [row, head, token, dim] and the rows [row, kv head, key, dim] that attention reads."""
        call.kv_len = call.kv_len if call.kv_len is not None else int(k.shape[2])
        if layer in self._latent and layer in self._recorded:
            self._read_latent(call, layer, k)
        if layer not in self._recorded or layer in self._latent or q.shape[2] != call.q_len:
            return
        self._put(layer, Site.Q_ROPE, q.transpose(0, 2, 1, 3))
        scale, sinks = float(options["scale"]), options.get("sinks")
        given = None if sinks is None else tuple(float(s) for s in np.ravel(to_numpy(sinks.astype(mx.float32))))
        mask = _mask(options.get("mask"), call.q_len, k.shape[2])
        biased = mask is not None and bool((np.isfinite(mask) & (mask != 0.0) & (mask > -1e4)).any())
        read_columns = self._columns(call, k)
        window = self._window(call, layer, k)
        for lane in call.probed:
            slots = read_columns - lane.pad
            is_token = (slots >= 0) & (
                slots < (lane.length or call.length)
            )  # the rest is padding; what it takes of the attention is missing from the others
            for site, rows in ((Site.K_CACHE, k), (Site.V_CACHE, v)):
                read = to_numpy(rows[lane.row].transpose(1, 0, 2))[is_token]
                lane.sink.add_cache_read(layer, site, lane.positions, slots[is_token], read)
            lane.sink.add_attention(layer, AttentionSpec(scale, window=window, sinks=given, is_biased=biased))
            columns = call.columns(lane)
            queries = to_numpy(q[lane.row]).astype(np.float64)[:, columns]
            scores = _scores(queries, to_numpy(k[lane.row]).astype(np.float64), scale)
            if mask is not None:
                scores = np.where(scores + (seen := _of_row(mask, lane.row, columns)) < -1e30, -np.inf, scores + seen)
            probs = _softmax(scores, given)
            dtype = np.float64 if q.dtype == mx.float64 else np.float32
            for site, values in ((Site.ATTN_SCORES, scores), (Site.ATTN_PROBS, probs)):
                kept = values.transpose(1, 0, 2).astype(dtype)[..., is_token]
                lane.sink.add_rows(layer, site, lane.positions, kept, slots[is_token])

    def _read_latent(self, call: MLXCall, layer: int, k: Any) -> None:
        """Record the rows that the cache of latent attention holds, which both passes have in one form: the latent ones
        as keys, and the rotated part of the keys as values. Where attention is handed latent rows, they are those."""
        held = rows_held(call.cache[layer]) if layer < len(call.cache) else None
        if held is None:
            return
        held = (k if k.shape == held[0].shape else held[0], held[1])
        columns = slots_of(call.cache[layer], int(held[0].shape[2]), call.q_len, call.length)
        for lane in call.probed:
            slots = columns - lane.pad
            is_token = (slots >= 0) & (slots < (lane.length or call.length))
            for site, rows in zip((Site.K_CACHE, Site.V_CACHE), held, strict=True):
                read = to_numpy(rows[lane.row].transpose(1, 0, 2))[is_token]
                lane.sink.add_cache_read(layer, site, lane.positions, slots[is_token], read)

    def put_states(self, call: MLXCall, lane: ProbedRow) -> None:
        """Send the recurrent states of a row to its sink: they exist behind the last token of a call."""
        if call.q_len - 1 not in call.columns(lane):
            return
        for layer, each in enumerate(call.cache):
            for site, state in states_of(each, lane.row) if layer in self._recorded else ():
                lane.sink.add_rows(layer, site, (call.length - 1 - lane.pad,), to_numpy(state)[None])

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


def _shared(call: MLXCall, k: Any) -> tuple[Any, Any, int] | None:
    """What a lower layer read, with its columns and its number, of a layer without a cache of its own."""
    return next((each for each in reversed(call.read) if each[0].shape == k.shape and mx.array_equal(each[0], k)), None)


def _scores(queries: Floats, keys: Floats, scale: float) -> Floats:
    """Scores [head, token, key] of queries [head, token, dim] and keys [kv head, key, dim], in float64."""
    keys = np.repeat(keys, len(queries) // len(keys), axis=0)
    scores: Floats = np.einsum("htd,hsd->hts", queries, keys) * scale
    return scores


def _softmax(scores: Floats, sinks: tuple[float, ...] | None) -> Floats:
    """Probabilities of scores [head, token, key]; sinks [head] take their share and have no key."""
    largest = scores.max(axis=-1, keepdims=True, initial=-np.inf)  # a faulty cache may hand over no key at all
    extra = np.zeros_like(largest)
    if sinks is not None:
        column = np.asarray(sinks)[:, None, None]
        largest = np.maximum(largest, column)
        extra = np.exp(column - largest)
    exponentials = np.exp(scores - largest)
    probs: Floats = exponentials / (exponentials.sum(axis=-1, keepdims=True) + extra)
    return probs


def _is_latent(layer: Any) -> bool:
    """Whether the attention of a layer is latent; a layer of LongCat has two of them in a list."""
    held = [getattr(layer, name, None) for name in PARTS[Site.ATTN_OUT]]
    return any(hasattr(part, "embed_q") for each in held for part in (each if isinstance(each, list) else [each]))


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


def _of_row(mask: Floats, row: int, columns: Sequence[int]) -> Floats:
    """What a mask [(row, head,) token, key] adds to the scores [head, token, key] of one row, at some of its tokens."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    mask = mask[min(row, len(mask) - 1)]
    return mask[:, columns] if mask.shape[1] > 1 else mask


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def _holder(model: Any, layers: Sequence[Any]) -> Any:
    """The module whose own list the layers are."""
    found = [module for _, module in model.named_modules() if isinstance(module.get("layers"), list)]
    return next((module for module in found if module["layers"] and module["layers"][0] is layers[0]), model)


__all__ = ["MLXCall", "MLXRecorder", "ProbedRow"]
