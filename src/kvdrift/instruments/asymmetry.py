"""Instrument 3, asymmetry: which of the two passes is further from what both should compute.

A prefill at float64 starts every layer from the layer inputs of the native prefill, so that no layer inherits rounding:
the specification. In kv_aligned the native decode step starts each layer from the same inputs. At each address both
passes have an error against the specification, and

    ratio = error of decode / error of prefill.

Two passes that only round err by about the same, most of it in common, and the ratio is near 1 in every layer. A fault
in one of them moves the ratio away from 1, up if decode is at fault and down if prefill is.

The unit of resampling is the (prompt, position) pair. Under H0 the mean log ratio of a place (layer, site) over units
is that of the same site in the other layers. Their median is taken off: two kernels may round a site differently in all
layers, which is not a fault. Signs are flipped over units and the largest statistic of all places is compared with its
distribution, which holds alpha for the family. A place is beyond noise if its adjusted p-value is at
most alpha and its error is `_LEAST_RATIO` times that of the other pass or more.

Blind to: what both passes do wrong alike; a fault that is in all layers alike (the median takes it off); less than half
of the units affected; errors below the native rounding that the address carries anyway.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from kvdrift.instruments.base import NOTHING, Judges, Panel, Run, Seen, share_of_alpha
from kvdrift.instruments.sign_flips import abstain_for_few, sign_flip_max_t, units_for
from kvdrift.pairing.align import Aligner
from kvdrift.pairing.kernels import relative_drifts
from kvdrift.pairing.measure import batches
from kvdrift.trace.model import CacheRecord, PassPair, RowRecord, Trace
from kvdrift.trace.recording import RecordedPair
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.plan import Mode, PairRole
from kvdrift.vocabulary.precision import HALF, UNIT_ROUNDOFF
from kvdrift.vocabulary.sites import Site
from kvdrift.vocabulary.units import Unit

# One pass must err this many times as much as the other.
_LEAST_RATIO = 2.0
# A value that is rounded cannot be known to err by less than this share of a rounding.
_LEAST_ERROR = 1.0 / 16.0
# Layers whose median stands for what two clean passes do at a site.
_LEAST_LAYERS = 3
# Sites that are given and not computed, and those whose error is another one's: scores are rounded as kernels like.
_SKIPPED = {Site.LAYER_IN, Site.EMBED_OUT, Site.ATTN_SCORES, Site.ATTN_PROBS, Site.ROUTER}
_MEASURED = frozenset(Site) - _SKIPPED
_STATISTIC = "largest median ratio of one pass's error to the other's, over layers and sites"


@dataclass(slots=True)
class ErrorTable:
    """Errors of both native passes against the specification, relative, in the 2-norm.

    `units` counts the compared prompts; `values` holds (error of prefill, error of decode) by address. An error is
    infinite where values are lost or not finite.
    """

    values: dict[Address, tuple[float, float]] = field(default_factory=dict)
    units: int = 0
    _native: dict[str, PassPair] = field(default_factory=dict, repr=False)

    def remember(self, pair: PassPair) -> None:
        """Keep the native passes of a prompt until its specification comes."""
        self._native[pair.prefill.prompt] = pair

    def compare(self, specification: Trace) -> None:
        """Measure both native passes of a prompt against its specification, and let go of them."""
        pair = self._native.pop(specification.prompt, None)
        if pair is None:
            return
        self.units += 1
        errors = [
            _errors(PassPair(pair.mode, specification, _widened(trace), pair.positions))
            for trace in (pair.prefill, pair.decode)
        ]
        prefill, decode = errors
        self.values |= {key: (error, decode[key]) for key, error in prefill.items() if key in decode}


@dataclass(frozen=True, slots=True)
class AsymmetryFindings:
    """The first address at which one pass errs more than rounding lets it, and the evidence."""

    first: Address | None
    evidence: Evidence


def judge_asymmetry(
    errors: ErrorTable, native: str, alpha: float, seed: int, repeated: Collection[Unit] = ()
) -> AsymmetryFindings:
    """Judge the errors of the two native passes; abstains where there is too little to tell.

    Units that are `repeated` do not count. A unit whose error at a place is NaN or infinite leaves that place out,
    which is counted.
    """
    if native not in HALF:
        return _abstain(f"at {native} the order of a sum moves the error as much as a fault may; the ladder decides")
    units = sorted({(address.prompt, address.position) for address in errors.values} - set(repeated))
    if not units:
        return _abstain("no specification was run, so no error could be told from the other pass's")
    ratios, left_out = _log_ratios(errors, units, native)
    if not ratios:
        return _abstain(f"no site was measured at {_LEAST_LAYERS} layers and all {len(units)} units")
    needed = units_for(alpha)
    if needed is None or len(units) < needed:
        abstained = abstain_for_few("asymmetry", "kv_aligned", _STATISTIC, len(units), alpha, bound=_LEAST_RATIO)
        return AsymmetryFindings(None, abstained)
    places = sorted(ratios, key=lambda place: place.forward_rank)
    values = np.array([ratios[place] for place in places])
    test = sign_flip_max_t(values, seed=seed)
    smallest = _smallest(errors, places, native)
    sizes = np.median(values, axis=1)
    beyond = [
        index
        for index, size in enumerate(sizes)
        if test.p_values[index] <= alpha and abs(float(size)) >= math.log(_LEAST_RATIO)
    ]
    worst = int(np.argmax(np.abs(sizes)))
    first = beyond[0] if beyond else None
    shown = worst if first is None else first
    side = "decode" if sizes[shown] > 0.0 else "prefill"
    text = f"largest median ratio of errors: {math.exp(abs(float(sizes[worst]))):.2f} at {places[worst]}"
    if first is not None:
        ratio = math.exp(abs(float(sizes[first])))
        text = f"{side} is {ratio:.1f} times as far from float64 as the other pass at {places[first]}"
    return AsymmetryFindings(
        None if first is None else Address(*units[int(np.argmax(np.abs(values[first])))], *places[first]),
        Evidence(
            instrument="asymmetry",
            mode="kv_aligned",
            statistic_name=_STATISTIC,
            statistic=math.exp(abs(float(sizes[worst]))),
            bound=_LEAST_RATIO,
            p_value=float(test.p_values[shown]),
            supports="H1" if beyond else "H0",
            minimum_detectable=max(smallest.values()),
            text=text,
            detail={
                "guilty": side if beyond else None,
                "n_places": len(places),
                "n_units": len(units),
                "n_beyond": len(beyond),
                "n_left_out": left_out,
                "minimum_by_site": {str(site): size for site, size in smallest.items()},
            },
        ),
    )


def _smallest(errors: ErrorTable, places: Collection[Place], native: str) -> dict[Site, float]:
    """The relative error by site that makes a pass err twice as much as the other, in each of its layers.

    Against a specification a site errs by all that is rounded between the layer's input and itself.
    """
    sizes: dict[Place, list[float]] = defaultdict(list)
    for address, by_pass in errors.values.items():
        place = address.place
        if place in places:
            sizes[place].append(max(by_pass))
    found: dict[Site, float] = defaultdict(lambda: UNIT_ROUNDOFF[native])
    for place, values in sizes.items():
        found[place.site] = max(found[place.site], float(np.median(values)))
    return {site: math.sqrt(_LEAST_RATIO**2 - 1.0) * size for site, size in found.items()}


def _log_ratios(errors: ErrorTable, units: list[tuple[str, int]], native: str) -> tuple[dict[Place, list[float]], int]:
    """Log ratio of the errors by place and unit, less the median of the same site over layers.

    A place that is not there for all units is left out, and counted.
    """
    least = _LEAST_ERROR * UNIT_ROUNDOFF[native]
    found: dict[Place, dict[tuple[str, int], float]] = defaultdict(dict)
    counted = set(units)
    for address, (prefill, decode) in errors.values.items():
        is_counted = (address.prompt, address.position) in counted
        if is_counted and math.isfinite(prefill) and math.isfinite(decode):
            found[address.place][address.prompt, address.position] = math.log(max(decode, least) / max(prefill, least))
    whole = {place: by_unit for place, by_unit in found.items() if len(by_unit) == len(units)}
    by_site: dict[Site, list[list[float]]] = defaultdict(list)
    for place, by_unit in whole.items():
        if place.layer is not None:
            by_site[place.site].append([by_unit[unit] for unit in units])
    usual = {site: np.median(rows, axis=0) for site, rows in by_site.items() if len(rows) >= _LEAST_LAYERS}
    result = {
        place: [by_unit[unit] - float(usual[place.site][i]) for i, unit in enumerate(units)]
        for place, by_unit in whole.items()
        if place.site in usual
    }
    return result, len({address.place for address in errors.values}) - len(result)


def _errors(pair: PassPair) -> dict[Address, float]:
    """The relative error of a pass against the specification, its partner, by address."""
    errors: dict[Address, float] = {}
    for batch in batches(Aligner(pair, sites=_MEASURED).pairs()):
        sides = (np.concatenate([getattr(values, side) for values in batch.pairs]) for side in ("prefill", "decode"))
        drifts = iter(relative_drifts(*sides).tolist())
        for values in batch.pairs:
            for position, error in zip(values.positions, drifts, strict=False):
                address = Address(pair.prefill.prompt, position, values.layer, values.site)
                errors[address] = math.inf if values.n_lost else error
    return errors


def _widened(trace: Trace) -> Trace:
    """The values that are measured as float64, which holds them exactly, as if that were what the trace was run at."""
    return Trace(
        trace.prompt,
        trace.pass_name,
        trace.label,
        "float64",
        trace.tokens,
        calls=trace.calls,
        rows=[
            RowRecord(r.layer, r.site, r.positions, r.values.astype(np.float64), r.slots)
            for r in trace.rows
            if r.site in _MEASURED
        ],
        cache=[
            CacheRecord(r.layer, r.site, r.positions, r.slots, r.stored, r.rows.astype(np.float64)) for r in trace.cache
        ],
        attention=trace.attention,
    )


def _abstain(reason: str) -> AsymmetryFindings:
    return AsymmetryFindings(
        None,
        Evidence.abstain(
            "asymmetry",
            "kv_aligned",
            _STATISTIC,
            reason,
            bound=_LEAST_RATIO,
        ),
    )


@dataclass(slots=True)
class Asymmetry:
    """Compares the errors of both passes against the specification."""

    name: ClassVar[str] = "asymmetry"
    judges: ClassVar[Judges] = "mode"
    table: ErrorTable = field(default_factory=ErrorTable)

    def see(self, item: RecordedPair, run: Run) -> None:
        """Keep the native passes of a prompt until its specification comes."""
        if item.role is PairRole.SPECIFICATION:
            self.table.compare(item.pair.prefill)
        elif (
            item.role is PairRole.PAIR
            and item.pair.mode is Mode.KV_ALIGNED
            and item.pair.prefill.rung == run.info.dtype
            and run.is_specified
        ):
            self.table.remember(item.pair)

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """Judge the errors of the two native passes with aligned inputs."""
        if mode != Mode.KV_ALIGNED or not run.is_specified or run.foreign is not None:
            return NOTHING
        found = judge_asymmetry(self.table, run.info.dtype, share_of_alpha(run), run.plan.seed, run.repeated_units)
        return Seen(evidence=(found.evidence,), begins=() if found.first is None else (found.first,))
