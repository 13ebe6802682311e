"""The table of verdicts, row by row, and the rules that fail closed."""

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from kvdrift.instruments.ladder import Excess
from kvdrift.measure.attention import RunningStats
from kvdrift.measure.measured import Measured
from kvdrift.pairing.drift import DriftTable
from kvdrift.trace.model import Trace
from kvdrift.verdict.decide import Decision
from kvdrift.verdict.judge import decide_route
from kvdrift.verdict.localise import first_beyond
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import Site
from tests.support.traces import (
    Synthetic,
    capture,
    drift_row,
    dropped,
    prompt_tokens,
    scaled,
    synthetic_run,
    touches,
    with_first,
)

LADDER = ("float32", "float64")
OUT = touches(Site.ATTN_OUT, layer=1, position=17)
OUT_NATIVE = touches(Site.ATTN_OUT, layer=1, position=17, rungs=["bfloat16"])
OUT_EVERYWHERE = touches(Site.ATTN_OUT, layer=1, position=17, pass_name=None)


def no_cache(trace: Trace) -> None:
    """Make the decode pass look like one that ran without a cache."""
    if trace.pass_name == "decode" and trace.label != "control":
        trace.calls[:] = [msgspec.structs.replace(call, cache_len_before=0) for call in trace.calls]


def other_token(trace: Trace) -> None:
    """Feed another last token to the decode pass."""
    if trace.pass_name == "decode" and trace.label != "control":
        trace.tokens = (*trace.tokens[:-1], 999_999)


def decided(**options: object) -> Decision:
    return decide_route(synthetic_run(**options))


# ------------------------------------------------------------------------------------------------- the verdict table


@pytest.mark.parametrize(
    ("options", "verdict", "status"),
    [
        pytest.param({}, Verdict.STRUCTURAL_DRIFT, "PASS", id="differs, falls with u"),
        pytest.param({"noise": 0.0}, Verdict.EXACT, "PASS", id="all bits equal, path proof"),
        pytest.param({"edits": [scaled(OUT, 1e-4)]}, Verdict.MISMATCH, "FAIL", id="differs, plateau"),
        pytest.param({"noise": 0.0, "edits": [scaled(OUT, 0.5)]}, Verdict.MISMATCH, "FAIL", id="one pair differs"),
        pytest.param({"rungs": ["bfloat16"]}, Verdict.INCONCLUSIVE, "INCONCLUSIVE", id="no ladder"),
        pytest.param({"control": False}, Verdict.INCONCLUSIVE, "INCONCLUSIVE", id="no control"),
        pytest.param({"after": [no_cache]}, Verdict.INCONCLUSIVE, "INCONCLUSIVE", id="no path proof"),
        pytest.param(
            {"noise": 0.0, "after": [no_cache]}, Verdict.INCONCLUSIVE, "INCONCLUSIVE", id="all equal, no path proof"
        ),
        pytest.param({"edits": [dropped(OUT)]}, Verdict.INCONCLUSIVE, "INCONCLUSIVE", id="coverage incomplete"),
    ],
)
def test_the_table_of_verdicts(options: dict[str, object], verdict: Verdict, status: str) -> None:
    decision = decided(**options)
    assert decision.verdict is verdict
    assert {outcome.status for outcome in decision.outcomes} == {status}
    assert decision.kind == ("semantic" if verdict is Verdict.MISMATCH else None)
    assert (decision.first_failure is not None) == (verdict is Verdict.MISMATCH)
    assert bool(decision.reasons) == (verdict is Verdict.INCONCLUSIVE)


