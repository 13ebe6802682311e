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
from typing import Any, Literal

import ml_dtypes
import torch
from torch import Tensor, nn

from kvdrift.engines.recorded_rows import OPERANDS, RESULTS, RecordedRows, are_same, site_inside_attention
from kvdrift.engines.torch.armed import Armed
from kvdrift.engines.torch.arrays import to_array, to_tensor
from kvdrift.engines.torch.experts import Routed, are_experts, choice_of, exact_experts
from kvdrift.engines.torch.frames import Lane
from kvdrift.engines.torch.fused import Pick
from kvdrift.engines.torch.linear import (
    UnknownWeight,
    exact_product,
    has_adapter,
    is_linear,
    is_plain,
    last_of,
    of_partial_sums,
    row_of,
)
from kvdrift.engines.torch.recorder import TorchRecorder
from kvdrift.engines.torch.residual import first_tensor
from kvdrift.engines.torch.roles import LayerRoles, ModelRoles
from kvdrift.engines.torch.rounded import note_of
from kvdrift.engines.torch.unit_rows import CONVOLUTIONS, may_be_product, measured_product, require_product
from kvdrift.trace.model import MEASURED, ProductRecord, Trace
from kvdrift.vocabulary.sites import Site

_NORMS = frozenset({Site.ATTN_NORM_OUT, Site.FFN_NORM_OUT})
# From this share of itself on a result may be that of a row without the gains of its norm; with them it leaves an
# eighth of that at most.
_OTHER_OPERAND, _LEFT_MOST = 1.0 / 16.0, 1.0 / 8.0

Kind = Literal["known", "router", "may", "experts"]


@dataclass(slots=True)
class _Product:
    """One linear module, or one that may be; `parts` are the sites that parts of its output belong to, the whole of it
    where None.

    `kind` says how its exact result is had: by its weight, as `known` for sure or as a `router` has it; by measuring
    what it multiplies by, if it `may` be a product; or as that of `experts` in one tensor. `within` is the one
    of a list of experts that it belongs to, which gets some of the tokens.
    """

    module: nn.Module
    layer: int | None
    name: str
    site: Site
    parts: tuple[tuple[Site, Pick | None], ...] = ()
    kind: Kind = "known"
    within: nn.Module | None = None
    operand: Site | None = None
    is_result: bool = False
    is_matched: bool = False


@dataclass(slots=True)
class _Taken:
    """The rows [position, feature] that went into a product in one call, and the records that wait for its result.

    `is_beside` says that its result is not what is recorded of its site, but stands beside that. `adapter` is the one
    that these rows asked for, None where the product has one for all rows of a batch.
    """

    product: _Product
    sink: Trace
    positions: tuple[int, ...]
    x: Tensor
    y: Tensor
    n_axes: int
    records: list[tuple[ProductRecord, Pick | None]]
    choice: Routed | None = None
    is_beside: bool = False
    adapter: str | None = None


