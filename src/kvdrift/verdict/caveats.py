"""The limits of a verdict that its reader must see, and what was not run at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from kvdrift.instruments.directed import Replay
from kvdrift.instruments.ladder import Climb, find_unstable_prefill
from kvdrift.instruments.native import inputs_of
from kvdrift.instruments.noise import Coarse, NoiseFindings, in_words
from kvdrift.instruments.router import Router, router_caveat
from kvdrift.instruments.unobserved import RunFindings
from kvdrift.measure.measured import Measured
from kvdrift.verdict.forms import (
    angle_caveat,
    eight_bits_caveat,
    fold_caveat,
    form_caveat,
    frame_caveat,
    fused_caveat,
    gain_caveat,
    merge_caveat,
    partnerless,
    row_scale_caveat,
    scale_caveat,
)
from kvdrift.verdict.native import NativeJudgement
from kvdrift.verdict.too_few import units_caveats
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.evidence import Caveat, ModeOutcome, Verdict
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import Site

# What is said of other forms and of constants with fewer digits, each where it was found.
_OF_FORMS = (
    form_caveat,
    fused_caveat,
    frame_caveat,
    fold_caveat,
    row_scale_caveat,
    gain_caveat,
    angle_caveat,
    scale_caveat,
    merge_caveat,
    eight_bits_caveat,
)


def unstable_prefill(measured: Measured) -> str | None:
    """What to say of a prefill that depends on the tokens behind it, None if it does not."""
    row = find_unstable_prefill(measured.table, measured.info.ladder, measured.floors)
    if row is None:
        return None
    return (
        f"prefill itself differs by {row.rel_l2:.1e} at {measured.info.ladder.upper} when other tokens follow (first: "
        f"{row.address}), so it is not a function of the tokens so far: attention in both directions, tables that "
        "depend on the length, or a choice among equal scores; a causal model, or lengths on one side of the switch, "
        f"settle it{_of_hidden_kernel(measured, row.address)}"
    )


def _of_hidden_kernel(measured: Measured, address: Address) -> str:
    """What else to say where attention of an engine of one's own shows none of its operands."""
    rows = measured.table.where(lambda block: True)
    is_seen = Place(address.layer, Site.K_CACHE) in rows.places
    if measured.info.engine != "own" or is_seen or address.site not in (Site.ATTN_CTX, Site.ATTN_OUT, Site.RESID_ATTN):
        return ""
    return (
        "; attention of 8 bits whose steps or mean key come from all keys of a call does the same, and is judged by "
        "its operands: let its kernel be seen (kvdrift.shown)"
    )


def not_run(measured: Measured) -> list[ModeOutcome]:
    return [
        ModeOutcome(
            mode=mode,
            status="NOT RUN",
            verdict=None,
            kind=None,
            first_failure=None,
            n_pairs=0,
            n_exact=0,
            n_within=0,
            n_beyond=0,
            n_unpaired=0,
            reasons=(_why_not_run(measured, mode),),
        )
        for mode in Mode
        if mode not in measured.modes
    ]


def _why_not_run(measured: Measured, mode: Mode) -> str:
    missing = {} if measured.foreign is None else measured.foreign.missing
    return measured.failures.get(mode) or missing.get(mode, "not asked for")


# Of recorded runs of earlier versions, files of other programs, and engines that take no layer inputs.
_ASSUMED = (
    "what rounding can do at %s is assumed from the drift at %s, since no pass ran under changed layer inputs: a "
    "computation that is coarser than %s in one pass alone would look like a fault"
)


# Noise from a sixteenth of a rounding of a half dtype on is that of 16 bits: float16 has three bits more than bfloat16.
_OF_16_BITS = 2.0**-4