@pytest.mark.parametrize("native", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("seed", range(3))
def test_clean_runs_pass_at_every_dtype(native: str, seed: int) -> None:
    assert decided(native=native, seed=seed).verdict is Verdict.STRUCTURAL_DRIFT


@pytest.mark.parametrize("native", ["bfloat16", "float16", "float32", "float64"])
def test_a_plateau_fails_at_every_dtype(native: str) -> None:
    decision = decided(native=native, edits=[scaled(OUT, 1e-4)])
    assert decision.first_failure == Address("p6_len_16", 17, 1, Site.ATTN_OUT)


def test_one_mode_of_equal_bits_and_one_of_drift_is_drift() -> None:
    assert decided(noise=0.0, edits=[scaled(touches(label="as_designed", rungs=["bfloat16"]), 0.004)]).verdict is (
        Verdict.STRUCTURAL_DRIFT
    )


# -------------------------------------------------------------------------------------------------- size of a plateau


def test_a_mismatch_in_one_mode_outweighs_doubt_in_the_other() -> None:
    doubt = dropped(touches(Site.ATTN_CTX, label="as_designed"))
    decision = decided(edits=[doubt, scaled(touches(Site.MLP_OUT, label="kv_aligned"), 1e-3)])
    assert [outcome.verdict for outcome in decision.outcomes] == [Verdict.INCONCLUSIVE, Verdict.MISMATCH]
    assert decision.verdict is Verdict.MISMATCH


def bound_at(layer: int, site: Site, mode: str) -> float:
    return decided().climbs[mode].bounds[Place(layer, site)]


@pytest.mark.parametrize("site", [Site.Q_PROJ, Site.V_CACHE, Site.ATTN_SCORES, Site.MLP_OUT])
@pytest.mark.parametrize(("factor", "verdict"), [(0.1, Verdict.STRUCTURAL_DRIFT), (10.0, Verdict.MISMATCH)])
def test_a_plateau_ten_times_under_the_bound_passes_and_ten_times_over_it_fails(
    site: Site, factor: float, verdict: Verdict
) -> None:
    size = factor * bound_at(1, site, "kv_aligned")
    place = touches(site, layer=1, position=1, label="kv_aligned", rungs=["float64"])
    decision = decided(edits=[scaled(place, size)])
    assert decision.verdict is verdict
    if verdict is Verdict.MISMATCH:
        assert decision.first_failure == Address("p0_short", 1, 1, site)


def test_a_mismatch_at_float64_counts_although_all_native_bits_are_equal() -> None:
    place = touches(Site.ATTN_OUT, layer=1, position=17, rungs=LADDER)
    decision = decided(noise=0.0, edits=[scaled(place, 1e-4)])
    bits = [item for item in decision.evidence if item.instrument == "bits"]
    assert [item.statistic for item in bits] == [1.0, 1.0]
    assert decision.verdict is Verdict.MISMATCH
    assert decision.first_failure == Address("p6_len_16", 17, 1, Site.ATTN_OUT)


# ------------------------------------------------------------------------------------------------------- pinned floor


def test_an_operation_pinned_to_float32_raises_the_bound_and_is_a_caveat() -> None:
    decision = decided(pinned={Site.ATTN_PROBS: 2.0**-25})
    assert decision.verdict is Verdict.STRUCTURAL_DRIFT
    (caveat,) = [item for item in decision.caveats if item.code == "PINNED"]
    assert "attn_probs" in caveat.text
    raised = decision.climbs["kv_aligned"].bounds[Place(0, Site.ATTN_PROBS)]
    assert raised > 100 * bound_at(0, Site.ATTN_PROBS, "kv_aligned")


def test_the_same_noise_in_decode_alone_is_a_mismatch_and_no_caveat() -> None:
    decision = decided(edits=[scaled(touches(Site.ATTN_PROBS, rungs=["float64"]), 2.0**-25)])
    assert decision.verdict is Verdict.MISMATCH
    assert "PINNED" not in {item.code for item in decision.caveats}


def test_a_plateau_far_above_a_pinned_floor_is_still_a_mismatch() -> None:
    decision = decided(pinned={Site.ATTN_PROBS: 2.0**-25}, edits=[scaled(touches(Site.ATTN_PROBS, layer=0), 1e-3)])
    assert decision.first_failure == Address("p0_short", 1, 0, Site.ATTN_PROBS)


# ------------------------------------------------------------------------------------------------------ no numbers


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_nan_on_one_side_at_the_native_dtype_only_is_inconclusive(value: float, side: str) -> None:
    place = touches(Site.ATTN_OUT, layer=1, position=17, rungs=["bfloat16"], pass_name=side)
    decision = decided(edits=[with_first(place, value)])
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert any("NaN or infinite on one side only" in reason for reason in decision.reasons)
    assert any("p6_len_16 / pos 17 / layer 1 / attn_out at bfloat16" in reason for reason in decision.reasons)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_nan_on_one_side_at_float64_is_a_mismatch(value: float, side: str) -> None:
    place = touches(Site.ATTN_OUT, layer=1, position=17, rungs=["float64"], pass_name=side)
    decision = decided(edits=[with_first(place, value)])
    assert decision.verdict is Verdict.MISMATCH
    assert decision.first_failure == Address("p6_len_16", 17, 1, Site.ATTN_OUT)


@pytest.mark.parametrize("rungs", [None, ["bfloat16"], ["float32"], ["float64"]], ids=str)
@pytest.mark.parametrize("site", [Site.LOGITS, Site.ATTN_OUT, Site.K_CACHE])
def test_nan_on_both_sides_is_never_a_pass(site: Site, rungs: list[str] | None) -> None:
    decision = decided(edits=[with_first(touches(site, pass_name=None, rungs=rungs), math.nan)])
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert any("on both sides, where nothing can be compared" in reason for reason in decision.reasons)


def test_a_run_of_nan_only_is_not_exact() -> None:
    def nothing_but_nan(place, values):  # type: ignore[no-untyped-def]
        return values if place.site in (Site.ATTN_SCORES, Site.ATTN_PROBS) else np.full_like(values, np.nan)

    decision = decided(noise=0.0, edits=[nothing_but_nan])
    assert decision.verdict is Verdict.INCONCLUSIVE


def test_a_mask_that_differs_between_heads_is_no_broken_value() -> None:
    def hide(place: object, values: Any) -> Any:
        values = values.copy()
        values[0, 0] = -np.inf
        return values

    everywhere = touches(Site.ATTN_SCORES, position=17, pass_name=None)
    decision = decided(edits=[lambda place, values: hide(place, values) if everywhere(place) else values])
    assert decision.verdict is Verdict.STRUCTURAL_DRIFT


@pytest.mark.parametrize(
    ("label", "verdict"), [("as_designed", Verdict.INCONCLUSIVE), ("kv_aligned", Verdict.MISMATCH)]
)
def test_a_key_lost_at_the_native_dtype_only_is_never_a_pass(label: str, verdict: Verdict) -> None:
    place = touches(Site.ATTN_SCORES, layer=1, position=17, rungs=["bfloat16"], label=label)

    def lose(values: Any) -> Any:
        values = values.copy()
        values[:, 0] = -np.inf
        return values

    decision = decided(edits=[lambda where, values: lose(values) if place(where) else values])
    assert decision.verdict is verdict
    if verdict is Verdict.INCONCLUSIVE:
        assert any("lack keys that the other side reads" in reason for reason in decision.reasons)
    else:
        # With aligned inputs the native instruments know that nothing but a fault can do this.
        assert decision.first_failure == Address("p6_len_16", 17, 1, Site.ATTN_SCORES)
        assert decision.kind == "precision"


# ------------------------------------------------------------------------------------------------ without a partner


def test_values_without_a_partner_are_inconclusive_and_a_caveat() -> None:
    decision = decided(edits=[dropped(touches(Site.V_PROJ, layer=0, label="as_designed", rungs=["bfloat16"]))])
    designed, aligned = decision.outcomes
    assert (designed.verdict, designed.n_unpaired) == (Verdict.INCONCLUSIVE, 4)
    assert (aligned.verdict, aligned.n_unpaired) == (Verdict.STRUCTURAL_DRIFT, 0)
    assert decision.verdict is Verdict.INCONCLUSIVE
    (caveat,) = [item for item in decision.caveats if item.code == "TRACE_OFFSET"]
    assert caveat.text.startswith(
        "4 values have no partner; first: p0_short / pos 1 / layer 0 / v_proj, only in prefill"
    )


def test_values_without_a_partner_do_not_hide_a_mismatch() -> None:
    decision = decided(edits=[dropped(touches(Site.ATTN_CTX, layer=0)), scaled(OUT, 1e-3)])
    assert decision.verdict is Verdict.MISMATCH
    assert "TRACE_OFFSET" in {item.code for item in decision.caveats}


def test_what_one_pass_alone_shows_counts_where_what_comes_of_it_was_not_compared_at_every_position() -> None:
    fused, hole = dropped(touches(Site.V_PROJ, layer=0)), dropped(touches(Site.ATTN_CTX, layer=0, position=17))

    seen, unseen = decided(edits=[fused]), decided(edits=[fused, hole])

    assert "FUSED" in {item.code for item in seen.caveats}
    assert "FUSED" not in {item.code for item in unseen.caveats}
    assert unseen.verdict is Verdict.INCONCLUSIVE


def test_another_token_on_one_route_is_inconclusive() -> None:
    decision = decided(after=[other_token])
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert any("TRACE_OFFSET" in reason for reason in decision.reasons)


def test_nothing_compared_is_inconclusive() -> None:
    decision = decided(edits=[dropped(touches(pass_name=None, control=True))])
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert "nothing was compared" in decision.reasons


def test_an_empty_run_is_inconclusive() -> None:
    run = synthetic_run()
    run.table = DriftTable()
    run.routes.clear()
    assert decide_route(run).verdict is Verdict.INCONCLUSIVE


# --------------------------------------------------------------------------------------------------- the run as a whole


@pytest.mark.parametrize("rung", LADDER)
def test_a_rung_that_failed_is_inconclusive_and_says_why(rung: str) -> None:
    rungs = [name for name in ("bfloat16", *LADDER) if name != rung]
    decision = decided(rungs=rungs, rung_failures={rung: "RuntimeError: out of memory"})
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert any(f"{rung}: RuntimeError: out of memory" in reason for reason in decision.reasons)


@pytest.mark.parametrize("rung", LADDER)
def test_a_rung_that_broke_off_after_some_prompts_is_inconclusive(rung: str) -> None:
    run = synthetic_run()
    run.rung_failures[rung] = "RuntimeError: out of memory"
    assert decide_route(run).verdict is Verdict.INCONCLUSIVE
    run.table.blocks = [block for block in run.table.blocks if (block.rung, block.prompt) != (rung, "p6_len_16")]
    run.rung_failures.clear()
    assert decide_route(run).verdict is Verdict.INCONCLUSIVE


def test_a_stale_capture_is_inconclusive() -> None:
    first: dict[tuple[object, ...], Any] = {}

    def stale(place: Any, values: Any) -> Any:
        return first.setdefault(
            (place.pass_name, place.label, place.rung, place.layer, place.site, len(values)), values
        )

    same_length = (("a", 4), ("b", 4))
    keys = touches(Site.K_CACHE, pass_name=None)
    edit = lambda place, values: stale(place, values) if keys(place) else values  # noqa: E731
    assert decided(prompts=same_length).verdict is Verdict.STRUCTURAL_DRIFT
    decision = decided(prompts=same_length, edits=[edit])
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert any("the capture is stale" in reason for reason in decision.reasons)


def test_a_control_that_was_not_seen_is_inconclusive() -> None:
    run = synthetic_run()
    (control,) = [block for block in run.table.blocks if block.mode == "control"]
    run.table.replace_block(control, rel_l2=np.zeros(len(control)))
    decision = decide_route(run)
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert any(reason.startswith("positive control not seen") for reason in decision.reasons)


def test_a_control_found_at_an_earlier_place_is_inconclusive() -> None:
    place = touches(Site.Q_PROJ, layer=0, label="control", control=True)
    decision = decided(edits=[scaled(place, 1e-6)])
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert any("was found at layer 0 / q_proj" in reason for reason in decision.reasons)


@pytest.mark.parametrize(("mode", "other"), [("as_designed", "kv_aligned"), ("kv_aligned", "as_designed")])
def test_a_mode_that_was_not_asked_for_is_a_caveat(mode: str, other: str) -> None:
    decision = decided(mode=mode)
    assert decision.verdict is Verdict.STRUCTURAL_DRIFT
    assert [(o.mode, o.status, o.verdict) for o in decision.outcomes if o.mode == other] == [(other, "NOT RUN", None)]
    (caveat,) = [item for item in decision.caveats if item.code == "MODE_NOT_RUN"]
    assert caveat.text == f"{other} did not run (not asked for); a conclusion needs both modes"


def test_an_engine_that_cannot_rewind_runs_one_mode_and_says_why() -> None:
    decision = decided(can_rewind=False)
    assert [outcome.status for outcome in decision.outcomes] == ["PASS", "NOT RUN"]
    (caveat,) = [item for item in decision.caveats if item.code == "MODE_NOT_RUN"]
    assert "a recurrent state cannot go back" in caveat.text


def test_a_run_in_which_no_mode_could_run_is_inconclusive_and_says_why() -> None:
    decision = decided(mode="kv_aligned", can_rewind=False)
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert decision.reasons == ("kv_aligned: not available: a recurrent state cannot go back",)


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        ({}, {"NATIVE_ONLY", "COMMON_MODE"}, {"EXACT", "MODE_NOT_RUN", "TRACE_OFFSET", "PINNED"}),
        ({"native": "float32"}, {"COMMON_MODE"}, {"NATIVE_ONLY"}),
        ({"noise": 0.0}, {"EXACT", "NATIVE_ONLY", "COMMON_MODE"}, set()),
        ({"edits": [scaled(OUT, 1e-3)]}, set(), {"NATIVE_ONLY", "COMMON_MODE"}),
    ],
    ids=["clean", "float32", "exact", "mismatch"],
)
def test_caveats_follow_from_the_run(options: dict[str, object], present: set[str], absent: set[str]) -> None:
    codes = {item.code for item in decided(**options).caveats}
    assert present <= codes
    assert not absent & codes


