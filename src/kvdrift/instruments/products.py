"""Exact products: each product with a weight of the model against float64 W x on the row that went into it.

The engine holds the weights, so it computes the reference, for each pass from that pass's own operand. What is left is
the rounding of the product's own kernel, whatever row it was given: no other site, layer or mode enters. Both passes
have an error of their own; prefill's is the noise of decode's, and decode's that of prefill's
(`kvdrift.instruments.exact` says what each may err by). So it is also known which pass is off.

The unit is the (prompt, position) pair. All rows of a place are exchangeable under H0: the same weight, kernels that
round alike whatever the token. The largest of them counts, so that no number of tests makes an alarm more likely than
the kernel's own spread does; no p-value is claimed.

Blind to: what both passes do wrong alike, which is told where it is more than rounding; sites that are no product with
a known weight; an error that is smaller than what partial sums in the native dtype would make.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from kvdrift.instruments.base import NOTHING, Judges, Panel, Run, Seen
from kvdrift.instruments.exact import LEAST, Sizes, bound_from, measure_errors, promised
from kvdrift.pairing.kernels import as_floats
from kvdrift.trace.model import MEASURED, Array, PassPair, ProductRecord, Trace
from kvdrift.trace.recording import RecordedPair
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.facts import OUTSIDE
from kvdrift.vocabulary.plan import PairRole
from kvdrift.vocabulary.precision import MEASURED_PRODUCTS, PRODUCT_ROUNDINGS, UNIT_ROUNDOFF
from kvdrift.vocabulary.sites import Site, forward_rank

_STATISTIC = "largest error of a product against float64 over what the other pass's and rounding let it be"
# Sites that are the result of a product with weights.
_SITES = (Site.Q_PROJ, Site.K_PROJ, Site.V_PROJ, Site.ATTN_OUT, Site.ROUTER, Site.MLP_OUT, Site.LOGITS)
_SHOWN = 4  # places that are named in a sentence
_MOST = 1 << 16  # elements that are measured at once: in float64 they fit the caches of a CPU


class Product(NamedTuple):
    """One product of the model; several may belong to one site."""

    layer: int | None
    site: Site
    name: str

    def __str__(self) -> str:
        return self.name if self.layer is None else f"layer {self.layer} / {self.name}"


@dataclass(frozen=True, slots=True)
class ProductRow:
    """The error of one product of one token in one pass."""

    product: Product
    prompt: str
    position: int
    sizes: Sizes
    relative: float

    @property
    def address(self) -> Address:
        """Where it belongs."""
        return Address(self.prompt, self.position, self.product.layer, self.product.site)


class Off(NamedTuple):
    """How a pass is off at a product: which pass, and the least and the largest error of a row, relative, in the
    2-norm."""

    side: str
    least: float
    largest: float


@dataclass(frozen=True, slots=True)
class ProductFindings:
    """What exact products show of one mode.

    Attributes:
        beyond: by address, the error over its bound.
        guilty: the pass that is off, None if none is, or if references that came out of the model itself cannot tell.
        coarse: products that err by more than their own rounding in both passes.
        notes: what is known of a product beside, such as why its weight is not.
        cancelling: rows whose terms cancel to less than their own rounding: beside the result, rounding may make more
            of it than of any other product.
        places: where products were measured.
    """

    beyond: dict[Address, float]
    guilty: Literal["decode", "prefill"] | None
    coarse: tuple[Product, ...]
    notes: Mapping[Product, str]
    evidence: Evidence
    cancelling: frozenset[Address] = frozenset()
    places: frozenset[Place] = frozenset()


def errors_of(trace: Trace, positions: Sequence[int], dtype: str) -> list[ProductRow]:
    """Return the errors of all products of a pass at some positions, at a half dtype."""
    wanted = set(positions)
    found: list[tuple[int, list[ProductRow]]] = []
    for part in _alike(trace.exact_products()):
        values, reference, spread = (np.concatenate([each.product[i] for each in part]) for i in (1, 2, 3))
        errors = measure_errors(values, as_floats(reference), as_floats(spread), dtype, UNIT_ROUNDOFF[dtype])
        start = 0
        for number, (item, *_) in part:
            product = Product(item.layer, item.site, item.name)
            rows = [
                ProductRow(product, trace.prompt, position, errors.sizes(index), float(errors.relative[index]))
                for index, position in enumerate(item.positions, start)
                if position in wanted
            ]
            found.append((number, rows))
            start += len(item.positions)
    found.sort(key=lambda each: each[0])
    return [row for _, rows in found for row in rows]


class _Numbered(NamedTuple):
    """One product of a pass, with its number among all of them."""

    number: int
    product: tuple[ProductRecord, Array, Array, Array]


def _alike(products: Iterable[tuple[ProductRecord, Array, Array, Array]]) -> Iterator[list[_Numbered]]:
    """Yield products of one width and dtype together, as many as are worth one computation and take little memory."""
    waiting: dict[tuple[object, ...], list[_Numbered]] = {}
    sizes: dict[tuple[object, ...], int] = defaultdict(int)
    for number, product in enumerate(products):
        _, values, reference, spread = product
        kind = (values.shape[1], values.dtype, reference.dtype, spread.dtype)
        waiting.setdefault(kind, []).append(_Numbered(number, product))
        sizes[kind] += values.size
        if sizes[kind] >= _MOST:
            sizes[kind] = 0
            yield waiting.pop(kind)
    yield from waiting.values()


def judge_products(
    prefill: Sequence[ProductRow],
    decode: Sequence[ProductRow],
    mode: str,
    notes: Mapping[Product, str],
    offered: Collection[Place] = (),
) -> ProductFindings:
    """Judge the products of a mode: each pass by the errors of the other at the same product.

    `offered` are the places that the model has; those of products that have no reference are named.
    """
    if not decode or not prefill:
        reason = f"no product was recorded with its operand and a weight that is known{_noted(notes)}"
        return ProductFindings({}, None, (), notes, Evidence.abstain("products", mode, _STATISTIC, reason))
    beyond, largest, minimum = _compared(prefill, decode)
    guilty: Literal["decode", "prefill"] | None = None
    if beyond["decode"] or beyond["prefill"]:
        guilty = "decode" if beyond["decode"] else "prefill"
    found = beyond[guilty] if guilty is not None else {}
    measured = {(product.layer, product.site) for product, note in notes.items() if note.startswith(MEASURED)}
    if found and all((address.layer, address.site) in measured for address in found):
        guilty = None
    coarse = _coarse(prefill, decode)
    products = {row.product for row in decode}
    judged = {Place(product.layer, product.site) for product in products}
    without = sorted({place for place in offered if place.site in _SITES} - judged, key=lambda p: p.forward_rank)
    return ProductFindings(
        found,
        guilty,
        coarse,
        notes,
        Evidence(
            instrument="products",
            mode=mode,
            statistic_name=_STATISTIC,
            statistic=largest,
            bound=1.0,
            supports="H1" if found else "H0",
            minimum_detectable=max(minimum.values(), default=None),
            text=_text(found, guilty, coarse, len(products), notes) + _named_without(without),
            detail={
                "n_products": len(products),
                "n_rows": len(decode),
                "n_beyond": len(found),
                "guilty": guilty,
                "coarse": [str(product) for product in coarse],
                "minimum_by_site": {str(site): size for site, size in minimum.items()},
                "without": [str(place) for place in without],
                "notes": {str(product): note for product, note in notes.items()},
            },
        ),
    )


def _compared(
    prefill: Sequence[ProductRow], decode: Sequence[ProductRow]
) -> tuple[dict[str, dict[Address, float]], float, dict[Site, float]]:
    """What is beyond its bound by pass, the largest error over its bound, and the minimum by site."""
    bounds = {"decode": _bounds(prefill), "prefill": _bounds(decode)}
    beyond: dict[str, dict[Address, float]] = {"decode": {}, "prefill": {}}
    largest = 0.0
    minimum: dict[Site, float] = defaultdict(float)
    for name, rows in (("decode", decode), ("prefill", prefill)):
        for row in rows:
            bound = bounds[name].get(row.product, LEAST)
            over = row.sizes.over(bound).worst
            largest = max(largest, over)
            if not over <= 1.0:
                beyond[name][row.address] = max(over, beyond[name].get(row.address, 0.0))
            elif name == "decode" and np.isfinite(row.relative):
                minimum[row.product.site] = max(minimum[row.product.site], promised(bound, row.relative))
    return beyond, largest, minimum


def _bounds(noise: Sequence[ProductRow]) -> dict[Product, Sizes]:
    """What a pass may err by at each product, by the errors of the other one."""
    by_product: dict[Product, list[Sizes]] = defaultdict(list)
    for row in noise:
        by_product[row.product].append(row.sizes)
    return {product: bound_from(sizes) for product, sizes in by_product.items()}


def _coarse(prefill: Sequence[ProductRow], decode: Sequence[ProductRow]) -> tuple[Product, ...]:
    """The products that err by more than their own rounding at every token of both passes."""
    least: dict[Product, list[float]] = defaultdict(list)
    for row in (*prefill, *decode):
        least[row.product].append(row.sizes.row)
    found = (product for product, rows in least.items() if min(rows) > 1.0)
    return tuple(sorted(found, key=lambda product: (forward_rank(product.layer, product.site), product.name)))


def _text(
    found: dict[Address, float],
    guilty: str | None,
    coarse: Sequence[Product],
    n_products: int,
    notes: Mapping[Product, str],
) -> str:
    text = f"{n_products} products with weights of the model against float64 on the same operands: "
    if found:
        places = {(address.layer, address.site) for address in found}
        side = f"{guilty} is" if guilty is not None else "one of the passes is"
        text += f"{side} off at {len(found)} rows of {len(places)} sites"
    else:
        text += "both passes err as rounding does"
    unexplained = [product for product in coarse if product not in notes]
    if unexplained:
        text += f"; {_named(unexplained)} err by more than their own rounding in both passes alike"
    return text + _noted(notes)


def _named_without(places: Sequence[Place]) -> str:
    layers: dict[Site, int] = defaultdict(int)
    for place in places:
        layers[place.site] += 1
    named = ", ".join(f"{site} of {n} layers" if n > 1 else str(site) for site, n in layers.items())
    return f"; without an exact reference: {named}" if named else ""


def _named(products: Sequence[Product]) -> str:
    named = ", ".join(str(product) for product in products[:_SHOWN])
    return named + (f" and {len(products) - _SHOWN} more" if len(products) > _SHOWN else "")


def _noted(notes: Mapping[Product, str]) -> str:
    """What is known beside of products, those of one note together."""
    by_note: dict[str, list[Product]] = defaultdict(list)
    for product, note in notes.items():
        by_note[note].append(product)
    return "".join(f"; {_named(products)}: {note}" for note, products in by_note.items())


def _offered(run: Run) -> set[Place]:
    """The places of a model, as far as its engine says which it has."""
    return {
        Place(None if layer == OUTSIDE else int(layer), site)
        for layer, sites in run.info.sites.items()
        for site in sites
    }


@dataclass(slots=True)
class Products:
    """Measures every product that was recorded with its exact result."""

    name: ClassVar[str] = "products"
    judges: ClassVar[Judges] = "mode"
    decode: dict[str, list[ProductRow]] = field(default_factory=dict)
    prefill: dict[str, list[ProductRow]] = field(default_factory=dict)
    notes: dict[Product, str] = field(default_factory=dict)
    _last: tuple[Trace, list[ProductRow]] | None = field(default=None, repr=False)

    def see(self, item: RecordedPair, run: Run) -> None:
        """Measure both passes of a native pair."""
        pair, native = item.pair, run.info.dtype
        if item.role is not PairRole.PAIR or native not in MEASURED_PRODUCTS or pair.prefill.rung != native:
            return
        for record in (*pair.prefill.products, *pair.decode.products):
            if record.note is not None:
                self.notes[Product(record.layer, record.site, record.name)] = record.note
        self.decode.setdefault(pair.mode, []).extend(errors_of(pair.decode, pair.positions, native))
        if self._last is None or self._last[0] is not pair.prefill:  # two modes share a prefill
            self._last = (pair.prefill, errors_of(pair.prefill, pair.positions, native))
        self.prefill.setdefault(pair.mode, []).extend(self._last[1])

    def suspected(self, pair: PassPair, run: Run) -> list[Address]:
        """Return the rows of a pair that are off by the errors of its own prefill, or decode."""
        prefill, decode = (
            [row for row in rows.get(pair.mode, ()) if row.prompt == pair.prefill.prompt]
            for rows in (self.prefill, self.decode)
        )
        if not prefill or not decode:
            return []
        beyond, _, _ = _compared(prefill, decode)
        return list(beyond["decode"] or beyond["prefill"])

    def at(self, mode: str, place: Place) -> dict[str, Off | None]:
        """Return, by the name of each product at a place, how a pass is off there; None: neither is."""
        rows = {
            side: [row for row in known.get(mode, ()) if (row.product.layer, row.product.site) == place]
            for side, known in (("decode", self.decode), ("prefill", self.prefill))
        }
        found: dict[str, Off | None] = {}
        for name in dict.fromkeys(row.product.name for row in rows["decode"]):
            named = {side: [row for row in known if row.product.name == name] for side, known in rows.items()}
            if not all(named.values()):
                continue
            beyond, _, _ = _compared(named["prefill"], named["decode"])
            side = next((side for side in named if beyond[side]), None)
            errors = (
                [row.sizes.row * row.relative for row in named[side] if row.address in beyond[side]] if side else []
            )
            found[name] = Off(side, min(errors), max(errors)) if side else None
        return found

    def minimum(self, mode: str, layer: int | None) -> float:
        """Return the least relative error that every product of a layer shows in decode; infinite if none was
        measured."""
        prefill, decode = (
            [row for row in known.get(mode, ()) if row.product.layer == layer] for known in (self.prefill, self.decode)
        )
        _, _, minimum = _compared(prefill, decode)
        return max(minimum.values(), default=np.inf)

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """Judge the products of a mode, where the engine recorded any."""
        self._last = None
        if not self.decode.get(mode):
            return NOTHING
        found = judge_products(self.prefill[mode], self.decode[mode], mode, self.notes, _offered(run))
        least = PRODUCT_ROUNDINGS * run.info.arithmetic.unit
        rows = (row for row in (*self.decode[mode], *self.prefill[mode]) if row.relative > least)
        places = frozenset(row.address.place for row in self.decode[mode])
        found = replace(found, cancelling=frozenset(row.address for row in rows), places=places)
        begins = sorted(found.beyond, key=lambda address: forward_rank(address.layer, address.site))
        return Seen(evidence=(found.evidence,), begins=tuple(begins), beyond=tuple(begins), found=found)