def _noise_caveats(
    measured: Measured, noises: Mapping[str, NoiseFindings], climbs: Mapping[str, Climb], verdict: Verdict
) -> Iterator[Caveat]:
    """What is coarser than the finest rung, and what no change of the layer inputs reaches."""
    ladder = measured.info.ladder
    noise = {mode: found for mode, found in noises.items() if found.begins}
    if noise:
        yield Caveat("PINNED", _pinned(measured, noise, climbs))
    alone = [(mode, item) for mode, found in noise.items() for item in found.begins if _is_coarser(measured, item)]
    if alone and verdict is not Verdict.MISMATCH:
        yield Caveat("COARSER_PASS", _coarser(measured, alone))
    assumed = [mode for mode, found in climbs.items() if found.evidence.valid and not measured.floors.has(mode)]
    if assumed and measured.plan.ladder != "off":
        yield Caveat("ASSUMED_NOISE", _ASSUMED % (ladder.upper, ladder.lower, ladder.upper))
    unmoved = {item.place: item for found in noises.values() for item in found.unmoved if len(item.sides) == 2}
    if unmoved:
        yield Caveat(
            "UNMOVED",
            f"no change of the layer inputs by up to {measured.floors.scale.sizes[-1]:.0e} reaches {len(unmoved)} "
            f"sites in either pass (first: {next(iter(unmoved))}): something there ignores its input, or kvdrift "
            "cannot see it move",
        )
    floor = {site for found in climbs.values() for site in found.evidence.detail.get("pinned_floor", {})}  # type: ignore[attr-defined]
    if floor:
        yield Caveat(
            "PINNED",
            f"some operation stays at {ladder.lower} inside the {ladder.upper} run; the bound is "
            f"raised at {', '.join(sorted(floor))}",
        )


def _is_coarser(measured: Measured, item: Coarse) -> bool:
    """Whether one pass alone rounds about as coarsely as a native half dtype, where the other one does not."""
    return (
        item.limit is not None
        and measured.info.arithmetic.can_judge
        and item.size > _OF_16_BITS * measured.info.arithmetic.unit
    )


def _coarser(measured: Measured, alone: Sequence[tuple[str, Coarse]]) -> str:
    """What to say of one pass that computes in 16 bits whatever the rung is, within what the native dtype rounds to."""
    mode, item = max(alone, key=lambda each: each[1].size)
    side = item.sides[0]
    other = item.floor.prefill if side == "decode" else item.floor.decode
    dtype, upper = measured.info.dtype, measured.info.ladder.upper
    where = in_words([each for at, each in alone if at == mode])
    return (
        f"{side} alone computes in fewer bits than {upper} ({where}; the other pass {other:.0e}). That is within one "
        f"rounding of {dtype}, as in a kernel that takes operands of 16 bits and sums them in float32. A norm, a sum "
        "or probabilities that are kept in 16 bits inside it look the same there, and are seen only where they exceed "
        f"the minimum of the instruments at {dtype}"
    )


def _pinned(measured: Measured, noises: Mapping[str, NoiseFindings], climbs: Mapping[str, Climb]) -> str:
    """What to say of operations that are coarser than the finest rung: where, in which pass, and what is not seen."""
    ladder, told = measured.info.ladder, []
    for mode, found in noises.items():
        least = climbs[mode].evidence.minimum_detectable
        cancelling = climbs[mode].evidence.detail.get("n_cancelling")
        text = f"{mode}: noise begins at {in_words(found.begins)}"
        text += "" if least is None else f"; a fault behind it is seen from {least:.1e} on"
        told.append(text + (f", and not at {cancelling} sites whose terms cancel" if cancelling else ""))
    kept = next((f"; {note}" for note in measured.info.notes if "quantised" in note), "")
    return f"the {ladder.upper} run is coarser than {ladder.upper} in places. {'. '.join(told)}{kept}"


def _only_in(pass_name: str, label: str) -> str:
    """Where a value without a partner is."""
    return f"in both passes of {label}" if pass_name == "both" else f"only in {pass_name} of {label}"


