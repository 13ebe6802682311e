"""From evidence to a verdict, for each mode and for the whole; the table of the design, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvdrift.instruments.base import Panel
from kvdrift.instruments.bits import Bits
from kvdrift.instruments.control import NO_PLACE_AT_NATIVE
from kvdrift.instruments.ladder import Climb, climb_in
from kvdrift.instruments.noise import Noise, find_noise, noise_in
from kvdrift.instruments.unobserved import RunFindings, runs_in
from kvdrift.measure.measured import Measured
from kvdrift.pairing.align import OTHER_TOKENS
from kvdrift.pairing.drift import DriftTable
from kvdrift.trace.recording import Offset
from kvdrift.verdict.caveats import caveats_of, not_run, unstable_prefill
from kvdrift.verdict.coverage import Chain, chain_of
from kvdrift.verdict.forms import fused_forms, strays
from kvdrift.verdict.incomplete import doubts_of_recording, incomplete
from kvdrift.verdict.localise import first_beyond
from kvdrift.verdict.native import NativeJudgement, weigh_natively
from kvdrift.verdict.overflow import shared_overflow
from kvdrift.verdict.too_few import prompts_that_would_do
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.evidence import CONTROL_SEEN, Caveat, Evidence, Kind, ModeOutcome, Verdict
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.precision import RUNGS, Rungs
from kvdrift.vocabulary.sites import CACHE_SITES, Site

# What a recording says of itself, which must be so before a verdict rests on it.
_MUST_FIT = ("collective", "replay_fit", "promise")
_BY_LADDER = "the precision ladder would settle it (--ladder model or layer)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The verdict of a run and everything that it rests on."""

    verdict: Verdict
    kind: Kind | None
    first_failure: Address | None
    first_slot: int | None  # the cached position that drifts most there, for a cache site
    outcomes: tuple[ModeOutcome, ...]
    evidence: tuple[Evidence, ...]
    caveats: tuple[Caveat, ...]
    climbs: dict[str, Climb]
    natives: dict[str, NativeJudgement]
    reasons: tuple[str, ...]
    rungs: Rungs = RUNGS
    scope: str = ""  # what it is about where that is not everything
    chains: Mapping[str, Chain] = field(default_factory=dict)  # by mode
    asks: tuple[str, ...] = ()  # what would sharpen a verdict that is not a MISMATCH
    settled_by: str | None = None  # the one thing that settles all reasons, where one does


def decide(measured: Measured) -> Decision:
    """Judge every mode, then the whole: one MISMATCH is a MISMATCH, and nothing passes while something is unknown."""
    panel = Panel(measured, measured.instruments)
    modes: tuple[str, ...] = measured.modes
    climbs = {mode: climb_in(panel, mode) for mode in modes}
    natives = {mode: weigh_natively(panel.of_mode(mode)) for mode in modes}
    checks = [evidence for seen in panel.of_run().values() for evidence in seen.evidence]
    runs = runs_in(panel)
    # A mismatch needs no control: what was seen was seen, in whatever mode.
    is_seen = any(climbs[mode].excess.beyond.any() or natives[mode].first is not None for mode in modes)
    needed = [check for check in checks if not (is_seen and check.instrument == CONTROL_SEEN)]
    outcomes = [_judge_mode(panel, measured, mode, natives[mode], needed, runs) for mode in modes]
    evidence = [item for mode in modes for seen in panel.of_mode(mode).values() for item in seen.evidence]
    # A check of the run follows from what the modes lack, as a control that could be planted nowhere does.
    unmet = _unmet(needed)
    reasons = sorted({r: None for outcome in outcomes for r in outcome.reasons}, key=unmet.__contains__)
    first = _first_failure(outcomes)
    verdict = worst_of([outcome.verdict or Verdict.INCONCLUSIVE for outcome in outcomes])
    return Decision(
        verdict=verdict,
        kind=_kind(outcomes),
        first_failure=first,
        first_slot=_slot_of(measured, outcomes, first),
        outcomes=(*outcomes, *not_run(measured)),
        evidence=(*evidence, *checks),
        caveats=tuple(caveats_of(measured, verdict, climbs, natives, runs, {m: noise_in(panel, m) for m in modes})),
        climbs=climbs,
        natives=natives,
        reasons=tuple(reasons)
        or (() if outcomes else tuple(f"{mode}: {why}" for mode, why in measured.failures.items()) or ("no mode ran",)),
        rungs=measured.info.ladder,
        scope=measured.scope.name,
        chains={mode: chain_of(measured, mode) for mode in modes},
        asks=() if (prompts := prompts_that_would_do(measured, natives)) is None else (prompts,),
        settled_by=_settled_by(reasons, unmet),
    )