@dataclass(slots=True)
class ProductRecorder:
    """The products of one model.

    Attributes:
        vocab_size: how many logits a token has: tells the head of a model that does not name it.
        unknown: by module, the products whose weight cannot be known, and why.
    """

    model: nn.Module
    roles: ModelRoles
    recorder: TorchRecorder
    vocab_size: int | None = None
    unknown: dict[int, tuple[_Product, str]] = field(default_factory=dict)
    _found: list[_Product] | None = None
    _seen: list[_Taken] = field(default_factory=list)
    _lists: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)  # a module, and each expert of its list
    _fed: dict[int, Tensor] = field(default_factory=dict)  # the rows that such a module got
    _inside: dict[int, tuple[int, Tensor, Tensor]] = field(default_factory=dict)  # how many rows, which probes, where

    @contextmanager
    def recorded(self, *, in_parts: bool) -> Iterator[None]:
        """Record the products of every pass that runs inside the context; at its end they are computed exactly.

        With `in_parts` the spread is that of partial sums in the dtype of the results.
        """
        if self._found is None:
            self._found = list(self._find())
        handles = [
            product.module.register_forward_hook(self._watch(product), with_kwargs=True) for product in self._found
        ]
        for owner, expert in self._lists:
            handles += [
                owner.register_forward_pre_hook(self._enter_owner, with_kwargs=True),
                expert.register_forward_pre_hook(self._enter_expert(owner), with_kwargs=True),
            ]
        try:
            yield
            self._settle(in_parts)
        finally:
            self._seen.clear()
            self._fed.clear()
            self._inside.clear()
            for handle in handles:
                handle.remove()

    def _find(self) -> Iterator[_Product]:
        known: set[int] = set()
        for layer in self.roles.layers:
            attention = _ids(layer.attention) if layer.attention is not None else set[int]()
            within = self._find_lists(layer.module)
            for name, module in layer.module.named_modules():
                kind = None if id(module) in known or module is layer.attention else _kind_of(module, layer)
                if kind is None:
                    if id(module) not in known and _holds_matrices(module):
                        self._unknown(_Product(module, layer.index, name, Site.MLP_OUT))
                    continue
                known |= {id(module)} if kind == "may" else _ids(module)
                parts = tuple((tap.site, tap.pick) for tap in layer.taps if tap.module is module and tap.when == "out")
                parts = () if kind == "experts" else parts
                site = site_inside_attention(name) if id(module) in attention else Site.MLP_OUT
                yield _Product(module, layer.index, name, site, parts, kind, within.get(id(module)))
            known |= _ids(layer.module)
        for name, module in self.model.named_modules():
            if id(module) not in known and is_linear(module) and _is_head(module, self.model, self.vocab_size):
                known |= _ids(module)
                yield _Product(module, None, name, Site.LOGITS)

    def _unknown(self, product: _Product) -> None:
        self.unknown[id(product)] = (product, "which token goes to which of its matrices was not recorded")

    def _find_lists(self, layer: nn.Module) -> dict[int, nn.Module]:
        """Note the lists of experts of a layer; return the expert of each module in them."""
        found: dict[int, nn.Module] = {}
        for owner in layer.modules():
            for items in (child for child in owner.children() if isinstance(child, nn.ModuleList)):
                if len(items) > 1 and all(any(is_linear(part) for part in item.modules()) for item in items):
                    self._lists += [(owner, item) for item in items]
                    found |= {inner: item for item in items for inner in _ids(item)}
        return found

    def _enter_owner(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = first_tensor(args, kwargs)
        if x is not None and self.recorder.call is not None:
            self._fed[id(module)] = x.detach().reshape(-1, x.shape[-1])

    def _enter_expert(self, owner: nn.Module) -> Callable[..., None]:
        """Find out which of the probed tokens an expert gets, by their rows: equal rows have equal results."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            call, x, fed = self.recorder.call, first_tensor(args, kwargs), self._fed.get(id(owner))
            self._inside.pop(id(module), None)
            if call is None or x is None or fed is None or len(call.lanes) != 1 or x.shape[-1] != fed.shape[-1]:
                return
            with torch._C.DisableTorchFunction():
                rows, probed = x.detach().reshape(-1, x.shape[-1]), call.lanes[0].row_index
                if len(fed) == call.q_len:
                    same = (fed[probed][:, None] == rows[None]).all(-1)
                    got = same.any(1)
                    self._inside[id(module)] = len(rows), got, same[got].int().argmax(1)

        return enter

    def _watch(self, product: _Product) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = self.recorder.call
            x = first_tensor(args, kwargs)
            if call is None or x is None or not call.lanes or not x.is_floating_point():
                return
            if product.kind == "may" and (len(args) != 1 or kwargs):
                return  # what it computes is no function of a row alone
            if call.layers is not None and product.layer is not None and product.layer not in call.layers:
                return
            with torch._C.DisableTorchFunction():
                choice = None
                if product.kind == "experts":
                    choice = choice_of((*args, *kwargs.values()), x.numel() // x.shape[-1])
                    if choice is None:
                        return self._unknown(product)
                is_first = product.kind == "router" and type(output) is tuple
                last = last_of(output, int(getattr(module, "out_features", 0)))
                y = last if last is not None else first_tensor(output, {}) if is_first else row_of(output)
                if y is not None:
                    named = tuple(kwargs.get("adapter_names") or ())
                    self._keep(product, call, x, y, choice, is_beside=last is not None, named=named)
            return None

        return after

    def _keep(
        self,
        product: _Product,
        call: Armed,
        x: Tensor,
        y: Tensor,
        choice: Routed | None,
        *,
        is_beside: bool,
        named: tuple[str, ...],
    ) -> None:
        n_axes = x.ndim
        if call.n_rows > 1 and call.n_real is not None and n_axes == 3 and len(x) == len(y) == call.n_rows:
            x, y = x[call.row], y[call.row]
        elif call.n_rows != 1:
            return
        if n_axes not in (2, 3) or y.numel() // y.shape[-1] != x.numel() // x.shape[-1]:
            return
        x, y = x.detach().reshape(-1, x.shape[-1]), y.detach().reshape(-1, y.shape[-1])
        for lane in call.lanes:
            found = self._rows_of(product, call, lane, len(x)) if lane.positions else None
            if found is None or not isinstance(lane.sink, Trace):
                continue
            index, positions = found
            # Of a single row a copy is enough, since the model may go on in place.
            fed, rows = (x.clone(), y.clone()) if len(x) == 1 == len(positions) else (x[index], y[index])
            parts = product.parts or ((product.site, None),)
            parts = ((parts[0][0], None),) if is_beside else parts
            records = [
                (ProductRecord(product.layer, site, product.name, positions, to_array(_picked(rows, pick))), pick)
                for site, pick in parts
            ]
            lane.sink.products.extend(record for record, _ in records)
            chosen = None if choice is None else Routed(choice.experts[index], choice.weights[index])
            adapter = named[lane.row] if lane.row < len(named) else None
            taken = _Taken(product, lane.sink, positions, fed, rows, n_axes, records, chosen, is_beside, adapter)
            self._seen.append(taken)

    def _rows_of(
        self, product: _Product, call: Armed, lane: Lane, n_rows: int
    ) -> tuple[Tensor, tuple[int, ...]] | None:
        """The rows of the probed tokens among those that a product got, and their positions; None: there are none."""
        index = lane.row_index
        if product.within is not None:
            n_known, got, at = self._inside.get(id(product.within), (0, index.bool(), index))
            positions = tuple(p for p, is_here in zip(lane.positions, got.tolist(), strict=True) if is_here)
            return (at, positions) if n_known == n_rows and positions else None
        if product.layer is None and n_rows != call.q_len:
            # The head gets the wanted tokens alone: the probed ones and the last.
            wanted = torch.unique(torch.cat([index, index.new_tensor([call.q_len - 1])]))
            return (torch.searchsorted(wanted, index), lane.positions) if n_rows == len(wanted) else None
        return (index, lane.positions) if n_rows == call.q_len else None

    def _settle(self, in_parts: bool) -> None:
        """Compute the exact result of everything that was seen, product by product."""
        recorded = RecordedRows()
        together: dict[int, list[_Taken]] = defaultdict(list)
        for seen in self._seen:
            together[id(seen.product)].append(seen)
        for group in together.values():
            product = group[0].product
            if in_parts and product.kind == "experts":
                continue  # what is rounded before the gate is drawn for half precision alone
            self._match(product, group, recorded)
            operands = torch.cat([_operand(seen, recorded) for seen in group])
            try:
                reference, spread, note = _exact(product, operands, group)
                if (regained := self._regained(product, group, operands, reference)) is not None:
                    reference, spread, note = _exact(product, regained, group)
            except UnknownWeight as error:
                self.unknown[id(product)] = (product, str(error))
                continue
            if in_parts:
                spread = of_partial_sums(reference, spread, operands.shape[-1])
            start = 0
            for seen in group:
                here = slice(start, start + len(seen.positions))
                start = here.stop
                for record, pick in seen.records:
                    exact, size = (_picked(each[here], pick) for each in (reference, spread))
                    record.reference, record.note = to_array(exact.float()), note
                    record.spread = to_array(size.float()).astype(ml_dtypes.bfloat16)
                    if (product.parts and not seen.is_beside) or product.is_result:
                        record.values = None  # what was recorded of the site, which may be more than the module gave

        for sink in {id(seen.sink): seen.sink for seen in self._seen}.values():
            sink.products += [
                ProductRecord(product.layer, product.site, product.name, (), note=why)
                for product, why in self.unknown.values()
            ]

    def _regained(self, product: _Product, group: list[_Taken], operands: Tensor, reference: Tensor) -> Tensor | None:
        """The operands with the gains of a norm that a call multiplies into its weights, None if none does.

        The module is then given the row without these gains. They are those of the norm that prefill's operand comes
        from, so that nothing is fitted: the product of the row with them is the result, or it is another fault.
        """
        taps = [] if product.layer is None else self.roles.layers[product.layer].taps
        norm = next((tap.module for tap in taps if tap.site is product.operand), None)
        if product.operand not in _NORMS or norm is None or product.kind != "known":
            return None
        multiply = partial(exact_product, product.module, adapter=_adapter_of(group))
        found, start = operands, 0
        for seen in group:
            here = slice(start, start + len(seen.positions))
            start = here.stop
            off = _off(seen.y, reference[here])
            for given in _with_gains(norm, operands[here]) if off > _OTHER_OPERAND else ():
                try:
                    left = _off(seen.y, multiply(given)[0])
                except UnknownWeight:  # the reference was measured
                    return None
                if left <= _LEFT_MOST * off:
                    found = found.to(given.dtype) if found is not operands else found.to(given.dtype).clone()
                    found[here] = given
        return None if found is operands else found

    def _match(self, product: _Product, group: list[_Taken], recorded: RecordedRows) -> None:
        """Find out, in the first prefill, which recorded row is the operand and which is the result."""
        first = next((seen for seen in group if seen.sink.pass_name == "prefill"), None)
        if product.is_matched or first is None:
            return
        product.is_matched = True
        x = to_array(first.x)
        for site in OPERANDS:
            if are_same(recorded.at(first.sink, product.layer, site, first.positions), x):
                product.operand = site
        for site in () if product.parts else RESULTS:
            record = first.records[0][0]
            if are_same(recorded.at(first.sink, product.layer, site, first.positions), record.values):
                product.site, product.is_result = site, True
        for seen in group:
            for record, _ in seen.records:
                record.site = record.site if product.parts else product.site


def _with_gains(norm: nn.Module, rows: Tensor) -> Iterator[Tensor]:
    """Rows [row, feature] of a norm that has no weights times those of `norm`, and its bias added."""
    weights = {name: each.double() for name, each in norm.named_parameters(recurse=False) if each.ndim == 1}
    bias = weights.pop("bias", None)
    for weight in weights.values():
        for gain in (weight, 1.0 + weight):
            if len(gain) == rows.shape[-1]:
                yield rows.double() * gain + (0.0 if bias is None else bias)


def _off(values: Tensor, exact: Tensor) -> float:
    """How far results are from the exact ones, relative to their size; 0 where that cannot be told."""
    if values.shape != exact.shape:
        return 0.0
    size = float(exact.norm())
    return float((values.double() - exact).norm()) / size if size > 0.0 else 0.0


def _operand(seen: _Taken, recorded: RecordedRows) -> Tensor:
    site = seen.product.operand
    rows = None if site is None else recorded.at(seen.sink, seen.product.layer, site, seen.positions)
    return seen.x if rows is None or rows.shape != tuple(seen.x.shape) else to_tensor(rows, seen.x.device)


def _exact(product: _Product, operands: Tensor, group: Sequence[_Taken]) -> tuple[Tensor, Tensor, str | None]:
    """Return the exact results of rows [row, in], their spread, and what there is to say of them.

    Raises:
        UnknownWeight: the weight cannot be read, and what the module computes is no product.
    """
    why = None
    if product.kind == "experts":
        reference, spread = exact_experts(product.module, operands, _together(group))
        _require(group, reference, spread)
        return reference, spread, None
    if product.kind != "may":
        try:
            is_sure = product.kind == "known" and is_plain(product.module)
            multiply = partial(exact_product, product.module, adapter=_adapter_of(group))
            return _noted(multiply, operands, group, None, is_sure=is_sure)
        except UnknownWeight as error:
            why = str(error)
    multiply = partial(measured_product, product.module, n_axes=group[0].n_axes)
    try:
        return _noted(multiply, operands, group, MEASURED, is_sure=False)
    except UnknownWeight as error:
        raise UnknownWeight(f"{why}, and {error}" if why else str(error)) from error


def _adapter_of(group: Sequence[_Taken]) -> str | None:
    """The adapter that rows are held against: that of prefill, whose operand is taken as well."""
    return next((seen.adapter for seen, _ in _of_prefill(group)), None)


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
    if not is_sure or any(seen.is_beside or seen.y.shape[-1] != reference.shape[-1] for seen in group):
        _require(group, reference, spread)
    note = known
    for seen, here in _of_prefill(group):
        if note == known:
            rounded = note_of(lambda x: multiply(x)[0], operands[here], seen.y, reference[here])
            note = "; ".join(filter(None, (known, rounded))) or None
    return reference, spread, note


def _of_prefill(group: Sequence[_Taken]) -> Iterator[tuple[_Taken, slice]]:
    """The rows of prefills, and where they are among all of a group."""
    start = 0
    for seen in group:
        here = slice(start, start + len(seen.positions))
        start = here.stop
        if seen.sink.pass_name == "prefill":
            yield seen, here


def _require(group: Sequence[_Taken], reference: Tensor, spread: Tensor) -> None:
    for seen, here in _of_prefill(group):
        require_product(seen.y, reference[here], spread[here])


def _together(group: Sequence[_Taken]) -> Routed:
    chosen = [seen.choice for seen in group if seen.choice is not None]
    return Routed(torch.cat([item.experts for item in chosen]), torch.cat([item.weights for item in chosen]))


def _picked(rows: Tensor, pick: Pick | None) -> Tensor:
    return rows if pick is None else pick(rows)


def _kind_of(module: nn.Module, layer: LayerRoles) -> Kind | None:
    """How the exact result of a module can be had, None if it is no product."""
    if is_linear(module):
        return "known"
    if are_experts(module):
        return "experts"
    if any(tap.site is Site.ROUTER and tap.module is module for tap in layer.taps):
        weight = getattr(module, "weight", None)
        return "router" if isinstance(weight, Tensor) and weight.ndim == 2 else None
    return "may" if may_be_product(module) and not _holds_matrices(module) else None


def _holds_matrices(module: nn.Module) -> bool:
    """Whether a module holds several matrices in one tensor."""
    return not isinstance(module, CONVOLUTIONS) and any(w.ndim == 3 for w in module.parameters(recurse=False))


def _ids(module: nn.Module) -> set[int]:
    return {id(item) for item in module.modules()}


def _is_head(module: nn.Module, model: Any, vocab_size: int | None) -> bool:
    """Whether a product outside the layers gives the logits."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if module is head or (has_adapter(module) and getattr(module, "base_layer", None) is head):
        return True
    return head is None and vocab_size is not None and getattr(module, "out_features", None) == vocab_size


__all__ = ["ProductRecorder"]
