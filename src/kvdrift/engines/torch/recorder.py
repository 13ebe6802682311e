"""Hooks that carry a forward pass into a sink: one set per model, armed for one call at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from kvdrift.engines.base import Shifts, require_planted
from kvdrift.engines.torch.armed import Armed
from kvdrift.engines.torch.arrays import rows_of, to_array, to_tensor
from kvdrift.engines.torch.at_kernel import flush
from kvdrift.engines.torch.attention import AttentionTap
from kvdrift.engines.torch.frames import Frame, Lane, Reads
from kvdrift.engines.torch.masks import hide_masked, hide_scaled
from kvdrift.engines.torch.residual import STREAM, first_tensor, parts_of, stream_of, with_stream
from kvdrift.engines.torch.roles import LayerRoles, ModelRoles, Tap
from kvdrift.engines.torch.softmax import weighs_others
from kvdrift.trace.model import Array, Slots
from kvdrift.vocabulary.facts import AttentionSpec, Plant
from kvdrift.vocabulary.sites import Site

_SEED = 20261  # of what layer inputs are changed by; any fixed number does

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def _unwatched(record: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Keep the tap from seeing what recording itself calls: none of that is the model's, and each call seen costs as
    much as the call."""

    @wraps(record)
    def unwatched(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        with torch._C.DisableTorchFunction():
            return record(*args, **kwargs)

    return unwatched


class TorchRecorder(Shifts):
    """Knows where each site is read in one model; idle until a call is armed."""

    def __init__(self, roles: ModelRoles, tap: AttentionTap) -> None:
        self._roles = roles
        self.tap = tap
        self._typical = 0.0
        self._armed: Armed | None = None
        self._handles: list[Any] = []
        self._made_scores: dict[tuple[int, int, int], set[int]] = {}  # by layer, and place and length of a call

    @property
    def is_attached(self) -> bool:
        """Whether the model has the hooks of this recorder."""
        return bool(self._handles)

    @property
    def call(self) -> Armed | None:
        """The forward call that is being recorded, None between calls."""
        return self._armed

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook the model while the context is open."""
        try:
            for tap in self._roles.taps:
                self._read(None, tap)
            for layer in self._roles.layers:
                self._attach_layer(layer)
            last = self._roles.layers[-1]
            self._handles.append((last.leaves or last.module).register_forward_hook(self._leave_layers))
            if self._roles.final_norm is not None:
                is_alone = any(tap.site is Site.LAYER_OUT and tap.is_alone for tap in last.taps)
                self._replace(self._roles.final_norm, len(self._roles.layers), is_alone=is_alone)
            yield
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    @contextmanager
    def armed(self, call: Armed) -> Iterator[None]:
        """Record the forward call made inside the context.

        Raises:
            CaptureError: the call has a fault to commit, and what it is about was not met.
        """
        self._armed = call
        try:
            yield
        finally:
            self._armed = None
            self.tap.close()
        require_planted(call.plant, was_planted=call.was_planted)

    @_unwatched
    def cache_updated(self, layer: int, keys: Tensor, values: Tensor, all_keys: Tensor, all_values: Tensor) -> None:
        """Record the new `keys` [1, kv head, token, dim] as they enter the cache.

        What attention reads is recorded here only for a model that does not use the attention interface.
        """
        call, frame = self._armed, self.tap.frame
        if call is None:
            return
        if keys.ndim == 4 and keys.shape[2] == call.q_len:
            self._put(layer, Site.K_ROPE, keys.transpose(1, 2))
        if frame is not None and not self._roles.layers[layer].has_interface:
            self._put_cache(layer, Site.K_CACHE, all_keys)
            self._put_cache(layer, Site.V_CACHE, all_values)
            frame.kv_len = all_keys.shape[2]

    def _attach_layer(self, layer: LayerRoles) -> None:
        order = {"in": 0, "out": 1}
        for tap in sorted(layer.taps, key=lambda tap: order[tap.when]):
            self._read(layer.index, tap)
        is_alone = any(tap.site is Site.LAYER_IN and tap.is_alone for tap in layer.taps)
        self._replace(layer.enters or layer.module, layer.index, in_place=layer.enters is not None, is_alone=is_alone)
        if layer.attention is not None:
            enter, leave = self._attention_hooks(layer)
            self._handles.append(layer.attention.register_forward_pre_hook(enter))
            self._handles.append(layer.attention.register_forward_hook(leave, always_call=True))

    def _leave_layers(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._armed is not None:
            self._armed.is_behind_layers = True

    def _read(self, layer: int | None, tap: Tap) -> None:
        if tap.when == "in":

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._take(layer, tap, stream_of(args, kwargs) if tap.is_alone else first_tensor(args, kwargs))

            self._handles.append(tap.module.register_forward_pre_hook(before, with_kwargs=True))
        else:

            def after(module: nn.Module, args: Any, output: Any) -> Any:
                faulty = self._planted(layer, tap.site, output)
                value = output if faulty is None else faulty
                read = stream_of if tap.is_alone else first_tensor
                self._take(layer, tap, value if isinstance(value, Tensor) else read(value, {}))
                return faulty

            self._handles.append(tap.module.register_forward_hook(after))

    def _planted(self, layer: int | None, site: Site, output: Any) -> Any:
        """Return the output of a module with the positive control's fault in it, None if it is not planted here."""
        call = self._armed
        plant = None if call is None else call.plant
        if call is None or plant is None or plant.layer != layer or plant.site is not site:
            return None
        call.was_planted = True
        if isinstance(output, Tensor):
            return output * plant.factor
        n_parts = 2 if site in STREAM and parts_of(output, {}) is not None else 1
        return type(output)([*(each * plant.factor for each in output[:n_parts]), *output[n_parts:]])

    def _replace(self, module: nn.Module, key: int, *, in_place: bool = False, is_alone: bool = False) -> None:
        """Hook the replacement of layer inputs; `in_place` where what `module` reads goes past it as well, such as a
        residual beside the first norm of a layer that is not a module of its own."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self._armed
            is_shifted = key == 0 and self.shift != 0.0
            if call is None or (key == len(self._roles.layers)) > call.is_behind_layers:
                return None
            if not is_shifted and key not in call.replace:
                return None
            parts = parts_of(args, kwargs) if is_alone else None
            hidden = first_tensor(args, kwargs) if parts is None else parts[0] + parts[1]
            if hidden is None:
                return None
            value = hidden
            if key in call.replace:
                value = call.put_in(to_tensor(call.replace[key], hidden.device).to(hidden.dtype), hidden)
            if is_shifted:
                value = value + self.shift * self._size_of(value) * _draw(call, hidden)
            if in_place:
                hidden.copy_(value)
                return None
            if parts is not None:
                return with_stream(args, kwargs, parts, value)
            if args:
                return (value, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": value}

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))

    def _size_of(self, value: Tensor) -> Tensor:
        """What a change of the first layer's input [..., token, hidden] is relative to: itself, and for a row of zeros
        what other rows have in the root mean square, of this call or the last one that had any."""
        is_zero = ~value.any(dim=-1, keepdim=True)
        if not bool(is_zero.all()):
            self._typical = float(value[~is_zero[..., 0]].double().square().mean().sqrt())
        return torch.where(is_zero, value + self._typical, value)

    def _attention_hooks(self, layer: LayerRoles) -> tuple[Callable[..., None], Callable[..., None]]:
        is_tapped = any(tap.site is Site.ATTN_CTX for tap in layer.taps)  # where it is handed on, in both passes

        def enter(module: nn.Module, args: Any) -> None:
            call = self._armed
            if call is None:
                return
            frame = Frame(
                layer=layer.index,
                module=module,
                q_len=call.q_len,
                lanes=call.lanes,
                n_rows=call.n_rows,
                n_heads=layer.n_heads,
                on_inputs=self._on_inputs,
                # At the kernel it is known when the module has returned, and whether it was handed on by then.
                on_context=_ignored if is_tapped and not layer.at_kernel else self._on_context,
                on_spec=self._on_spec,
                on_plant=self._on_plant,
                at_kernel=layer.at_kernel,
                made_scores=self._made_scores.setdefault((layer.index, call.start, call.q_len), set()),
                wide=call.wide,
                # Where nothing is recorded, no scores are; at the kernel, a fault may be planted all the same.
                want_scores=self._wanted(layer.index) and (bool(call.lanes) or layer.at_kernel),
            )
            self.tap.open(frame)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            call, frame = self._armed, self.tap.close()
            if call is None or frame is None:
                return
            if frame.at_kernel:
                flush(frame)
            if call.kv_len is None:
                call.kv_len = frame.kv_len
            if call.kernels is not None and frame.kernel is not None:
                call.kernels.add(frame.kernel)
            self._put_scores(frame)

        return enter, leave

    @_unwatched
    def _on_plant(self, frame: Frame, reads: Reads) -> Reads:
        """Return what attention is to read instead: the same, or with the positive control's fault in it."""
        call = self._armed
        plant = None if call is None else call.plant
        if call is None or plant is None or plant.layer != frame.layer:
            return reads
        query, key, value = reads.query, reads.key, reads.value
        if plant.site is Site.Q_ROPE and query is not None:
            query, call.was_planted = _faulty(query, plant.factor, call.dtype), True
        if key is not None:
            key = self._planted_row(plant, Site.K_CACHE, key)
        if value is not None:
            value = self._planted_row(plant, Site.V_CACHE, value)
        return Reads(query, key, value)

    @_unwatched
    def _on_inputs(self, frame: Frame, reads: Reads) -> None:
        call = self._armed
        if call is None:
            return
        if reads.key is not None:
            frame.kv_len = n_keys = reads.key.shape[2]
            in_front = min(n_keys, self._roles.layers[frame.layer].in_front)
            frame.first = in_front + call.start - call.slot_offset(frame.layer, n_keys - in_front)
        if reads.query is not None and reads.query.shape[2] == call.q_len:
            self._put(frame.layer, Site.Q_ROPE, reads.query.transpose(1, 2))
        if reads.key is not None:
            self._put_cache(frame.layer, Site.K_CACHE, reads.key)
        if reads.value is not None:
            self._put_cache(frame.layer, Site.V_CACHE, reads.value)

    def _planted_row(self, plant: Plant, site: Site, rows: Tensor) -> Tensor:
        """Return the cached `rows` [row, kv head, slot, dim] that attention is given, with the positive control's fault
        in one of them if it is planted there. What the cache holds stays as it is."""
        call = self._armed
        if call is None or plant.site is not site or plant.layer is None or len(call.lanes) != 1:
            return rows
        slots, keep = self._slots(plant.layer, rows.shape[2], call.lanes[0])
        found = np.flatnonzero(slots == plant.slot)
        if not len(found):
            return rows
        rows, call.was_planted = rows.clone(), True
        at = keep.start + int(found[0])
        rows[:, :, at] = _faulty(rows[:, :, at], plant.factor, call.dtype)
        return rows

    @_unwatched
    def _on_context(self, frame: Frame, context: Tensor) -> None:
        call = self._armed
        if call is None or frame.layer in call.handed_on:
            return
        if context.ndim >= 3 and context.shape[1] == call.q_len:
            self._put(frame.layer, Site.ATTN_CTX, context)

    def _on_spec(self, frame: Frame, spec: AttentionSpec) -> None:
        call = self._armed
        if call is None or not self._wanted(frame.layer):
            return
        frame.spec = spec
        for lane in call.lanes:
            lane.sink.add_attention(frame.layer, spec)

    @_unwatched
    def _put_scores(self, frame: Frame) -> None:
        call = self._armed
        if call is None or not frame.want_scores or not call.lanes:
            return
        rows = frame.score_rows()
        if rows is None:
            return
        dtype = torch.float32 if not rows.measured else rows.scores.dtype
        scores, first = hide_masked(rows.scores, dtype), 0
        if frame.fallback is None and rows.measured and call.dtype == torch.float16 != rows.scores.dtype:
            # Attention of a model's own may add the mask of its dtype to wider scores, and scale both.
            scores = hide_scaled(scores, rows.scores, rows.probs, call.dtype)
        for lane in call.lanes:
            if not lane.positions:
                continue
            here = slice(first, first + len(lane.positions))
            first = here.stop
            slots, keep = self._slots(frame.layer, scores.shape[-1], lane)
            probs = rows.probs[here, ..., keep]
            if frame.spec is not None and weighs_others(rows.probs[here], keep):
                lane.sink.add_attention(frame.layer, msgspec.structs.replace(frame.spec, is_biased=True))
            lane.sink.add_rows(frame.layer, Site.ATTN_SCORES, lane.positions, to_array(scores[here, ..., keep]), slots)
            lane.sink.add_rows(frame.layer, Site.ATTN_PROBS, lane.positions, to_array(probs), slots)

    def _put_cache(self, layer: int, site: Site, tensor: Tensor) -> None:
        call = self._armed
        if call is None or not self._wanted(layer) or tensor.ndim != 4:
            return
        for lane in call.lanes:
            if not lane.positions:
                continue
            slots, keep = self._slots(layer, tensor.shape[2], lane)
            rows = tensor[lane.row].transpose(0, 1)[keep]
            lane.sink.add_cache_read(layer, site, lane.positions, slots, to_array(rows))

    def _slots(self, layer: int, n_keys: int, lane: Lane) -> tuple[Slots, slice]:
        """Logical positions of the keys of an attention call; slots of a static cache that were never written are
        left out, since nothing was put there, and so are keys in front that belong to no token.

        A key of the padding gets a number behind the last token: no other route has a key there, so one that is seen
        is a difference.
        """
        call = self._armed
        assert call is not None
        in_front = min(n_keys, self._roles.layers[layer].in_front)
        key = (call.slot_offset(layer, n_keys - in_front), n_keys - in_front, lane.pad, in_front)
        if key not in call.slots:
            call.slots[key] = self._written(call, *key)
        return call.slots[key]

    @staticmethod
    def _written(call: Armed, offset: int, n_keys: int, pad: int, in_front: int) -> tuple[Slots, slice]:
        n_written = min(n_keys, max(1, call.end - offset))
        slots = np.arange(offset - pad, offset - pad + n_written, dtype=np.int64)
        if offset >= pad:
            return slots, slice(in_front, in_front + n_written)
        behind = call.end - pad
        return np.where(slots < 0, slots + pad + behind, slots), slice(in_front, in_front + n_written)

    @_unwatched
    def _take(self, layer: int | None, tap: Tap, tensor: Tensor | None) -> None:
        call = self._armed
        if call is None or tensor is None or not call.lanes or not self._wanted(layer, tap.site):
            return
        if tap.site is Site.FINAL_NORM_OUT and not call.is_behind_layers:
            return
        n_rows, dim = call.n_rows, tap.token_dim
        if dim == 0 and tensor.shape[0] == n_rows * call.q_len:  # flattened: all tokens of all rows
            tensor = tensor.reshape(n_rows, call.q_len, *tensor.shape[1:])
            dim = 1
        if dim >= tensor.ndim or tensor.shape[dim] != call.q_len or tensor.shape[0] not in (1, n_rows):
            return
        if tap.pick is not None:
            tensor = tap.pick(tensor)
        if dim != 1:
            tensor = tensor.movedim(dim, 1)
        if tap.site is Site.ATTN_CTX and layer is not None:
            call.handed_on.add(layer)
        if call.overflow is None and call.dtype == torch.float16:
            call.overflow = _overflow(layer, tap.site, tensor, call)
        for lane in call.lanes:
            if layer is not None and lane.sink.inputs is not None:
                rows = tensor[lane.row if tensor.shape[0] > 1 else 0]
                if tap.site is Site.LAYER_IN:
                    _put_inputs(lane.sink.inputs, layer, rows, call)
                elif tap.site is Site.LAYER_OUT and layer == len(self._roles.layers) - 1:
                    _put_inputs(lane.sink.inputs, layer + 1, rows, call)
        self._send(call, layer, tap.site, tensor)

    def _put(self, layer: int | None, site: Site, tensor: Tensor) -> None:
        """Send the probed tokens of `tensor` [row of the batch, token, ...] to the sinks, if its layer is recorded."""
        call = self._armed
        if call is not None and self._wanted(layer, site):
            self._send(call, layer, site, tensor)

    @staticmethod
    def _send(call: Armed, layer: int | None, site: Site, tensor: Tensor) -> None:
        """Send the probed tokens of `tensor` [row of the batch, token, ...] to the sinks, a flat vector each.

        A tensor that has one row for the whole batch, such as a position embedding, serves all of them.
        """
        for lane in call.lanes:
            if not lane.positions:
                continue
            rows = tensor[lane.row if tensor.shape[0] > 1 else 0]
            # A decode step has the row that is wanted and no other.
            at = lane.row_index if call.q_len > 1 else None
            lane.sink.add_rows(layer, site, lane.positions, rows_of(rows, at))

    def _wanted(self, layer: int | None, site: Site | None = None) -> bool:
        """Whether a layer is recorded; layer boundaries always are, since layer isolation needs all of them."""
        call = self._armed
        boundary = site in (Site.LAYER_IN, Site.LAYER_OUT)
        return call is None or layer is None or call.layers is None or layer in call.layers or boundary


def _faulty(values: Tensor, factor: float, native: torch.dtype) -> Tensor:
    """The values times a factor. A kernel may be given numbers of the native dtype in a wider one; they stay such."""
    faulty = values * factor
    return faulty.to(native).to(values.dtype) if native.itemsize < values.dtype.itemsize else faulty


def _put_inputs(inputs: dict[int, Array], layer: int, rows: Tensor, call: Armed) -> None:
    """Keep the rows [token, ...] of a call, behind those of its parts before."""
    array = to_array(rows if call.n_real is None else rows[: call.n_real])
    inputs[layer] = np.concatenate([inputs[layer], array]) if call.n_before else array


def _ignored(frame: Frame, context: Tensor) -> None:
    """Record nothing."""


def _draw(call: Armed, hidden: Tensor) -> Tensor:
    """Standard normal numbers in the shape of `hidden`, the same for calls of the same tokens."""
    rng = np.random.default_rng((_SEED, call.start, call.q_len, call.n_rows))
    return torch.from_numpy(rng.standard_normal(tuple(hidden.shape))).to(hidden)


def _overflow(layer: int | None, site: Site, tensor: Tensor, call: Armed) -> str | None:
    """Name the first token of the recorded rows of `tensor` [row, token, ...] that is NaN or infinite, None if all are
    finite."""
    for lane in call.lanes:
        row = tensor[lane.row if tensor.shape[0] > 1 else 0]
        broken = ~torch.isfinite(row).flatten(1).all(dim=1)
        if bool(broken.any()):
            position = call.start + int(broken.nonzero()[0]) - lane.pad
            where = "" if layer is None else f"layer {layer} / "
            return f"{where}{site} at position {position}"
    return None
