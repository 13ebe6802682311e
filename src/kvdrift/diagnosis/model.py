"""What an explanation has to work with, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from kvdrift.pairing.slots import without_copies
from kvdrift.trace.model import CacheRead, PassPair, Slots, Trace
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.facts import AttentionSpec
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF, Arithmetic
from kvdrift.vocabulary.sites import CACHE_SITES, Site

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Values:
    """What one pass computed in one layer, by site and position, as recorded: NaN stays NaN.

    Attributes:
        sites: float64 vectors [feature], attention rows [head, key column].
        slots: of attention rows, the logical position [key column].
        reads: rows of the cache [slot, head, dim] that the position read.
        products: results of products with weights, by name and position, float64 [feature]; at the native dtype alone.
    """

    sites: dict[tuple[Site, int], Floats]
    slots: dict[tuple[Site, int], Slots]
    reads: dict[tuple[Site, int], CacheRead]
    products: dict[tuple[str, int], Floats] = field(default_factory=dict)

    def at(self, site: Site, position: int) -> Floats | None:
        """Return the values of a site at a position, None if it was not captured."""
        return self.sites.get((site, position))

    @property
    def recorded(self) -> set[Site]:
        """The sites of which anything was recorded."""
        return {site for site, _ in (*self.sites, *self.reads)}


@dataclass(frozen=True, slots=True)
class Suspect:
    """Both passes in the layer where a mismatch begins, at one rung. Position `address.position` failed first;
    `positions` are all those that both passes have.

    Of other layers it keeps what a mix-up of layers needs and no more: `neighbours`, rows that other layers read at the
    position that failed first (decode's before prefill's; of each pass those of the layer whose rows are nearest to
    what decode has there), and `windows`, the sliding windows of all layers. Where the address lies behind the layers,
    the sites hold what the last layer handed to the final norm. `unit` is the unit roundoff of what is computed at the
    address. `fed_alone` says whether the decode call of the address was fed one token of one sequence.
    """

    address: Address
    rung: str
    positions: tuple[int, ...]
    prefill: Values
    decode: Values
    spec: AttentionSpec | None
    neighbours: tuple[CacheRead, ...] = ()
    windows: tuple[int, ...] = ()
    unit: float = UNIT_ROUNDOFF["float64"]
    fed_alone: bool = True

    @property
    def others(self) -> tuple[int, ...]:
        """All positions but the one that failed first, to test an explanation on data that it was not fitted to."""
        return tuple(p for p in self.positions if p != self.address.position)


# The share of the difference that an explanation must remove, and what it must however much rounding may have made.
ENOUGH, LEAST_ENOUGH = 0.999, 0.8
# How much an explanation commits itself to. Where several explain a difference equally well, the one wins that leaves
# the least to be fitted.
GENERAL, NAMED, EXACT = 0, 1, 2


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """One explanation: the share of the squared difference that it removes (1 is all of it), and what it says.

    `rank` is GENERAL for one that would fit much else (a vector that is added, rows of unknown origin), NAMED for one
    with a parameter that is fitted, EXACT for one that has none to fit or is tested on data that it was not fitted to.
    `slots` are the cached positions that it is about, where it is about some.
    """

    explained: float
    cause: Cause = field(compare=False)
    text: str = field(compare=False)
    rank: int = field(default=NAMED, compare=False)
    slots: tuple[int, ...] = field(default=(), compare=False)


def share(prefill: Floats, decode: Floats, predicted: Floats) -> float:
    """Return the share of the squared difference of the passes that a prediction of decode explains.

    It is what the prediction removes. Where decode is nearer to zero than to prefill, anything small removes nearly all
    of the difference: a prediction that seems to be enough is then held against decode itself, and has 0 where it is no
    better than zeros. Without a difference, with unlike shapes or with values that are NaN or infinite: 0.

    Args:
        prefill: values of prefill, of any shape.
        decode: values of decode, of the same shape.
        predicted: what an explanation expects of decode, of the same shape.
    """
    found = removed(prefill, decode, predicted)
    if found < LEAST_ENOUGH:
        return found
    size, total = float(np.sum(decode**2)), float(np.sum((decode - prefill) ** 2))
    return 1.0 - (1.0 - found) * total / size if 0.0 < size < total else found


def removed(prefill: Floats, decode: Floats, predicted: Floats) -> float:
    """Return the share of the squared difference of the passes that a prediction of decode removes.

    It is 1 for a perfect prediction, and negative for one that is worse than prefill itself. Without a difference, with
    unlike shapes or with values that are NaN or infinite, nothing can be explained: 0. Arguments as of `share`.
    """
    if predicted.shape != decode.shape or prefill.shape != decode.shape:
        return 0.0
    total = float(np.sum((decode - prefill) ** 2))
    left = float(np.sum((decode - predicted) ** 2))
    if not np.isfinite(total) or not np.isfinite(left) or total == 0.0:
        return 0.0
    return 1.0 - left / total


def rounding_share(unit: float, prefill: Floats, decode: Floats) -> float:
    """Return the share, at most 1, of the squared difference of two arrays of one shape that rounding may make.

    `unit` is the unit roundoff of both. Without a difference, or with values that are NaN or infinite, it is 1.

    Both are rounded, and so is what they are computed from: two unit roundoffs an element are allowed, several times
    what is usual (an error of rounding has a root mean square of u / sqrt(3) at most).
    """
    total = float(np.sum((decode - prefill) ** 2))
    if not np.isfinite(total) or total == 0.0:
        return 1.0
    size = float(np.sum(prefill**2) + np.sum(decode**2))
    return min(1.0, (2.0 * unit) ** 2 * size / total)


def collect(pair: PassPair, address: Address, arithmetic: Arithmetic) -> Suspect:
    """Take what a diagnosis needs out of a pair of traces: one layer, all positions, and little of the others.

    `arithmetic` is that of the rung of the pair.
    """
    prefill, decode = _values(pair.prefill, address.layer), _values(pair.decode, address.layer)
    for key in prefill.reads.keys() & decode.reads.keys():
        prefill.reads[key], decode.reads[key] = without_copies(prefill.reads[key], decode.reads[key])
    layer, specs = address.layer, pair.prefill.attention
    return Suspect(
        address,
        pair.prefill.rung,
        tuple(sorted(pair.positions)),
        prefill,
        decode,
        None if layer is None else specs.get(layer),
        () if layer is None or address.site not in CACHE_SITES else _neighbours(pair, address),
        tuple(spec.window for _, spec in sorted(specs.items()) if spec.window is not None),
        arithmetic.roundoff_at(address.site),
        all(
            call.q_len == call.n_rows == 1
            for call in pair.decode.calls
            if call.start <= address.position < call.start + call.q_len
        ),
    )


def _neighbours(pair: PassPair, address: Address) -> tuple[CacheRead, ...]:
    """The rows of another layer that decode may have in the place of its own at `address`, of each pass.

    All layers are looked at, one after the other, and one is kept: the nearest where decode's rows are not prefill's.
    """
    place = address.layer, address.site
    own = [
        _in_order(read)
        for trace in (pair.prefill, pair.decode)
        for read in trace.cache_reads(address.layer)
        if (read.layer, read.site) == place and address.position in read.positions
    ]
    if len(own) != 2 or own[0].rows.shape[1:] != own[1].rows.shape[1:]:
        return ()
    slots = np.intersect1d(own[0].slots, own[1].slots)
    right, wrong = (_at_slots(read, slots) for read in own)
    bad = slots[(right != wrong).any(axis=(1, 2)) & (slots < address.position)]
    bad = bad if len(bad) else slots[(right != wrong).any(axis=(1, 2))]
    found = (_nearest(trace, address, bad, _at_slots(own[1], bad)) for trace in (pair.decode, pair.prefill))
    return tuple(read for read in found if read is not None)


def _nearest(trace: Trace, address: Address, slots: Slots, wanted: Floats) -> CacheRead | None:
    """The read of another layer, of the site and position of `address`, whose rows [slot, head, dim] of `slots` are
    nearest to those `wanted`; None: no other layer has rows of that shape there."""
    best: tuple[float, CacheRead] | None = None
    for read in trace.cache_reads():
        if read.layer == address.layer or read.site is not address.site or address.position not in read.positions:
            continue
        known = _in_order(read)
        if known.rows.shape[1:] != wanted.shape[1:] or not np.isin(slots, known.slots).all():
            continue
        gap = float(((_at_slots(known, slots) - wanted) ** 2).sum())
        if np.isfinite(gap) and (best is None or gap < best[0]):
            best = gap, known
    return None if best is None else best[1]


def _at_slots(read: CacheRead, slots: Slots) -> Floats:
    """The rows [slot, head, dim] of a read in ascending order at `slots`, all of which it has."""
    return np.asarray(read.rows[np.searchsorted(read.slots, slots)].astype(np.float64))


def _in_order(read: CacheRead) -> CacheRead:
    """A read with its slots ascending: an engine may keep them in any order, as a window that wraps around does."""
    if bool((np.diff(read.slots) >= 0).all()):
        return read
    order = np.argsort(read.slots, kind="stable")
    return replace(read, slots=read.slots[order], rows=read.rows[order])


def _values(trace: Trace, layer: int | None) -> Values:
    sites: dict[tuple[Site, int], Floats] = {}
    slots: dict[tuple[Site, int], Slots] = {}
    last = max((record.layer for record in trace.rows if record.layer is not None), default=None)
    for record in trace.rows:
        handed_on = layer is None and record.layer == last and record.site is Site.LAYER_OUT
        if record.layer != layer and not handed_on:
            continue
        for index, position in enumerate(record.positions):
            sites[record.site, position] = record.values[index].astype(np.float64)
            if record.slots is not None:
                slots[record.site, position] = record.slots
    reads = {
        (read.site, position): _in_order(read)
        for read in (trace.cache_reads() if layer is not None else ())
        if read.layer == layer and read.site in CACHE_SITES
        for position in read.positions
    }
    products = {
        (item.name, position): item.values[index].astype(np.float64)
        for item in trace.products
        if item.layer == layer and item.values is not None
        for index, position in enumerate(item.positions)
    }
    return Values(sites, slots, reads, products)
