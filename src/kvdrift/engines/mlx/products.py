"""Products of a model of mlx-lm with weights that it holds, recorded with what they are in exact arithmetic.

While a product runs, the probed rows of its operand and result are kept; the exact results of all passes of a prompt
are computed together, so that every weight is widened once. The operand is the row that was recorded of the site
before, wherever prefill hands on that row unchanged: what changes it on the way in decode is then part of the product.
In the same way the result is the recorded row of its site.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from kvdrift.engines.mlx.arrays import to_numpy
from kvdrift.engines.mlx.recorder import MLXCall, MLXRecorder
from kvdrift.engines.mlx.watched import parts_of, watched
from kvdrift.engines.partial_sums import of_partial_sums
from kvdrift.engines.recorded_rows import OPERANDS, RESULTS, RecordedRows, are_same, site_inside_attention
from kvdrift.trace.model import Array, ProductRecord, Trace
from kvdrift.vocabulary.sites import Site

Floats = NDArray[np.float64]

# What a product outside the layers is called that gives the logits; an embedding may be one.
_HEADS = ("lm_head", "embed_out", "output", "embed_tokens", "wte")
# Numbers of a weight matrix that are held at float64 at a time.
_BLOCK = 1 << 16


@dataclass(slots=True)
class _Linear:
    """One linear module; `is_part` says that what it gives is recorded at its site."""

    module: Any
    layer: int | None
    name: str
    site: Site
    is_part: bool = False
    operand: Site | None = None
    is_result: bool = False
    is_matched: bool = False


@dataclass(slots=True)
class _Fed:
    """The rows [position, feature] that went into a product in one call, and the record that waits for its result."""

    product: _Linear
    sink: Trace
    positions: tuple[int, ...]
    x: Array
    y: Array
    record: ProductRecord


@dataclass(slots=True)
class MLXProducts:
    """The products of one model."""

    model: Any
    layers: Sequence[Any]
    recorder: MLXRecorder
    _seen: list[_Fed] = field(default_factory=list)

    @contextmanager
    def recorded(self, *, in_parts: bool) -> Iterator[None]:
        """Record the products of every pass that runs inside the context; at its end they are computed exactly.

        With `in_parts` the spread is that of partial sums in the dtype of the results.
        """
        try:
            with ExitStack() as stack:
                for product in self._find():
                    look = _Look(self, product)
                    stack.enter_context(watched(product.module, look.before, look.after, method=_method_of(product)))
                yield
            self._settle(in_parts)
        finally:
            self._seen.clear()

    def _find(self) -> Iterator[_Linear]:
        known: set[int] = set()
        for index, layer in enumerate(self.layers):
            sites = {id(module): site for module, site in parts_of(layer)}
            attention = {id(each) for part in parts_of(layer) if part[1] is Site.ATTN_OUT for each in _inside(part[0])}
            for name, module in layer.named_modules():
                if not _is_linear(module) or id(module) in known:
                    continue
                known.add(id(module))
                site = sites.get(id(module), site_inside_attention(name) if id(module) in attention else Site.MLP_OUT)
                yield _Linear(module, index, name, site, is_part=id(module) in sites)
        for name, module in self.model.named_modules():
            if id(module) not in known and name.rpartition(".")[2] in _HEADS:
                known.add(id(module))
                if _is_linear(module) or _is_kind(module, (nn.Embedding, nn.QuantizedEmbedding)):
                    yield _Linear(module, None, name, Site.LOGITS)

    def keep(self, product: _Linear, x: Any, y: Any) -> None:
        """Keep the probed rows of a product's operand and result."""
        call = self.recorder.call
        if call is None or len(call.pads) != 1 or not isinstance(y, mx.array) or x.shape[:-1] != y.shape[:-1]:
            return
        if x.size != call.q_len * x.shape[-1] or not mx.issubdtype(x.dtype, mx.floating):
            return
        for lane in call.probed:
            if not isinstance(lane.sink, Trace) or not self.recorder.records(product.layer):
                continue
            fed, given = (_rows(each, call, call.columns(lane)) for each in (x, y))
            record = ProductRecord(product.layer, product.site, product.name, lane.positions, given)
            lane.sink.products.append(record)
            self._seen.append(_Fed(product, lane.sink, lane.positions, fed, given, record))

    def _settle(self, in_parts: bool) -> None:
        """Compute the exact result of everything that was seen, product by product."""
        rows = RecordedRows()
        together: dict[int, list[_Fed]] = defaultdict(list)
        for seen in self._seen:
            together[id(seen.product)].append(seen)
        for group in together.values():
            product = group[0].product
            _match(product, group, rows)
            operands = np.concatenate([_operand(seen, rows) for seen in group])
            reference, spread = _exact(product.module, operands)
            if in_parts:
                spread = of_partial_sums(reference, spread, operands.shape[-1])
            start = 0
            for seen in group:
                here = slice(start, start + len(seen.positions))
                start, record = here.stop, seen.record
                record.site = product.site
                record.reference = reference[here].astype(np.float32)
                record.spread = spread[here].astype(ml_dtypes.bfloat16)
                if product.is_part or product.is_result:
                    record.values = None  # what was recorded of the site, which may be more than the module gave