def _settled_by(reasons: Sequence[str], unmet: Sequence[str]) -> str | None:
    """The one thing that settles all reasons: the ladder, where its absence is behind them."""
    own = [reason for reason in reasons if reason not in unmet]
    if not all(reason.endswith(_BY_LADDER) for reason in own) or not (own or _is_blind(unmet)):
        return None  # a control that was missed beside it may come of it
    return (
        "Run it again with the precision ladder (--ladder model, or --ladder layer where memory is short): it judges "
        "what the native dtype alone cannot"
    )


def _is_blind(unmet: Sequence[str]) -> bool:
    """Whether nothing is unmet but the control, for which the native instruments had no place."""
    return bool(unmet) and all(NO_PLACE_AT_NATIVE in reason for reason in unmet)


def _unmet(checks: Sequence[Evidence]) -> list[str]:
    """What the checks of a run say that are not met."""
    names = {CONTROL_SEEN: "positive control not seen"}
    return [f"{names.get(c.instrument, c.statistic_name)}: {c.reason}" for c in checks if not c.valid]


def _judge_mode(
    panel: Panel,
    measured: Measured,
    mode: str,
    native: NativeJudgement,
    checks: Sequence[Evidence],
    runs: RunFindings,
) -> ModeOutcome:
    found = climb_in(panel, mode)
    (bits,) = panel.seen(Bits.name, mode).evidence
    rows = measured.table.select(mode, measured.info.dtype)
    unpaired = strays(measured, mode)
    plateau = first_beyond(found.excess, [prompt.name for prompt in measured.prompts])
    first = plateau or native.first
    if plateau is not None:  # noise that no rounding makes hides its own drift, and shows in what is computed from it
        first = min((plateau, *panel.seen(Noise.name, mode).begins), key=lambda address: address.forward_rank)
    # Gone at higher precision, so it exists only in the arithmetic of the native dtype; without a ladder, who knows.
    kind: Kind | None = "semantic" if plateau is not None else ("precision" if found.evidence.valid else None)
    reasons: list[str] = []
    if runs.random is not None and not (runs.in_decode_alone and first is not None):
        # whatever else was found may be chance, unless prefill draws no lots
        first, verdict, reasons = None, Verdict.INCONCLUSIVE, [runs.random]
    elif plateau is None and (overflow := shared_overflow(measured, mode, first)) is not None:
        first, verdict, reasons = None, Verdict.INCONCLUSIVE, [overflow]
    elif (offset := offset_in(measured, mode)) is not None and len(rows):
        verdict, reasons = Verdict.MISMATCH, [offset_text(offset, first)]
        first = first or min(
            (row.address for row in rows if row.prompt == offset.prompt), key=lambda address: address.forward_rank
        )
    elif first is not None:
        verdict = Verdict.MISMATCH
    elif runs.mismatch is not None and mode == Mode.AS_DESIGNED:
        first, verdict, reasons = runs.mismatch, Verdict.MISMATCH, [str(runs.differs)]
        kind = "semantic" if runs.is_semantic else None
    else:
        reasons = doubts_of(measured, mode, bits, found, native, checks, len(rows), len(unpaired))
        if runs.differs is not None and measured.plan.ladder == "off":
            reasons.insert(0, f"{runs.differs}, and its size alone does not tell; {_BY_LADDER}")
        if reasons:
            verdict = Verdict.INCONCLUSIVE
        else:
            verdict = Verdict.EXACT if bits.statistic == 1.0 else Verdict.STRUCTURAL_DRIFT
    status = {Verdict.MISMATCH: "FAIL", Verdict.INCONCLUSIVE: "INCONCLUSIVE"}.get(verdict, "PASS")
    if mode in measured.failures:
        status = "ERROR" if verdict is not Verdict.MISMATCH else status
    beyond = int(found.excess.beyond.sum())
    by_native_alone = not len(found.excess) and (measured.plan.ladder == "off" or measured.foreign is not None)
    return ModeOutcome(
        mode=mode,
        status=status,  # type: ignore[arg-type]
        verdict=verdict,
        kind=kind if verdict is Verdict.MISMATCH else None,
        first_failure=first,
        n_pairs=len(rows),
        n_exact=int(rows.equal.sum()),
        n_within=native.n_within if by_native_alone else len(found.excess) - beyond,
        n_beyond=beyond or native.n_beyond,
        n_unpaired=len(unpaired),
        reasons=tuple(reasons),
    )


