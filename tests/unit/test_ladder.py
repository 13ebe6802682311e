"""The precision ladder: its bound against figures worked out by hand, and when it refuses to speak."""

import math

import pytest

from kvdrift.instruments.ladder import climb, excess_of, rounding_bounds
from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.rows import DriftRow
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.plan import SELF_NOISE
from kvdrift.vocabulary.precision import LOWER, UNIT_ROUNDOFF, UPPER, Rungs
from kvdrift.vocabulary.sites import Site
from tests.support.traces import WIDTH, drift_row

MODE = "kv_aligned"
OUT = Address("p", 3, 0, Site.ATTN_OUT)
PLACE = Place(0, Site.ATTN_OUT)
SHRINK = 2.0**-14.5  # sqrt(2^-53 / 2^-24)


def ladder(lower: float, upper: float, *more: DriftRow, native: float = 1e-2) -> DriftTable:
    """One address with these drifts at bfloat16, float32 and float64."""
    return DriftTable.of(
        [
            drift_row(MODE, "bfloat16", address=OUT, rel_l2=native),
            drift_row(MODE, LOWER, address=OUT, rel_l2=lower),
            drift_row(MODE, UPPER, address=OUT, rel_l2=upper),
            *more,
        ]
    )


def test_unit_roundoffs_are_half_the_spacing_after_one() -> None:
    assert UNIT_ROUNDOFF == {
        "bfloat16": 0.00390625,
        "float16": 0.00048828125,
        "float32": 5.9604644775390625e-08,
        "float64": 1.1102230246251565e-16,
    }


def test_the_bound_is_the_float32_drift_shrunk_by_the_root_of_the_roundoffs() -> None:
    bound = climb(ladder(1e-6, 1e-15), MODE, "bfloat16").bounds[PLACE]
    assert bound == pytest.approx(1e-6 * SHRINK)
    assert bound == pytest.approx(4.3158e-11, rel=1e-4)


def test_a_drift_below_one_rounding_counts_as_one_rounding() -> None:
    bound = climb(ladder(0.0, 0.0), MODE, "bfloat16").bounds[PLACE]
    assert bound == pytest.approx(5.9604644775390625e-08 * SHRINK)
    assert bound == pytest.approx(2.5724e-12, rel=1e-4)


def test_the_bound_parts_slopes_at_one_half() -> None:
    for slope, beyond in ((0.45, 1), (0.55, 0)):
        upper = 1e-6 * (UNIT_ROUNDOFF[UPPER] / UNIT_ROUNDOFF[LOWER]) ** slope
        found = climb(ladder(1e-6, upper), MODE, "bfloat16")
        assert found.evidence.detail["n_beyond"] == beyond
        assert found.evidence.detail["median_slope"] == pytest.approx(slope)
        assert found.evidence.supports == ("H1" if beyond else "H0")


@pytest.mark.parametrize(("factor", "supports"), [(0.1, "H0"), (0.999, "H0"), (1.001, "H1"), (10.0, "H1")])
def test_a_plateau_passes_below_the_bound_and_fails_above_it(factor: float, supports: str) -> None:
    found = climb(ladder(1e-6, factor * 1e-6 * SHRINK), MODE, "bfloat16")
    assert found.excess[OUT] == pytest.approx(factor)
    assert found.evidence.statistic == pytest.approx(factor)
    assert found.evidence.supports == supports
    assert found.evidence.valid


def test_the_float32_drift_is_pooled_over_prompts_and_positions_of_a_site() -> None:
    lucky = Address("q", 9, 0, Site.ATTN_OUT)
    rows = [drift_row(MODE, rung, address=lucky) for rung in ("bfloat16", LOWER)]
    found = climb(ladder(1e-6, 1e-15, *rows, drift_row(MODE, UPPER, address=lucky, rel_l2=1e-11)), MODE, "bfloat16")
    assert found.excess[lucky] == pytest.approx(1e-11 / (1e-6 * SHRINK))


@pytest.mark.parametrize("other", [Address("p", 3, 1, Site.ATTN_OUT), Address("p", 3, 0, Site.MLP_OUT)])
def test_the_float32_drift_is_not_pooled_over_layers_or_sites(other: Address) -> None:
    rows = [
        drift_row(MODE, "bfloat16", address=other),
        drift_row(MODE, LOWER, address=other, rel_l2=1.0),
        drift_row(MODE, UPPER, address=other),
    ]
    assert climb(ladder(1e-6, 1e-15, *rows), MODE, "bfloat16").bounds[PLACE] == pytest.approx(1e-6 * SHRINK)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_float32_drift_that_is_no_number_does_not_widen_the_bound(value: float) -> None:
    bound = climb(ladder(value, 1e-15), MODE, "bfloat16").bounds[PLACE]
    assert bound == pytest.approx(UNIT_ROUNDOFF[LOWER] * SHRINK)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_float64_drift_that_is_no_number_is_beyond_every_bound(value: float) -> None:
    found = climb(ladder(1e-6, value), MODE, "bfloat16")
    assert found.evidence.supports == "H1"
    assert found.evidence.detail["n_beyond"] == 1


