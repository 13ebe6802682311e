"""The directed tests: is a known cause in decode's error, and how much of it? By replay in attention, else by rows.

Each unit, a (prompt, position) pair, gives one coefficient a cause: decode's less prefill's, at each layer and pooled
over layers. Under H0 both passes only round, in no preferred direction, so the difference is symmetric around zero and
its signs may be flipped. The largest statistic over all causes and layers is compared with its distribution under all
flips, which controls the chance of a false alarm for the whole family.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvdrift.instruments.base import NOTHING, Directed, Foreign, Judges, Panel, Replayed, Run, Seen, share_of_alpha
from kvdrift.instruments.native import fresh_rows
from kvdrift.instruments.norms import norm_factors
from kvdrift.instruments.replay import Coefficients, ReplayRow, ReplayTable, Unit, coefficients
from kvdrift.instruments.replay_errors import STATISTIC, bound_of, judge_errors
from kvdrift.instruments.rowwise import RowTable, RowTest, first_place
from kvdrift.instruments.sign_flips import abstain_for_few, affected, sign_flip_max_t, units_for
from kvdrift.replay.causes import ATTENTION_CAUSES
from kvdrift.trace.model import PassPair
from kvdrift.trace.recording import RecordedPair
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.plan import Mode, PairRole
from kvdrift.vocabulary.precision import HALF, Arithmetic
from kvdrift.vocabulary.sites import Site

# A relative cause smaller than this share of the native roundoff is not called a fault: kernels approximate
# exponentials, which is a bias but not a fault. Torch's own CPU attention makes outputs too large by up to 0.10
# roundoffs in float16 and 0.03 in bfloat16 on average, measured over random operands.
_RELEVANT = 1.0 / 8.0
# The same where the engine has kernels of its own for one token and for many, which need not round alike: as a share of
# the roundoff of attention.
_RELEVANT_CONFIGURED = 1.0
# Standard errors at which a coefficient is sure to be seen.
_CLEAR = 6.0
# A cause must be above what is not called a fault by so many standard errors.
_ABOVE = 3.0
# A cause that happens or not is taken to have happened from here.
_HAPPENED = 0.5

_LARGEST_T = "largest t of a cause's coefficient, decode less prefill, over causes and layers"

# What of a layer is recorded though the layer is not.
_BOUNDARIES = frozenset({Site.LAYER_IN, Site.LAYER_OUT})

_SITE = {
    Cause.SCORE_SCALE: Site.ATTN_SCORES,
    Cause.SOFTCAP_MISSING: Site.ATTN_SCORES,
    Cause.HEADS_TILED: Site.ATTN_SCORES,
    Cause.SINK_MISSING: Site.ATTN_PROBS,
    Cause.SINK_DOUBLED: Site.ATTN_PROBS,
}


@dataclass(frozen=True, slots=True)
class RowWise:
    """What was measured row by row, and the addresses at which both passes have the same inputs."""

    table: RowTable
    fresh: Sequence[Address]

    def without(self, units: Collection[Unit]) -> RowWise:
        """Return the same without the rows of some units."""
        return RowWise(RowTable([row for row in self.table.rows if row.unit not in units]), self.fresh)


@dataclass(frozen=True, slots=True)
class ReplayFindings:
    """What replay found in one mode; `beyond` holds addresses whose attention error no rounding explains."""

    causes: tuple[Directed, ...]
    beyond: dict[Address, float]
    evidence: tuple[Evidence, ...]


def judge_replay(
    rows: Sequence[ReplayRow],
    mode: str,
    arithmetic: Arithmetic,
    alpha: float,
    seed: int,
    *,
    is_specified: bool = False,
    row_wise: RowWise | None = None,
    repeated: Collection[Unit] = (),
) -> ReplayFindings:
    """Judge the replays of `mode` at the native dtype.

    The directed tests of attention and of `row_wise` are one family, which shares alpha. `is_specified` says that how a
    layer attends was seen whole, where it is called. Then an error that prefill shares is a fault of both. Otherwise it
    may as well be something that the specification leaves out, and is excused. The directed tests leave `repeated`
    units out, which say nothing new.
    """
    rows = [row for row in rows if row.mode == mode]
    if not rows:
        reason = "attention could not be replayed: no layer showed its query, keys, values and how it attends"
        return ReplayFindings((), {}, (Evidence.abstain("replay", mode, STATISTIC, reason),))
    beyond, size = judge_errors(rows, mode, arithmetic.unit, is_specified=is_specified)
    causes, directed = judge_directed(rows, mode, arithmetic, alpha, seed, row_wise, repeated)
    return ReplayFindings(causes, beyond, (size, directed))


def judge_directed(
    rows: Sequence[ReplayRow],
    mode: str,
    arithmetic: Arithmetic,
    alpha: float,
    seed: int,
    row_wise: RowWise | None,
    repeated: Collection[Unit] = (),
) -> tuple[tuple[Directed, ...], Evidence]:
    """Test for every cause of the catalogue, in attention (`rows`) and row by row, as one family: `alpha` is shared.

    Units that are `repeated` do not count. With too few others it abstains, and states no minimum.
    """
    if not arithmetic.can_judge:
        reason = f"kernels at {arithmetic.dtype} may hold constants rounded as coarsely as it; the ladder decides"
        return (), Evidence.abstain("directed", mode, STATISTIC, reason)
    # Engines with roundoffs of their own round rows in ways that no test of rows knows.
    row_wise = None if arithmetic.is_configured else row_wise
    if repeated:
        rows = [row for row in rows if row.unit not in repeated]
        row_wise = None if row_wise is None else row_wise.without(repeated)
    unit = arithmetic.unit
    least = unit * (_RELEVANT_CONFIGURED if arithmetic.is_configured else _RELEVANT)
    units = sorted({row.unit for row in rows} | (set() if row_wise is None else row_wise.table.units))
    found = coefficients(rows, units)
    others = [] if row_wise is None else row_wise.table.tests(row_wise.fresh, units, unit)
    needed = units_for(alpha)
    if needed is None or len(units) < needed:
        return (), abstain_for_few("directed", mode, _LARGEST_T, len(units), alpha)
    if not (found or others):
        reason = "no cause has a direction and a finite coefficient at all (prompt, position) units"
        return (), Evidence.abstain("directed", mode, _LARGEST_T, reason, bound=None)
    values = np.array([*(item.decode - item.prefill for item in found), *(test.values for test in others)])
    test = sign_flip_max_t(values, seed=seed)
    relevant = [
        index for index, item in enumerate(found) if test.p_values[index] <= alpha and _is_relevant(item, least)
    ]
    causes = _name(relevant, found, test.p_values, rows, units)
    causes += _name_row_wise(others, test.p_values[len(found) :], alpha, units)
    causes = causes or _name_norm(row_wise, unit)
    best = int(np.argmin(test.p_values))
    step = max((row.step for row in rows), default=0.0)
    smallest = _smallest_sizes(found, values, others, least, unit, step)
    return causes, Evidence(
        instrument="directed",
        mode=mode,
        statistic_name=_LARGEST_T,
        statistic=float(test.t[best]),
        p_value=float(test.p_values[best]),
        supports="H1" if causes else "H0",
        minimum_detectable=smallest.get(Cause.SCORE_SCALE),
        text=_tell(causes) or f"no cause of the catalogue in {len(values)} tests on {len(units)} units",
        detail={
            "n_tests": len(values),
            "n_units": len(units),
            "unit": "(prompt, position)",
            "minimum_by_cause": smallest,
        },
    )


def _tell(causes: Sequence[Directed]) -> str:
    return "; ".join(f"{c.cause} {c.size:+.2e} from {_where(c)} on (p {c.p_value:.1e})" for c in causes)


def _where(cause: Directed) -> str:
    return str(cause.address.site) if cause.layer is None else f"layer {cause.layer}"


def _smallest_sizes(
    found: Sequence[Coefficients],
    values: NDArray[np.float64],
    others: Sequence[RowTest],
    least: float,
    unit: float,
    step: float,
) -> dict[Cause, float]:
    """The smallest size of each cause, in all layers alike, that this audit claims to see.

    Factors are not claimed below `step`, where attention that stores its numbers in a half dtype may lose them.
    """
    smallest = {
        item.cause: max(_smallest(item, value, least, unit), step if _is_factor(item.cause) else 0.0)
        for item, value in zip(found, values, strict=False)
        if item.layer is None
    }
    for test in others:
        if test.place is None:
            size = max(_CLEAR * test.error, test.least)
            smallest[test.cause] = max(size, smallest.get(test.cause, 0.0))  # of queries and keys
    return smallest


def _name_row_wise(
    tests: Sequence[RowTest], p_values: NDArray[np.float64], alpha: float, units: Sequence[Unit]
) -> tuple[Directed, ...]:
    found = first_place(tests, p_values, alpha)
    if found is None:
        return ()
    index, place = found
    test = tests[index]
    prompt, position = units[int(np.argmax(test.present))]
    interval = (test.size - 2.0 * test.error, test.size + 2.0 * test.error)
    address = Address(prompt, position, *place)
    return (Directed(test.cause, place.layer, test.size, interval, float(p_values[index]), address, test.explained),)


def _name_norm(row_wise: RowWise | None, unit: float) -> tuple[Directed, ...]:
    """A norm whose rows are off by a factor each. The chance of that under H0 is below 1e-8, and takes no share of
    alpha."""
    found = None if row_wise is None else norm_factors(row_wise.table, row_wise.fresh, unit)
    if found is None:
        return ()
    interval = (found.size - found.bound, found.size + found.bound)
    layer = found.address.layer
    return (Directed(Cause.NORM_DTYPE, layer, found.size, interval, 1e-8, found.address, found.explained),)


def _is_relevant(item: Coefficients, least: float) -> bool:
    values = item.decode - item.prefill
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if _is_factor(item.cause) else 0.0
    return abs(float(values.mean())) - _ABOVE * error >= _least_size(item.cause, least)


def _least_size(cause: Cause, least: float) -> float:
    return least if _is_factor(cause) else _HAPPENED


def _is_factor(cause: Cause) -> bool:
    return any(item.relative for item in ATTENTION_CAUSES if item.name == cause)


def _smallest(item: Coefficients, values: NDArray[np.float64], least: float, unit: float) -> float:
    """The size of a cause that its units, given as differences of coefficients, would show with near certainty.

    Clean passes that agree bit for bit have no spread. A fault takes that agreement away: each pass then rounds its
    outputs by itself, each by up to a roundoff, uniformly, so the error of the mean is at least that of two roundings.
    """
    n_units = len(values)
    spread = float(values.std(ddof=1)) / math.sqrt(n_units)
    rounding = unit * math.sqrt(2.0 / 3.0 * float(np.sum(1.0 / item.size))) / n_units
    clear, least = _CLEAR * max(spread, rounding), _least_size(item.cause, least)
    return clear + least if _is_factor(item.cause) else max(clear, least)


def _name(
    relevant: list[int], found: list[Coefficients], p_values: object, rows: Sequence[ReplayRow], units: Sequence[object]
) -> tuple[Directed, ...]:
    """Of the causes that were found, keep the one that explains most of the error: directions overlap."""
    if not relevant:
        return ()
    share: dict[Cause, float] = {}
    for row in rows:
        for cause, value in row.explained.items():
            share[cause] = share.get(cause, 0.0) + value
    names = {found[index].cause for index in relevant}
    best = max(names, key=lambda name: share.get(name, 0.0))
    mine = [index for index in relevant if found[index].cause == best]
    every = {layer: i for i, item in enumerate(found) if item.cause == best and (layer := item.layer) is not None}
    shown = {layer: found[index].decode - found[index].prefill for layer, index in every.items()}
    layers = affected(shown, [layer for index in mine if (layer := found[index].layer) is not None])
    mine = list(dict.fromkeys([*mine, *(every[layer] for layer in layers)]))
    lowest = min(layers) if layers else min(row.layer for row in rows)
    # The pooled coefficient is the size of a cause that all layers share; of one in one layer it is a fraction.
    index = next((i for i in mine if found[i].layer is None and len(layers) != 1), None)
    index = next(i for i in mine if found[i].layer in layers or not layers) if index is None else index
    values = found[index].decode - found[index].prefill
    mean, error = float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
    prompt, position = next((row.prompt, row.position) for row in rows if row.layer == lowest)
    site = _SITE.get(best, Site.ATTN_CTX)
    p_value = float(np.asarray(p_values)[index])
    address = Address(prompt, position, lowest, site)
    here = [row.explained[best] for row in rows if row.layer >= lowest and best in row.explained]
    explained = float(np.mean(here)) if here else 0.0
    return (Directed(best, lowest, mean, (mean - 2.0 * error, mean + 2.0 * error), p_value, address, explained),)


@dataclass(slots=True)
class Replay:
    """Replays attention, and tests for every known cause in attention and row by row."""

    name: ClassVar[str] = "replay"
    judges: ClassVar[Judges] = "mode"
    table: ReplayTable = field(default_factory=ReplayTable)
    rows: RowTable = field(default_factory=RowTable)

    def see(self, item: RecordedPair, run: Run) -> None:
        """Replay the pairs of the native dtype. Without a ladder, attention is what as_designed is judged by."""
        pair, native = item.pair, run.info.dtype
        if item.role is not PairRole.PAIR or pair.prefill.rung != native:
            return
        if pair.mode is Mode.KV_ALIGNED and run.foreign is None and native in HALF:
            turned = run.table.turned.get((pair.mode, native), {}).keys() | run.table.folded.get(pair.mode, {}).keys()
            self.rows.add(pair, turned)
        replayed = run.modes if run.plan.ladder == "off" or run.foreign is not None else run.modes[-1:]
        if pair.mode in replayed and native != "float64":
            self.table.add(pair, may_be_given=run.foreign is None and Mode.KV_ALIGNED in run.modes)

    def suspected(self, pair: PassPair, run: Run) -> list[Address]:
        """Return where attention of a pair errs by more than its own prefill and rounding let it."""
        rows = [row for row in self.table.rows if row.mode == pair.mode and row.prompt == pair.prefill.prompt]
        if not rows:
            return []
        arithmetic = run.info.arithmetic
        return list(judge_errors(rows, pair.mode, arithmetic.unit, is_specified=not arithmetic.is_configured)[0])

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """Judge the replays of a mode, and in kv_aligned the rows with equal inputs."""
        rows = [row for row in self.table.rows if row.mode == mode]
        arithmetic, seed = run.info.arithmetic, run.plan.seed
        if run.foreign is not None:
            # How finely an engine computes is its own affair where it does not say; a directed cause below that is not.
            if not rows:
                return NOTHING
            found = judge_replay(rows, mode, run.foreign.arithmetic, run.plan.alpha, seed, repeated=run.repeated_units)
            return _fitting(rows, found, run.foreign)
        by_row = None
        if mode == Mode.KV_ALIGNED and self.rows.rows:
            by_row = RowWise(self.rows, fresh_rows(run.table, mode, arithmetic).addresses())
        alpha, repeated = share_of_alpha(run), run.repeated_units
        if rows:
            specified = not arithmetic.is_configured
            found = judge_replay(
                rows, mode, arithmetic, alpha, seed, is_specified=specified, row_wise=by_row, repeated=repeated
            )
            seen = _seen(replace(found, evidence=self._whole(found.evidence, run, mode)))
            addresses = (Address(r.prompt, r.position, r.layer, Site.ATTN_CTX) for r in rows if r.is_of_8_bits)
            return replace(seen, found=Replayed(frozenset(addresses)))
        if by_row is None:
            return NOTHING
        causes, directed = judge_directed((), mode, arithmetic, alpha, seed, by_row, repeated)
        return _seen(ReplayFindings(causes, {}, (directed,)))

    def _whole(self, evidence: tuple[Evidence, ...], run: Run, mode: str) -> tuple[Evidence, ...]:
        """The evidence, which is not valid for a mode that replay alone judges if a layer could not be replayed."""
        size, *others = evidence
        if run.plan.ladder != "off" or mode == Mode.KV_ALIGNED or size.supports == "H1":
            return evidence
        places = run.table.select(mode, run.info.dtype).places
        layers = {place.layer for place in places if place.layer is not None and place.site not in _BOUNDARIES}
        missing = sorted(layers - {row.layer for row in self.table.rows if row.mode == mode})
        if not missing:
            return evidence
        why = self.table.abstained.get(missing[0], "what its attention reads was not seen")
        reason = (
            f"attention of {len(missing)} of {len(layers)} layers could not be replayed (layer {missing[0]}: {why})"
        )
        return (replace(size, valid=False, supports=None, reason=reason), *others)


def _fitting(rows: Sequence[ReplayRow], judged: ReplayFindings, foreign: Foreign) -> Seen:
    """What was seen in a recording that may not fit itself: attention that comes out of its operands in neither pass is
    a slip of whoever recorded it, or a fault of both, and says nothing of their difference.

    `found` holds the (prompt, position, layer) at which both passes are within the bound.
    """
    unit = foreign.arithmetic.unit
    within = frozenset(
        (row.prompt, row.position, row.layer) for row in rows if max(row.error.values()) <= bound_of(row, unit)
    )
    off = [row for row in rows if not row.error["prefill"] <= bound_of(row, unit)]
    off = [row for row in off if not row.error["decode"] <= bound_of(row, unit)]
    if not off:
        return replace(_seen(judged), found=within)
    slips = [row.slip for row in off if row.slip]
    likely = max(slips, key=slips.count, default="")
    worst = max(min(row.error.values()) / bound_of(row, unit) for row in off)
    reason = (
        f"the recording does not fit itself: at {len(off)} of {len(rows)} places attention comes out of the recorded "
        f"queries, keys and values in neither pass (off by {worst:.2g} times the bound; first: {off[0].prompt} / pos "
        f"{off[0].position} / layer {off[0].layer}); "
        + (f"likely {likely}" if likely else "no usual slip of slots, scale, layout or mask explains it")
    )
    fit = Evidence.abstain("replay_fit", rows[0].mode, STATISTIC, reason)
    beyond = {a: e for a, e in judged.beyond.items() if not _is_unfit(a, off)}
    evidence = (replace(judged.evidence[0], supports="H1" if beyond else None, valid=False, reason=reason), fit)
    # A direction that fits errors of a wrong recording is no cause.
    return replace(_seen(ReplayFindings((), beyond, evidence)), found=within)


def _is_unfit(address: Address, off: Sequence[ReplayRow]) -> bool:
    return any((row.prompt, row.position, row.layer) == address[:3] for row in off)


def _seen(found: ReplayFindings) -> Seen:
    beyond = tuple(found.beyond)
    return Seen(
        evidence=found.evidence,
        begins=(*beyond, *(cause.address for cause in found.causes)),
        beyond=beyond,
        causes=found.causes,
    )