def doubts_of(
    measured: Measured,
    mode: str,
    bits: Evidence,
    found: Climb,
    native: NativeJudgement,
    checks: Sequence[Evidence],
    n_pairs: int,
    n_unpaired: int,
) -> list[str]:
    """Why this mode cannot be called a pass, each with what would settle it; empty if it can."""
    doubts = []
    if mode in measured.failures:
        doubts.append(measured.failures[mode])
    if n_pairs == 0 and n_unpaired and measured.foreign is not None:
        # All else follows from it.
        return [*doubts, _without_partner(measured, mode, n_unpaired, nothing="nothing was compared: ")]
    if n_pairs == 0:
        doubts.append("nothing was compared")
    if n_unpaired:
        doubts.append(_without_partner(measured, mode, n_unpaired))
    doubts += broken_values(measured.table, mode)
    if not bits.valid:
        doubts.append(f"no path proof: {bits.reason}")
    doubts += [str(item.reason) for item in native.evidence if item.instrument in _MUST_FIT and not item.valid]
    chain = chain_of(measured, mode)
    if measured.foreign is not None:
        doubts += measured.foreign.gaps
        if n_pairs:
            has_ladder, differs = found.evidence.valid, bits.statistic != 1.0
            doubts += doubts_of_recording(measured, native, chain, has_ladder=has_ladder, differs=differs)
    elif n_pairs and not chain.is_whole and not measured.scope.sampled:
        doubts.append(incomplete(measured, chain))
    if measured.plan.ladder == "off":
        if (why_not := native.why_not(mode)) is not None:
            doubts.append(f"the native instruments could not judge {mode}: {why_not}; {_BY_LADDER}")
    elif not found.evidence.valid and measured.foreign is None:
        why = "; ".join(f"{rung}: {text}" for rung, text in measured.rung_failures.items()) or found.evidence.reason
        doubts.append(f"the precision ladder did not complete: {why}")
    elif measured.rung_failures:
        why = "; ".join(f"{rung}: {text}" for rung, text in measured.rung_failures.items())
        doubts.append(f"a rung of the precision ladder broke off: {why}")
    if (unstable := unstable_prefill(measured)) is not None:
        doubts.append(unstable)
    doubts += _ignored(measured, mode)
    doubts += _drowned(measured, mode)
    return doubts + _unmet(checks)


def offset_in(measured: Measured, mode: str) -> Offset | None:
    """Where a recorded decode pass of this mode first gives prefill's tokens other positions, None if nowhere."""
    offsets = () if measured.foreign is None else measured.foreign.offsets
    return next((offset for offset in offsets if offset.mode == mode), None)


def offset_text(offset: Offset, first: Address | None) -> str:
    """Say what the values tell of it; `first` is where they differ beyond rounding, None if nowhere."""
    if first is None:
        return (
            f"{offset}; no value of the same token differs beyond rounding, so the recorder may be what counts wrongly"
        )
    return f"{offset}; values of the same tokens differ beyond rounding from {first} on"


def _shift(measured: Measured, mode: str) -> int | None:
    """By how many positions all values of decode stand behind those of prefill, None if they do not."""
    sides: dict[str, dict[tuple[str, int | None, Site], list[int]]] = {"prefill": {}, "decode": {}}
    for label, rung, value in measured.table.unpaired:
        if label == mode and rung == measured.info.dtype and value.only_in in sides:
            place = (value.prompt, value.layer, value.site)
            sides[value.only_in].setdefault(place, []).append(value.position)
    prefill, decode = sides["prefill"], sides["decode"]
    if not prefill or prefill.keys() != decode.keys():
        return None
    shifts = {
        behind - before
        for place, found in prefill.items()
        for before, behind in zip(sorted(found), sorted(decode[place]), strict=False)
    }
    alike = all(len(found) == len(decode[place]) for place, found in prefill.items())
    return shifts.pop() if alike and len(shifts) == 1 else None


def _without_partner(measured: Measured, mode: str, n_unpaired: int, nothing: str = "") -> str:
    """What to say of values that one pass alone has: that the passes were given other tokens, where they were."""
    why = [value.why for value in strays(measured, mode)]
    if (other := next((text for text in why if text.startswith(OTHER_TOKENS)), None)) is not None:
        return f"{other} (TRACE_OFFSET); both passes must be of the same tokens"
    if (shift := _shift(measured, mode)) is not None:
        far = f"{abs(shift)} position{'s' if abs(shift) > 1 else ''} {'after' if shift > 0 else 'before'}"
        return (
            f"every value of decode stands {far} that of prefill (TRACE_OFFSET), and the files do not show that these "
            "are the same tokens; record token_id in both passes, or the step that feeds the last token of the prompt"
        )
    fused = fused_forms(measured, mode)
    if fused and all(Place(value.layer, value.site) in fused for value in strays(measured, mode)):
        return (
            f"{nothing}{n_unpaired} values are shown by one pass alone (TRACE_OFFSET), as where a kernel computes a "
            f"norm and the products behind it at once; what comes of them is not judged at this dtype: {_BY_LADDER}"
        )
    have = "value has" if n_unpaired == 1 else "values have"
    return f"{nothing}{n_unpaired} {have} no partner in the other pass (TRACE_OFFSET); both must offer the same sites"


