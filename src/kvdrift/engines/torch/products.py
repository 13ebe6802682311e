"""Products with weights that the model holds, recorded with what they are in exact arithmetic.

While a product runs, the probed rows of its operand and result are kept. The exact results of all passes of a prompt
are computed together, so that every weight is widened once, a block of its rows at a time.

The operand is the row that was recorded of the site before, wherever prefill hands on that row unchanged; what changes
it on the way in decode is then part of the product. In the same way the result is the recorded row of its site.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from kvdrift.engines.torch.arrays import to_array, to_tensor
from kvdrift.engines.torch.linear import UnknownWeight, exact_product, has_adapter, is_linear, is_plain, row_of
from kvdrift.engines.torch.recorder import Armed, TorchRecorder, first_tensor
from kvdrift.engines.torch.roles import ModelRoles, Pick
from kvdrift.engines.torch.rounded import note_of
from kvdrift.engines.torch.unit_rows import CONVOLUTIONS, may_be_product, measured_product, require_product
from kvdrift.trace.model import MEASURED, Array, ProductRecord, Trace
from kvdrift.vocabulary.sites import Site

# Sites that hand a row on to a product, and sites that are the result of one.
_OPERANDS = (Site.ATTN_NORM_OUT, Site.ATTN_CTX, Site.FFN_NORM_OUT, Site.FINAL_NORM_OUT)
_RESULTS = (Site.ATTN_OUT, Site.MLP_OUT, Site.LOGITS)
_BY_NAME = ((Site.Q_PROJ, "q"), (Site.K_PROJ, "k"), (Site.V_PROJ, "v"))


@dataclass(slots=True)
class _Product:
    """One linear module, or one that may be; `parts` are the sites that parts of its output belong to, the whole of it
    where None. The kind of its weights is known, or they are measured."""

    module: nn.Module
    layer: int | None
    name: str
    site: Site
    parts: tuple[tuple[Site, Pick | None], ...] = ()
    is_known: bool = True
    operand: Site | None = None
    is_result: bool = False
    is_matched: bool = False


@dataclass(slots=True)
class _Taken:
    """The rows [position, feature] that went into a product in one call, and the records that wait for its result."""

    product: _Product
    sink: Trace
    positions: tuple[int, ...]
    x: Tensor
    y: Tensor
    n_axes: int
    records: list[tuple[ProductRecord, Pick | None]]


@dataclass(slots=True)
class ProductRecorder:
    """The products of one model; `unknown` holds, by module, those whose weight cannot be known, and why."""

    model: nn.Module
    roles: ModelRoles
    recorder: TorchRecorder
    unknown: dict[int, tuple[_Product, str]] = field(default_factory=dict)
    _found: list[_Product] | None = None
    _seen: list[_Taken] = field(default_factory=list)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the products of every pass that runs inside the context; at its end they are computed exactly."""
        if self._found is None:
            self._found = list(self._find())
        handles = [
            product.module.register_forward_hook(self._watch(product), with_kwargs=True) for product in self._found
        ]
        try:
            yield
            self._settle()
        finally:
            self._seen.clear()
            for handle in handles:
                handle.remove()

    def _find(self) -> Iterator[_Product]:
        known: set[int] = set()
        for layer in self.roles.layers:
            attention = _ids(layer.attention) if layer.attention is not None else set[int]()
            for name, module in layer.module.named_modules():
                if id(module) in known:
                    continue
                if not isinstance(module, CONVOLUTIONS) and any(w.ndim == 3 for w in module.parameters(recurse=False)):
                    product = _Product(module, layer.index, name, Site.MLP_OUT)
                    self.unknown[id(product)] = (product, "which token goes to which of its matrices was not recorded")
                is_known = is_linear(module)
                if not is_known and (module is layer.attention or not may_be_product(module)):
                    continue
                known |= _ids(module) if is_known else {id(module)}
                parts = tuple((tap.site, tap.pick) for tap in layer.taps if tap.module is module and tap.when == "out")
                site = _site_of(name) if id(module) in attention else Site.MLP_OUT
                yield _Product(module, layer.index, name, site, parts, is_known)
            known |= _ids(layer.module)
        for name, module in self.model.named_modules():
            if id(module) not in known and is_linear(module) and _is_head(module, self.model):
                known |= _ids(module)
                yield _Product(module, None, name, Site.LOGITS)

    def _watch(self, product: _Product) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = self.recorder.call
            x = first_tensor(args, kwargs)
            if call is None or x is None or not call.lanes or not x.is_floating_point():
                return
            if not product.is_known and (len(args) != 1 or kwargs):
                return  # what it computes is no function of a row alone
            if call.layers is not None and product.layer is not None and product.layer not in call.layers:
                return
            with torch._C.DisableTorchFunction():
                y = row_of(output)
                if y is not None:
                    self._keep(product, call, x, y)

        return after

    def _keep(self, product: _Product, call: Armed, x: Tensor, y: Tensor) -> None:
        if x.ndim not in (2, 3) or y.shape[:-1] != x.shape[:-1] or call.n_rows != 1:
            return
        n_axes = x.ndim
        x, y = x.detach().reshape(-1, x.shape[-1]), y.detach().reshape(-1, y.shape[-1])
        for lane in call.lanes:
            index = lane.row_index
            if product.layer is None and len(x) != call.q_len:
                # The head gets the wanted tokens alone: the probed ones and the last.
                wanted = torch.unique(torch.cat([index, index.new_tensor([call.q_len - 1])]))
                if len(x) != len(wanted):
                    continue
                index = torch.searchsorted(wanted, index)
            elif len(x) != call.q_len:
                continue
            if not isinstance(lane.sink, Trace):
                continue
            rows, parts = y[index], product.parts or ((product.site, None),)
            records = [
                (
                    ProductRecord(
                        product.layer,
                        site,
                        product.name,
                        lane.positions,
                        to_array(rows if pick is None else pick(rows)),
                    ),
                    pick,
                )
                for site, pick in parts
            ]
            lane.sink.products.extend(record for record, _ in records)
            self._seen.append(_Taken(product, lane.sink, lane.positions, x[index], rows, n_axes, records))

    def _settle(self) -> None:
        """Compute the exact result of everything that was seen, product by product."""
        recorded = _Recorded()
        together: dict[int, list[_Taken]] = defaultdict(list)
        for seen in self._seen:
            together[id(seen.product)].append(seen)
        for group in together.values():
            product = group[0].product
            self._match(product, group, recorded)
            operands = torch.cat([_operand(seen, recorded) for seen in group])
            try:
                reference, spread, note = _exact(product, operands, group)
            except UnknownWeight as error:
                self.unknown[id(product)] = (product, str(error))
                continue
            start = 0
            for seen in group:
                here = slice(start, start + len(seen.positions))
                start = here.stop
                for record, pick in seen.records:
                    exact, size = (each[here] if pick is None else pick(each[here]) for each in (reference, spread))
                    record.reference, record.note = to_array(exact.float()), note
                    record.spread = to_array(size.float()).astype(ml_dtypes.bfloat16)
                    if product.parts or product.is_result:
                        record.values = None  # what was recorded of the site, which may be more than the module gave

        for sink in {id(seen.sink): seen.sink for seen in self._seen}.values():
            sink.products += [
                ProductRecord(product.layer, product.site, product.name, (), note=why)
                for product, why in self.unknown.values()
            ]

    def _match(self, product: _Product, group: list[_Taken], recorded: _Recorded) -> None:
        """Find out, in the first prefill, which recorded row is the operand and which is the result."""
        first = next((seen for seen in group if seen.sink.pass_name == "prefill"), None)
        if product.is_matched or first is None:
            return
        product.is_matched = True
        x = to_array(first.x)
        for site in _OPERANDS:
            if _same(recorded.rows(first, site), x):
                product.operand = site
        for site in () if product.parts else _RESULTS:
            record = first.records[0][0]
            if _same(recorded.rows(first, site), record.values):
                product.site, product.is_result = site, True
        for seen in group:
            for record, _ in seen.records:
                record.site = record.site if product.parts else product.site


