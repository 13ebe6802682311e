"""What kvdrift says of one measured run, held against what was planted."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from kvdrift.errors import KvdriftError
from kvdrift.measure.measured import Measured
from kvdrift.pairing.drift import DriftTable
from kvdrift.verdict.decide import Decision
from kvdrift.verdict.judge import decide_route, explain
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import Site, forward_rank
from kvdrift_bench.run.records import Judged, Place, Record
from kvdrift_bench.run.subjects import Subject

# What a model with a fault in it may raise; a fault that breaks the run has not been found by kvdrift.
BROKEN = (RuntimeError, ValueError, TypeError, IndexError, KeyError, ArithmeticError, KvdriftError)
_PACKAGES = {"kvdrift", "kvdrift_bench"}


def judge_run(run: Measured, subject: Subject, record: Record) -> Judged:
    """Judge a run as its audit would, and say how right that is of `subject`."""
    decision = decide_route(run)
    judged = Judged(verdict=str(decision.verdict), kind=decision.kind, reasons=list(decision.reasons))
    first = decision.first_failure if decision.verdict is Verdict.MISMATCH else None
    if first is not None:
        judged.address, judged.place = str(first), (first.layer, str(first.site))
        judged.cause = _diagnose(run, decision, record)
    _state_directed(judged, decision)
    if subject.fault is None:
        return judged
    if first is not None:
        judged.right_address = judged.place in record.places
        judged.right_layer = judged.right_address or _same_layer(judged.place, record.places)
        judged.right_cause = None if judged.cause is None else subject.fault.is_cause(judged.cause)
    _state_effect(judged, run, decision, record.places)
    return judged


def told(error: BaseException) -> str:
    """Return an exception as one line, with the place in our own code that it passed last."""
    cause = error.__cause__ or error
    line = next(iter(str(cause).strip().splitlines()), "")
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if not _PACKAGES.isdisjoint(Path(f.filename).parts)]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(cause).__name__}: {line}{where}"


def _state_directed(judged: Judged, decision: Decision) -> None:
    """Note what the directed tests say, in the sharpest mode in which they could judge."""
    for native in decision.natives.values():
        found = next((item for item in native.evidence if item.instrument == "directed" and item.valid), None)
        if found is not None:
            judged.p_value = found.p_value
            judged.minimum = dict(found.detail["minimum_by_cause"])  # type: ignore[call-overload]
            judged.estimates = {cause.cause: cause.size for cause in native.causes}


def _diagnose(run: Measured, decision: Decision, record: Record) -> str | None:
    """The cause that a diagnosis names. One that breaks off is noted and leaves the verdict as it is."""
    try:
        explained = explain(run, decision)
    except BROKEN as error:
        record.error = f"the diagnosis: {told(error)}"
        return Cause.UNEXPLAINED
    return None if explained is None else explained.diagnosis.cause


def _same_layer(place: Place | None, places: Sequence[Place]) -> bool:
    """Whether a place is in the layer of one of `places`; before and after the layers are two places, not one."""
    if place is None:
        return False
    return any(_layer_of(place) == _layer_of(true) for true in places)


def _layer_of(place: Place) -> int:
    return forward_rank(place[0], Site(place[1]))[0]


def _state_effect(judged: Judged, run: Measured, decision: Decision, places: Sequence[Place]) -> None:
    """Note how large the fault is where it enters, and whether the audit claims to see one of that size.

    At the fine rung the drift at the true place is the effect of the fault alone. At the native dtype it holds rounding
    too, which the stated minimum has to cover.
    """
    native = run.info.dtype
    at_native = _drift(run.table, native, places), _stated(decision, "native")
    known = [at_native]
    if run.plan.ladder != "off":
        known.insert(0, (_drift(run.table, run.info.ladder.upper, places), _stated(decision, "ladder")))
    claims = [(effect, least) for effect, least in known if effect is not None and least is not None]
    if not claims:
        judged.effect = next((effect for effect, _ in known if effect is not None), None)
        return
    judged.effect, judged.detectable = next((claim for claim in claims if claim[0] > claim[1]), claims[0])
    judged.above = judged.effect > judged.detectable


def _drift(table: DriftTable, rung: str, places: Sequence[Place]) -> float | None:
    """The largest relative drift at one of `places`, with aligned inputs where there are any."""
    for mode in (Mode.KV_ALIGNED, Mode.AS_DESIGNED):
        rows = table.select(mode, rung)
        largest = rows.largest_by_place(rows.rel_l2)
        found = [drift for place, drift in largest.items() if place in places]
        if found:
            return min(max(found), sys.float_info.max)
    return None


def _stated(decision: Decision, instrument: str) -> float | None:
    """The largest of the smallest effects that an instrument says it can see."""
    stated = [
        item.minimum_detectable
        for item in decision.evidence
        if item.instrument == instrument and item.valid and item.minimum_detectable is not None
    ]
    return max(stated, default=None)