def test_counts_of_a_mode_add_up() -> None:
    decision = decided(edits=[scaled(OUT, 1e-3)])
    for outcome in decision.outcomes:
        assert outcome.n_within + outcome.n_beyond == outcome.n_pairs == 148
        assert outcome.n_beyond == 1


# -------------------------------------------------------------------------------------------------------- first failure


def test_the_first_failure_is_taken_from_kv_aligned() -> None:
    early = scaled(touches(Site.Q_PROJ, layer=0, label="as_designed"), 1e-3)
    late = scaled(touches(Site.MLP_OUT, layer=1, label="kv_aligned"), 1e-3)
    assert decided(edits=[early, late]).first_failure == Address("p0_short", 1, 1, Site.MLP_OUT)
    assert decided(edits=[early]).first_failure == Address("p0_short", 1, 0, Site.Q_PROJ)


def test_a_wrong_slot_of_the_cache_is_named() -> None:
    def wrong_slot(place, values):  # type: ignore[no-untyped-def]
        if touches(Site.K_CACHE, layer=1, position=17)(place):
            values = values.copy()
            values[5] = values[4]
        return values

    decision = decided(edits=[wrong_slot])
    assert decision.first_failure == Address("p6_len_16", 17, 1, Site.K_CACHE)
    assert decision.first_slot == 5