@dataclass(slots=True)
class _Recorded:
    """What was recorded of sites, found by place."""

    _by_sink: dict[int, dict[tuple[int | None, Site, int], Array]] = field(default_factory=dict)

    def rows(self, seen: _Taken, site: Site) -> Array | None:
        """Return the recorded rows [position, feature] of a site at the positions of a product; None: not recorded."""
        key = id(seen.sink)
        if key not in self._by_sink:
            self._by_sink[key] = {
                (record.layer, record.site, position): values
                for record in seen.sink.rows
                if record.site in _OPERANDS or record.site in _RESULTS
                for position, values in zip(record.positions, record.values, strict=True)
            }
        known = self._by_sink[key]
        places = [(seen.product.layer, site, position) for position in seen.positions]
        if any(place not in known for place in places):
            return None
        return np.stack([np.ravel(known[place]) for place in places])


def _operand(seen: _Taken, recorded: _Recorded) -> Tensor:
    site = seen.product.operand
    rows = None if site is None else recorded.rows(seen, site)
    return seen.x if rows is None or rows.shape != tuple(seen.x.shape) else to_tensor(rows, seen.x.device)


def _exact(product: _Product, operands: Tensor, group: Sequence[_Taken]) -> tuple[Tensor, Tensor, str | None]:
    """Return the exact results of rows [row, in], their spread, and what there is to say of them.

    Raises:
        UnknownWeight: the weight cannot be read, and what the module computes is no product.
    """
    why = None
    multiply = partial(exact_product, product.module)
    if product.is_known:
        try:
            return _noted(multiply, operands, group, None, is_sure=is_plain(product.module))
        except UnknownWeight as error:
            why = str(error)
    multiply = partial(measured_product, product.module, n_axes=group[0].n_axes)
    try:
        return _noted(multiply, operands, group, MEASURED, is_sure=False)
    except UnknownWeight as error:
        raise UnknownWeight(f"{why}, and {error}" if why else str(error)) from error