def _ignored(measured: Measured, mode: str) -> list[str]:
    """What one pass computes from its inputs and the other, as it seems, does not."""
    found = [item for item in measured.floors.unmoved(mode) if len(item.sides) == 1]
    if not found:
        return []
    side = found[0].sides[0]
    return [
        f"in {side}, no change of the layer inputs by up to {measured.floors.scale.sizes[-1]:.0e} reaches "
        f"{found[0].place}, and in the other pass it does ({len(found)} sites): something there ignores its input, or "
        "kvdrift cannot see into it"
    ]


def _drowned(measured: Measured, mode: str) -> list[str]:
    """Where the noise of both passes would hide a difference between them; passes that agree to the last digits of the
    finest rung hide none."""
    if measured.plan.ladder == "off" or not measured.floors.has(mode):
        return []
    rows, scale = measured.table.select(mode, measured.info.ladder.upper), measured.floors.scale
    agreed = rows.largest_by_place(np.where(np.isfinite(rows.rel_l2), rows.rel_l2, np.inf))
    found = [
        item
        for item in find_noise(measured.floors, mode, measured.info.arithmetic).drowned
        if not agreed.get(item.place, np.inf) <= scale.margin * scale.least
    ]
    if not found:
        return []
    place, floor, left = found[0]
    behind = "" if np.isnan(left) else f", and {left:.1e} of the residual stream behind it"
    return [
        f"{place} drowns in noise at {measured.info.ladder.upper}: a change of the layer inputs by "
        f"{floor.size:.0e} leaves noise of {floor.prefill:.1e} of the value in prefill and {floor.decode:.1e} in decode"
        f"{behind} ({len(found)} sites), so no difference of the passes could be seen there; no rounding makes that "
        "much, and a model that computes nearly the same from nearly the same inputs settles it"
    ]


def broken_values(table: DriftTable, mode: str) -> list[str]:
    """Values that are not numbers, and keys that one side lacks: no rounding, whatever the ladder says of them."""
    rows = table.where(lambda block: block.mode == mode)
    # A score that is infinite on one side is that of a key which only one side hides: NaN would be in its probability.
    hidden = np.isinf(rows.max_abs) & rows.is_at(Site.ATTN_SCORES)
    one_sided = np.isinf(rows.max_abs) & ~hidden
    # A masked score is -inf by design; a score that is NaN makes NaN of its probability.
    shared = (rows.n_nonfinite > 0) & np.isfinite(rows.max_abs) & ~rows.is_at(Site.ATTN_SCORES)
    lost = rows.n_lost > 0
    found = (
        (hidden, "of scores have keys that only one side hides"),
        (one_sided, "are NaN or infinite on one side only"),
        (shared, "are NaN or infinite on both sides, where nothing can be compared"),
        (lost, "lack keys that the other side reads"),
    )
    said = []
    for some, what in found:
        if some.any():
            first = rows.row(int(some.argmax()))
            said.append(f"{some.sum()} pairs {what}; first: {first.address} at {first.rung}")
    return said


def _kind(outcomes: Sequence[ModeOutcome]) -> Kind | None:
    kinds = {outcome.kind for outcome in outcomes if outcome.verdict is Verdict.MISMATCH}
    return "semantic" if "semantic" in kinds else ("precision" if "precision" in kinds else None)


def worst_of(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict of a whole whose parts have these; that of nothing is INCONCLUSIVE."""
    for verdict in (Verdict.MISMATCH, Verdict.INCONCLUSIVE, Verdict.STRUCTURAL_DRIFT):
        if verdict in verdicts:
            return verdict
    return Verdict.EXACT if verdicts else Verdict.INCONCLUSIVE


def _first_failure(outcomes: Sequence[ModeOutcome]) -> Address | None:
    """The first failure of kv_aligned where it has one, since nothing is inherited there; else that of as_designed.

    One that the ladder found comes before one that only the native dtype shows: it is exact.
    """
    kind = _kind(outcomes)
    found = {o.mode: o.first_failure for o in outcomes if o.first_failure is not None and o.kind == kind}
    return found.get(str(Mode.KV_ALIGNED)) or found.get(str(Mode.AS_DESIGNED))


def _slot_of(measured: Measured, outcomes: Sequence[ModeOutcome], first: Address | None) -> int | None:
    """The slot whose row drifts most at the first failure, at the fine rung, in the mode that found it."""
    if first is None or first.site not in CACHE_SITES:
        return None
    # kv_aligned comes last, and is the one that first failures are taken from
    for mode in (outcome.mode for outcome in reversed(outcomes) if outcome.first_failure == first):
        rows = measured.table.select(mode, measured.info.ladder.upper)
        index = rows.index(first)
        if index is not None and rows.worst_slot[index] >= 0:
            return int(rows.worst_slot[index])
    return None