def excess_at(*addresses: Address, value: float = 2.0) -> Excess:
    table = DriftTable.of([drift_row("kv_aligned", "float64", address=address) for address in addresses])
    return Excess(table.select("kv_aligned", "float64"), np.full(len(addresses), value))


EARLY = Address("b", 9, 0, Site.ATTN_OUT)


@pytest.mark.parametrize(
    "later",
    [
        Address("a", 1, 1, Site.LAYER_IN),
        Address("a", 1, 0, Site.MLP_OUT),
        Address("a", 1, None, Site.LOGITS),
        Address("c", 1, 0, Site.ATTN_OUT),
        Address("b", 10, 0, Site.ATTN_OUT),
    ],
    ids=["layer", "site", "outside", "prompt", "position"],
)
def test_layer_and_site_come_before_prompt_and_prompt_before_position(later: Address) -> None:
    for order in ((EARLY, later), (later, EARLY)):
        assert first_beyond(excess_at(*order), ["b", "a", "c"]) == EARLY


def test_the_embedding_comes_before_the_first_layer() -> None:
    embedding = Address("a", 9, None, Site.EMBED_OUT)
    assert first_beyond(excess_at(EARLY, embedding), ["b", "a"]) == embedding


@pytest.mark.parametrize(("value", "found"), [(0.0, None), (1.0, None), (1.0001, EARLY), (math.inf, EARLY)])
def test_only_what_is_beyond_the_noise_is_a_failure(value: float, found: Address | None) -> None:
    assert first_beyond(excess_at(EARLY, value=value), ["b"]) == found