def _noted(
    multiply: Callable[[Tensor], tuple[Tensor, Tensor]],
    operands: Tensor,
    group: Sequence[_Taken],
    known: str | None,
    *,
    is_sure: bool,
) -> tuple[Tensor, Tensor, str | None]:
    """Multiply, and see that a weight that is not sure is the one that prefill multiplied by."""
    reference, spread = multiply(operands)
    note, start = known, 0
    for seen in group:
        here = slice(start, start + len(seen.positions))
        start = here.stop
        if seen.sink.pass_name != "prefill":
            continue
        if not is_sure:
            require_product(seen.y, reference[here], spread[here])
        if note == known:
            rounded = note_of(lambda x: multiply(x)[0], operands[here], seen.y, reference[here])
            note = "; ".join(filter(None, (known, rounded))) or None
    return reference, spread, note


def _same(rows: Array | None, values: Array | None) -> bool:
    """Whether two arrays hold the same bytes."""
    if rows is None or values is None:
        return False
    return rows.shape == values.shape and rows.dtype == values.dtype and rows.tobytes() == values.tobytes()


def _ids(module: nn.Module) -> set[int]:
    return {id(item) for item in module.modules()}


def _site_of(name: str) -> Site:
    """The site of a product inside attention whose result is none: that of the projection that its name begins like."""
    child = name.rpartition(".")[2]
    return next((site for site, letter in _BY_NAME if child.startswith(letter)), Site.ATTN_OUT)


def _is_head(module: nn.Module, model: Any) -> bool:
    """Whether a product outside the layers gives the logits."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if module is head or (has_adapter(module) and getattr(module, "base_layer", None) is head):
        return True
    config = getattr(model, "config", None)
    vocab = None if config is None else getattr(config.get_text_config(decoder=True), "vocab_size", None)
    return head is None and vocab is not None and getattr(module, "out_features", None) == vocab


__all__ = ["ProductRecorder"]