class _Look:
    """A look at the operand and the result of one product, call by call."""

    def __init__(self, products: MLXProducts, product: _Linear) -> None:
        self._products, self._product = products, product
        self._x: Any = None

    def before(self, x: Any) -> Any:
        """Keep what goes in."""
        self._x = x
        return x

    def after(self, out: Any) -> Any:
        """Note what came out of it."""
        x, self._x = self._x, None
        if isinstance(x, mx.array):
            self._products.keep(self._product, x, out)
        return out


def _match(product: _Linear, group: Sequence[_Fed], recorded: RecordedRows) -> None:
    """Find out, in the first prefill, which recorded row is the operand and which is the result."""
    first = next((seen for seen in group if seen.sink.pass_name == "prefill"), None)
    if product.is_matched or first is None:
        return
    product.is_matched = True
    for site in OPERANDS:
        if are_same(recorded.at(first.sink, product.layer, site, first.positions), first.x):
            product.operand = site
    for site in () if product.is_part else RESULTS:
        if are_same(recorded.at(first.sink, product.layer, site, first.positions), first.y):
            product.site, product.is_result = site, True


def _operand(seen: _Fed, recorded: RecordedRows) -> Array:
    rows = (
        None
        if seen.product.operand is None
        else recorded.at(seen.sink, seen.product.layer, seen.product.operand, seen.positions)
    )
    return seen.x if rows is None or rows.shape != seen.x.shape else rows


def _exact(module: Any, operands: Array) -> tuple[Floats, Floats]:
    """Return W x + b for the rows `operands` [row, in] in float64, and the root of the sum of its squared terms, both
    [row, out]. A packed weight is what mlx makes of it. NaN and infinity go where the arithmetic takes them."""
    x = operands.astype(np.float64)
    weight = module["weight"]
    if "scales" in module:
        sizes: dict[str, Any] = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        if (scale := module.get("global_scale")) is not None:
            sizes["global_scale"] = scale
        packed = (weight, module["scales"], module.get("biases"))
        weight = mx.dequantize(*packed, **sizes, dtype=mx.float32)
    n_out, n_in = weight.shape
    reference, squares = np.empty((len(x), n_out)), np.empty((len(x), n_out))
    step = max(1, _BLOCK // max(1, n_in))
    for start in range(0, n_out, step):
        here = slice(start, start + step)
        block = to_numpy(weight[here]).astype(np.float64)
        reference[:, here], squares[:, here] = x @ block.T, np.square(x) @ np.square(block).T
    if "bias" in module:
        bias = to_numpy(module["bias"]).astype(np.float64)
        reference, squares = reference + bias, squares + np.square(bias)
    return reference, np.sqrt(squares)


def _rows(x: Any, call: MLXCall, columns: Sequence[int]) -> Array:
    """The rows [position, feature] of some tokens of a call: their axis is the only one that is longer than one."""
    return to_numpy(mx.take(x.reshape(call.q_len, x.shape[-1]), mx.array(list(columns)), axis=0))


def _is_linear(module: Any) -> bool:
    """Whether a module is a product with one weight as mlx has it."""
    return _is_kind(module, (nn.Linear, nn.QuantizedLinear))


def _is_kind(module: Any, kinds: tuple[type[Any], ...]) -> bool:
    """Whether a module is one of mlx itself, watched or not; a class on top of it computes what it likes."""
    return isinstance(module, kinds) and type(module).__name__ in {kind.__name__ for kind in kinds}


def _method_of(product: _Linear) -> str:
    """What is called for the product: an embedding whose weight the head shares has a name of its own for it."""
    return "__call__" if _is_linear(product.module) else "as_linear"


def _inside(module: Any) -> Iterator[Any]:
    return (each for _, each in module.named_modules())


__all__ = ["MLXProducts"]