def test_an_excess_that_is_no_number_is_a_failure() -> None:
    assert first_beyond(excess_at(EARLY, value=math.nan), ["b"]) == EARLY


# ------------------------------------------------------------------------------------------ exit codes and statistics


def test_a_verdict_has_one_exit_code_and_only_two_are_passes() -> None:
    assert {verdict: verdict.exit_code for verdict in Verdict} == {
        Verdict.EXACT: 0,
        Verdict.STRUCTURAL_DRIFT: 0,
        Verdict.MISMATCH: 1,
        Verdict.INCONCLUSIVE: 6,
    }


def test_running_statistics_hand_a_nan_on_in_any_order() -> None:
    for order in ([1.0, math.nan], [math.nan, 1.0]):
        stats = RunningStats()
        for value in order:
            stats.add(np.array([value]))
        assert math.isnan(stats.smallest)
        assert math.isnan(stats.largest)
        assert math.isnan(float(stats.mean or 0.0))
        total = RunningStats()
        total.add(np.array([2.0]))
        total.merge(stats)
        assert math.isnan(total.smallest)


def attention_stats(run: Measured, pass_name: str, site: str) -> RunningStats:
    total = RunningStats()
    for key, item in run.attention.by_place.items():
        if key[:3] == ("kv_aligned", pass_name, site):
            total.merge(item)
    return total


def test_attention_statistics_are_over_visible_keys_of_probed_rows() -> None:
    run = synthetic_run(noise=0.0)
    for pass_name in ("prefill", "decode"):
        scores = attention_stats(run, pass_name, "attn_scores")
        # 2 heads, 2 layers; positions 1 and 2 of one prompt, 16 and 17 of the other, and the keys up to each
        assert scores.n == 2 * 2 * (2 + 3 + 17 + 18)
        assert math.isfinite(scores.smallest)
        probs = attention_stats(run, pass_name, "attn_probs")
        assert probs.n == scores.n
        assert probs.total == pytest.approx(2 * 2 * 4, rel=0.02)


def test_statistics_do_not_depend_on_the_ladder() -> None:
    both, native = synthetic_run(), synthetic_run(rungs=["bfloat16"], control=False)
    assert both.attention == native.attention


def test_captured_traces_are_those_of_the_plan() -> None:
    items = capture(Synthetic(), prompt_tokens("p", 3, 2), synthetic_run().modes, "float32")
    assert [(item.role, item.pair.mode) for item in items] == [
        ("pair", "as_designed"),
        ("pair", "kv_aligned"),
        ("self_noise", "as_designed"),
    ]