# ------------------------------------------------------------------------------------------------------ pinned floors


def self_noise(size: float) -> DriftRow:
    return drift_row(SELF_NOISE, UPPER, address=Address("p", 2, 1, Site.ATTN_OUT), rel_l2=size)


def test_what_two_prefills_differ_by_at_float64_raises_the_bound() -> None:
    found = climb(ladder(1e-6, 1e-15, self_noise(1e-7)), MODE, "bfloat16")
    assert found.bounds[PLACE] == pytest.approx(32 * 1e-7)
    assert found.evidence.detail["pinned_floor"] == {"attn_out": 1e-7}


def test_float64_rounding_of_two_prefills_is_no_floor() -> None:
    found = climb(ladder(1e-6, 1e-15, self_noise(2e-12)), MODE, "bfloat16")
    assert found.bounds[PLACE] == pytest.approx(1e-6 * SHRINK)
    assert found.evidence.detail["pinned_floor"] == {}


@pytest.mark.parametrize("size", [5e-6, 0.1, math.inf, math.nan])
def test_a_difference_of_two_prefills_that_no_float32_operation_makes_is_no_floor(size: float) -> None:
    found = climb(ladder(1e-6, 1e-15, self_noise(size)), MODE, "bfloat16")
    assert found.bounds[PLACE] == pytest.approx(1e-6 * SHRINK)
    assert found.evidence.detail["pinned_floor"] == {}


def test_a_floor_holds_for_its_site_alone() -> None:
    noise = drift_row(SELF_NOISE, UPPER, address=Address("p", 2, 0, Site.MLP_OUT), rel_l2=1e-7)
    assert climb(ladder(1e-6, 1e-15, noise), MODE, "bfloat16").bounds[PLACE] == pytest.approx(1e-6 * SHRINK)


# -------------------------------------------------------------------------------------------------------- not measured


@pytest.mark.parametrize("rung", [LOWER, UPPER])
def test_a_pair_that_a_rung_lacks_makes_the_ladder_invalid(rung: str) -> None:
    # The place is known at both rungs through another position; this one pair is not.
    late = Address("p", 4, 0, Site.ATTN_OUT)
    rows = [drift_row(MODE, other, address=late) for other in ("bfloat16", LOWER, UPPER) if other != rung]
    evidence = climb(ladder(1e-6, 1e-15, *rows), MODE, "bfloat16").evidence
    assert not evidence.valid
    assert evidence.reason == "1 of 2 pairs were not measured at float32 and float64"
    assert evidence.supports is None


@pytest.mark.parametrize("rung", [LOWER, UPPER])
def test_a_missing_rung_makes_the_ladder_invalid(rung: str) -> None:
    table = ladder(1e-6, 1e-15)
    table.blocks = [block for block in table.blocks if block.rung != rung]
    assert not climb(table, MODE, "bfloat16").evidence.valid


def test_an_empty_table_makes_the_ladder_invalid() -> None:
    found = climb(DriftTable(), MODE, "bfloat16")
    assert not found.evidence.valid
    assert found.evidence.statistic is None
    assert found.evidence.supports is None


def test_a_ladder_with_gaps_still_speaks_against_a_plateau() -> None:
    late = drift_row(MODE, "bfloat16", address=Address("p", 4, 0, Site.ATTN_OUT))
    evidence = climb(ladder(1e-6, 1e-3, late), MODE, "bfloat16").evidence
    assert not evidence.valid
    assert evidence.supports == "H1"


def test_other_modes_are_left_alone() -> None:
    found = climb(ladder(1e-6, 1e-15, drift_row("as_designed", UPPER, address=OUT, rel_l2=1.0)), MODE, "bfloat16")
    assert found.evidence.supports == "H0"


@pytest.mark.parametrize("native", [LOWER, UPPER])
def test_a_model_whose_own_dtype_is_a_rung_of_the_ladder_is_judged(native: str) -> None:
    table = ladder(1e-6, 1e-15)
    table.blocks = [block for block in table.blocks if block.rung != "bfloat16"]
    found = climb(table, MODE, native)
    assert found.evidence.valid
    assert found.evidence.supports == "H0"
    assert found.evidence.detail[f"median_slope_{native}_to_float32"] is None


def test_the_slope_from_the_native_dtype_is_reported() -> None:
    detail = climb(ladder(1e-6, 1e-15, native=1e-6 * 2.0**16), MODE, "bfloat16").evidence.detail
    assert detail["median_slope_bfloat16_to_float32"] == pytest.approx(1.0)


def test_pairs_that_do_not_drift_define_no_slope() -> None:
    evidence = climb(ladder(0.0, 0.0), MODE, "bfloat16").evidence
    assert evidence.detail["median_slope"] is None
    assert "not defined" in evidence.text


def test_the_minimum_detectable_effect_is_the_largest_bound() -> None:
    other = Address("p", 3, 1, Site.ATTN_OUT)
    rows = [drift_row(MODE, rung, address=other, rel_l2=1e-5 if rung == LOWER else 0.0) for rung in (LOWER, UPPER)]
    evidence = climb(ladder(1e-6, 1e-15, *rows), MODE, "bfloat16").evidence
    assert evidence.minimum_detectable == pytest.approx(1e-5 * SHRINK)


