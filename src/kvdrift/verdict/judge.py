"""Decides about what was measured and explains it, once: the value that every report reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kvdrift.diagnosis.around import explain_products
from kvdrift.diagnosis.coefficients import explain_directed
from kvdrift.diagnosis.composed import explain_by_results
from kvdrift.diagnosis.diagnose import Explained, diagnose
from kvdrift.diagnosis.model import Suspect
from kvdrift.diagnosis.plain import explain_grid
from kvdrift.diagnosis.shape import shape_of
from kvdrift.diagnosis.slots import stores_its_record
from kvdrift.diagnosis.states import explain_standing_state
from kvdrift.diagnosis.written import is_own_row as is_own_row_of
from kvdrift.instruments.choice import Choices
from kvdrift.instruments.products import Products
from kvdrift.measure.measured import Measured
from kvdrift.replay.quantisation import FORMATS
from kvdrift.verdict.choice import weigh_choices
from kvdrift.verdict.decide import Decision, decide, offset_in
from kvdrift.verdict.lengths import Lengths, judge_lengths
from kvdrift.verdict.summary import Summary, summarise
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.evidence import Caveat, Diagnosis, Verdict
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.shapes import Pass
from kvdrift.vocabulary.sites import CACHE_SITES, Site

# Explanations whose shares differ by less than this explain as much.
_AS_MUCH = 1e-3

# What would fit much else too: an update of low rank, with a few positions.
_FITS_MUCH = frozenset({Cause.ADAPTER_MISSING})

_QUANTISED = (
    "the reference reads rows that kvdrift has quantised to %s itself: the verdict is about what exceeds honest "
    "quantisation; what quantisation as such changes, against a prefill on rows as they are, is not judged"
)


@dataclass(frozen=True, slots=True)
class Judged:
    """A route with its verdict.

    `explained` is None without a first failure, `lengths` without a length sweep.
    """

    measured: Measured
    decision: Decision
    explained: Explained | None
    lengths: Lengths | None
    summary: Summary

    @property
    def verdict(self) -> Verdict:
        return self.decision.verdict

    @property
    def diagnosis(self) -> Diagnosis | None:
        """The cause that reproduces the first failure; cause "unexplained" if none of the catalogue does."""
        return None if self.explained is None else self.explained.diagnosis


def judge(measured: Measured) -> Judged:
    """Decide about a route, and explain its first failure."""
    decision = decide_route(measured)
    lengths = None
    if measured.plan.lengths is not None:
        lengths = judge_lengths(measured, decision, {prompt.name: len(prompt.prompt) for prompt in measured.prompts})
    explained = explain(measured, decision)
    decision = _at_the_named_slot(decision, explained)
    return Judged(measured, decision, explained, lengths, summarise(measured, decision))


def _at_the_named_slot(decision: Decision, explained: Explained | None) -> Decision:
    """Let the address name a slot that the cause is about: of rows that decode lacks none drifts.

    A cause that was told from another step is about the slots of that step, so the address then names none.
    """
    first = decision.first_failure
    named = () if explained is None else explained.diagnosis.slots
    if first is None or explained is None or not named or first.site not in CACHE_SITES or decision.first_slot in named:
        return decision
    return replace(decision, first_slot=named[0] if explained.address == first else None)


def decide_route(measured: Measured) -> Decision:
    """Judge a route, and the choices that a generation loop made on it.

    What a quantised cache costs by design is not judged, and its reader is told.
    """
    decision = decide(measured)
    if not measured.is_scenario:
        return decision
    decision = weigh_choices(decision, measured.instrument(Choices).table, Mode.AS_DESIGNED)
    if not measured.quantised:
        return decision
    names = " and ".join(dict.fromkeys(FORMATS[rows.kind].name for rows in measured.quantised.values()))
    return replace(decision, caveats=(*decision.caveats, Caveat("QUANTISED_CACHE", _QUANTISED % names)))


def explain(measured: Measured, decision: Decision) -> Explained | None:
    """Explain the first failure of a mismatch from the values that were kept of it; None if nothing failed.

    A wrong choice explains itself. Where a cause is smaller than rounding no single difference shows it; the directed
    test that found it does.
    """
    first = decision.first_failure
    if first is None:
        return None
    if decision.reasons and decision.reasons[0] == _differing(decision):
        return _unexplained(decision.reasons[0])
    if any(offset_in(measured, mode) is not None for mode in measured.modes) and decision.reasons:
        return Explained(Diagnosis(Cause.TRACE_OFFSET, 1.0, decision.reasons[0]), ())
    for wrong in measured.instrument(Choices).table.all_turned()[:1]:
        if wrong.is_wrong and decision.reasons == (wrong.text,):
            return Explained(Diagnosis(Cause.WRONG_CHOICE, 1.0, wrong.text), ())
    explained = _from_values(measured, decision, first)
    if explained.diagnosis.cause in _FITS_MUCH:
        return _with_right_products(explained, measured, decision, first)
    if explained.diagnosis.cause != Cause.UNEXPLAINED:
        return explained
    if decision.kind == "semantic":
        return _by_products(explained, measured, decision, first)
    info = measured.info
    found = (
        explain_directed(first, native.causes, measured.table.select(mode, info.dtype), info.arithmetic)
        for mode, native in reversed(decision.natives.items())
    )
    directed = next((item for item in found if item is not None), None)
    if directed is None:
        return _by_products(explained, measured, decision, first)
    return replace(explained, diagnosis=directed)


def _differing(decision: Decision) -> str | None:
    """What the caveat says of passes that differ while nothing watches."""
    return next((caveat.text for caveat in decision.caveats if caveat.code == "OBSERVED_DIFFERS"), None)


def _from_values(measured: Measured, decision: Decision, first: Address) -> Explained:
    """Explain the values that were kept of the first failure, in the mode whose explanation removes most."""
    rung = measured.info.ladder.upper if decision.kind == "semantic" else measured.info.dtype
    # Aligned inputs first: there nothing but the fault differs.
    kept = (measured.suspects.at(first, mode, rung) for mode in reversed(measured.modes))
    best: Explained | None = None
    for suspect in kept:
        if suspect is None:
            continue
        found = _explained(suspect, first, _guilty(decision, first))
        if best is None or found.diagnosis.explained > best.diagnosis.explained + _AS_MUCH:
            best = found
        if best.diagnosis.explained > 1.0 - _AS_MUCH:
            break
    if best is None:
        best = _unexplained(f"the values at {first} were not kept, so no cause was tried on them")
    return _seen_finely(best, measured, decision, first)


def _with_right_products(best: Explained, measured: Measured, decision: Decision, first: Address) -> Explained:
    """What products tell of an error of low rank: where all of them are right, no adapter is missing."""
    found = _by_products(best, measured, decision, first)
    return best if found.diagnosis.cause is Cause.PRODUCT_WRONG else found


def _by_products(best: Explained, measured: Measured, decision: Decision, first: Address) -> Explained:
    """What products of a place tell of an error that values do not explain. Where their results at the native dtype
    explain it, the share is that of the difference there; else none is claimed, and its shape stays."""
    modes = [outcome.mode for outcome in decision.outcomes if outcome.first_failure == first]
    products = measured.instrument(Products)
    rung = measured.info.ladder.upper if decision.kind == "semantic" else measured.info.dtype
    suspects = (measured.suspects.at(first, mode, rung) for mode in reversed(modes))
    kept = [suspect for suspect in suspects if suspect is not None]
    if standing := next((item for suspect in kept if (item := explain_standing_state(suspect))), None):
        return replace(best, diagnosis=replace(best.diagnosis, cause=standing.cause, text=standing.text))
    seen = kept[0].decode.recorded if kept else measured.seen_sites.get(first.layer, set())
    if first.site is Site.V_CACHE and not any(map(stores_its_record, kept)):
        seen = seen - {Site.V_PROJ}  # something lies between the projection and the cache
    is_own_row = any(map(is_own_row_of, kept))
    drift = max((_drift_at(measured, first, mode, rung) for mode in modes), default=np.nan)
    told = (
        explain_products(products, mode, first, seen, drift=drift, is_own_row=is_own_row) for mode in reversed(modes)
    )
    found = next((item for item in told if item is not None), None)
    if found is None or found.cause is not Cause.PRODUCT_WRONG:
        native = (measured.suspects.at(first, mode, measured.info.dtype) for mode in reversed(modes))
        by_values = next((item for suspect in native if suspect and (item := explain_by_results(suspect))), None)
        if by_values is not None:
            diagnosis = Diagnosis(by_values.cause, min(1.0, by_values.explained), by_values.text)
            return replace(best, diagnosis=diagnosis)
    told_alone = found or next((item for suspect in kept if (item := explain_grid(suspect))), None)
    if told_alone is None:
        return best
    return replace(best, diagnosis=replace(best.diagnosis, cause=told_alone.cause, text=told_alone.text))


def _drift_at(measured: Measured, first: Address, mode: str, rung: str) -> float:
    """The largest relative difference of the passes at the place of an address; NaN if none is finite."""
    rows = measured.table.select(mode, rung)
    if (at := rows.by_places.get(first.place)) is None:
        return np.nan
    of_place = rows.rel_l2[at]
    finite = of_place[np.isfinite(of_place)]
    return float(finite.max()) if len(finite) else np.nan


def _seen_finely(best: Explained, measured: Measured, decision: Decision, first: Address) -> Explained:
    """The shape of an unexplained error as the finest rung shows it, where the same error is there: at the native dtype
    rounding hides most elements of one that is as large as two roundings."""
    if best.diagnosis.shape is None:
        return best
    fine = (measured.suspects.fine(first, mode) for mode in reversed(measured.modes))
    shape = next((shape for item in fine if item and (shape := shape_of(item, _guilty(decision, first)))), None)
    return best if shape is None else replace(best, diagnosis=replace(best.diagnosis, shape=shape))


def _explained(suspect: Suspect, first: Address, guilty: Pass | None) -> Explained:
    try:
        explained = diagnose(suspect, guilty)
    except (ValueError, IndexError, ArithmeticError) as error:
        # The verdict stands without it.
        return _unexplained(f"the diagnosis itself failed at {first}: {type(error).__name__}: {error}")
    if suspect.address == first:
        return explained
    text = f"{explained.diagnosis.text} (tried on {suspect.address}, where it shows best)"
    return replace(explained, diagnosis=replace(explained.diagnosis, text=text))


def _guilty(decision: Decision, first: Address) -> Pass | None:
    """The pass that an instrument found to be off, if it began there and all that say so agree."""
    begins = {outcome.mode for outcome in decision.outcomes if outcome.first_failure == first}
    named = {
        item.detail.get("guilty") for item in decision.evidence if item.supports == "H1" and item.mode in begins
    } - {None}
    if named == {"decode"}:
        return "decode"
    return "prefill" if named == {"prefill"} else None


def _unexplained(text: str) -> Explained:
    return Explained(Diagnosis(Cause.UNEXPLAINED, 0.0, text), ())