def caveats_of(
    measured: Measured,
    verdict: Verdict,
    climbs: dict[str, Climb],
    natives: dict[str, NativeJudgement],
    runs: RunFindings,
    noises: Mapping[str, NoiseFindings],
) -> list[Caveat]:
    caveats = list(measured.foreign.remarks) if measured.foreign is not None else []
    caveats += [Caveat(code, text) for code, text in measured.info.caveats.items()]
    caveats += _of_the_runs(runs)
    caveats += [said for caveat in _OF_FORMS if (said := caveat(measured)) is not None]
    unpaired = partnerless(measured)
    n_unpaired = len(unpaired)
    if n_unpaired:
        label, rung, value = unpaired[0]
        where = f"{value.prompt} / pos {value.position} / layer {value.layer} / {value.site}"
        caveats.append(
            Caveat(
                "TRACE_OFFSET",
                f"{n_unpaired} values have no partner; first: {where}, {_only_in(value.only_in, label)} at {rung} "
                f"({value.why})",
            )
        )
    for mode in Mode:
        if mode not in measured.modes:
            why = _why_not_run(measured, mode)
            caveats.append(Caveat("MODE_NOT_RUN", f"{mode} did not run ({why}); a conclusion needs both modes"))
    if verdict is Verdict.EXACT:
        caveats.append(
            Caveat("EXACT", "every pair has the same bits; path proof shows that different routes ran, check it above")
        )
    if measured.plan.ladder == "off":
        caveats.append(Caveat("LADDER_OFF", _without_ladder(measured, natives)))
        given = _given_scores(measured)
        caveats += [] if given is None else [Caveat("GIVEN_SCORES", given)]
    elif (
        verdict in (Verdict.STRUCTURAL_DRIFT, Verdict.EXACT)
        and measured.info.arithmetic.can_judge
        and measured.foreign is None
    ):
        caveats.append(Caveat("NATIVE_ONLY", _native_only(measured, natives)))
    caveats += units_caveats(measured, natives, verdict)
    if verdict is not Verdict.MISMATCH:
        caveats.append(Caveat("COMMON_MODE", _common_mode(measured, natives)))
    caveats += _noise_caveats(measured, noises, climbs, verdict)
    if verdict is Verdict.MISMATCH and (unstable := unstable_prefill(measured)) is not None:
        caveats.append(Caveat("PREFILL_UNSTABLE", unstable))
    flipped = router_caveat(measured.instrument(Router).table)
    return [*caveats, flipped] if flipped is not None else caveats


def _of_the_runs(runs: RunFindings) -> list[Caveat]:
    """What two runs of one pass say about all the others."""
    found = []
    if runs.differs is not None:
        found.append(Caveat("OBSERVED_DIFFERS", runs.differs))
    if runs.in_decode_alone and runs.random is not None:
        found.append(Caveat("NOT_DETERMINISTIC", runs.random))
    elif runs.random is None and runs.noise > 0.0:
        text = f"the engine is not deterministic: two runs of one pass differ by up to {runs.noise:.2g}"
        found.append(Caveat("NOT_DETERMINISTIC", text))
    return found


def _without_ladder(measured: Measured, natives: dict[str, NativeJudgement]) -> str:
    fresh = next((e for n in natives.values() for e in n.evidence if e.instrument == "native" and e.valid), None)
    judged = "none" if fresh is None else f"{fresh.detail['n_judged']} of {fresh.detail['n_places']}"
    return (
        f"the precision ladder was switched off: the verdict rests on {judged} layer sites, those with "
        f"{inputs_of(measured.info.arithmetic)} in {Mode.KV_ALIGNED}, and on attention replayed in float64; what lies "
        "below the stated minimum stays unseen"
    )


def _given_scores(measured: Measured) -> str | None:
    """Which layers were replayed from the scores of their softmax, and what is seen there; None if none was."""
    rows = [row for row in measured.instrument(Replay).table.rows if row.mode == Mode.KV_ALIGNED]
    least = {row.layer: row.given.least for row in rows if row.given is not None}
    if not least:
        return None
    return (
        f"how scores come about is not known in {len(least)} layers (first: {min(least)}): attention was replayed from "
        f"the scores that its softmax got, and scores were compared between the passes, where a relative error of a "
        f"head from {max(least.values()):.1e} on is seen; one that both passes share is not"
    )


def _common_mode(measured: Measured, natives: dict[str, NativeJudgement]) -> str:
    """What is not seen of faults that both passes share. What was replayed from given scores says nothing of them."""
    what = "a fault that prefill and decode share is not a difference between them, so not seen"
    is_whole = all(row.given is None for row in measured.instrument(Replay).table.rows)
    if is_whole and any(
        item.instrument == "replay" and item.valid for native in natives.values() for item in native.evidence
    ):
        return (
            f"{what}, except inside attention: attention was replayed from its own operands, as it was called. Wrong "
            "options of that call, weights, norms, rotations and feed-forward parts that both share stay unseen"
        )
    return what


def _native_only(measured: Measured, natives: dict[str, NativeJudgement]) -> str:
    """How far faults that exist only at the native dtype were looked for."""
    what = f"faults that exist only at {measured.info.dtype} vanish on the ladder"
    fresh = next((e for n in natives.values() for e in n.evidence if e.instrument == "native" and e.valid), None)
    if fresh is None:
        return f"{what}; without the aligned inputs of kv_aligned the native instruments could not look for them"
    return (
        f"{what}; at {measured.info.dtype} they were looked for at {fresh.detail['n_judged']} of "
        f"{fresh.detail['n_places']} layer sites, those with {inputs_of(measured.info.arithmetic)}, and inside "
        "attention; ones below the minimum detectable effects stay unseen"
    )