def test_the_excess_of_the_control_is_taken_under_the_clean_bounds() -> None:
    table = ladder(1e-6, 1e-15, drift_row("control", UPPER, address=OUT, rel_l2=1e-6 * SHRINK * 16))
    found = climb(table, MODE, "bfloat16")
    excess = excess_of(table.select("control", UPPER), found.bounds)
    assert excess.rows.addresses() == [OUT]
    assert excess[OUT] == pytest.approx(16)


CONFIGURATIONS = Rungs("float16", "float32")  # the rungs of an engine that has no float64
SHRINK_16 = 2.0**-6.5  # sqrt(2^-24 / 2^-11)
SHORT = 1e6 ** (1.0 / WIDTH)  # by how much a vector of so many elements may be short


def configurations(lower: float, upper: float, *more: DriftRow) -> DriftTable:
    """One address with these drifts at float16 and float32, of an engine that ships quantised weights."""
    rungs = (("q4_1", 1e-1), ("float16", lower), ("float32", upper))
    return DriftTable.of([*(drift_row(MODE, rung, address=OUT, rel_l2=drift) for rung, drift in rungs), *more])


def test_a_ladder_of_other_rungs_follows_the_same_rule() -> None:
    found = climb(configurations(1e-3, 1e-7), MODE, "q4_1", CONFIGURATIONS)
    assert found.bounds[PLACE] == pytest.approx(1e-3 * SHRINK_16)
    assert found.evidence.valid
    assert found.evidence.supports == "H0"
    assert found.evidence.statistic == pytest.approx(1e-7 / (1e-3 * SHRINK_16 * SHORT))
    assert "from float16 to float32" in found.evidence.text
    assert rounding_bounds(configurations(0.0, 0.0), MODE, CONFIGURATIONS)[PLACE] == pytest.approx(2.0**-17.5)


def test_a_plateau_on_other_rungs_is_beyond_rounding() -> None:
    for upper, side in ((1.01e-3 * SHRINK_16 * SHORT, "H1"), (0.99e-3 * SHRINK_16 * SHORT, "H0")):
        assert climb(configurations(1e-3, upper), MODE, "q4_1", CONFIGURATIONS).evidence.supports == side


def test_the_rungs_of_the_other_ladder_do_not_serve() -> None:
    found = climb(configurations(1e-3, 1e-7), MODE, "q4_1")
    assert not found.evidence.valid
    assert found.evidence.reason == "1 of 1 pairs were not measured at float32 and float64"


def test_nothing_is_taken_for_pinned_where_nothing_was_lifted() -> None:
    noise = drift_row(SELF_NOISE, "float32", address=OUT, rel_l2=1e-4)
    found = climb(configurations(1e-3, 1e-7, noise), MODE, "q4_1", CONFIGURATIONS)
    assert found.bounds[PLACE] == pytest.approx(1e-3 * SHRINK_16)


def test_an_operation_that_the_engine_calls_pinned_raises_the_bound_behind_it() -> None:
    rungs = CONFIGURATIONS._replace(pinned=2.0**-11)
    mlp = Address("p", 3, 0, Site.MLP_OUT)
    rows = [
        drift_row(mode, rung, address=address, rel_l2=0.0)
        for mode in ("kv_aligned", "as_designed")
        for rung in ("float16", "float32")
        for address in (OUT, mlp)
    ]
    aligned = climb(DriftTable.of(rows), "kv_aligned", "float16", rungs)
    assert aligned.bounds == {PLACE: pytest.approx(2.0**-17.5), Place(0, Site.MLP_OUT): 2.0**-11}
    # As designed, the layers above inherit what the operation did.
    assert set(climb(DriftTable.of(rows), "as_designed", "float16", rungs).bounds.values()) == {2.0**-11}
    assert aligned.evidence.detail["pinned_floor"] == {"mlp_out": 2.0**-11, "layer_out": 2.0**-11}


def test_where_the_fine_rung_leaves_little_room_short_vectors_are_reckoned_with() -> None:
    """Float32 above float16: a vector of four elements may be short by chance, and its error large for its size."""
    rungs = Rungs("float16", "float32")
    place = Address("p", 3, 1, Site.ROUTER)
    least = math.sqrt(2.0**-11 * 2.0**-24)
    for n_elements, times in ((4, 10**1.5), (8, 10**0.75), (64, 10 ** (6 / 64))):
        for share, n_beyond in ((0.99, 0), (1.01, 1)):
            table = DriftTable.of(
                [
                    drift_row("as_designed", "float16", address=place, rel_l2=1e-5, n_elements=n_elements),
                    drift_row(
                        "as_designed", "float32", address=place, rel_l2=share * times * least, n_elements=n_elements
                    ),
                ]
            )
            found = climb(table, "as_designed", "float16", rungs)
            assert found.evidence.detail["n_beyond"] == n_beyond
            assert found.evidence.minimum_detectable == pytest.approx(times * least)
