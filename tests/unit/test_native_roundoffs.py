"""An engine whose native precision is not a dtype: each kind of operation against its own roundoff, and against
the difference of its inputs."""

import math
from collections.abc import Mapping
from typing import Any

import pytest

from kvdrift.instruments.native import beyond_alone, judge_native
from kvdrift.pairing.align import Unpaired
from kvdrift.pairing.drift import DriftTable
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.precision import Arithmetic, Roundoffs
from kvdrift.vocabulary.sites import Site
from tests.support.traces import drift_row

MODE, NATIVE = "kv_aligned", "q4_1-kv_q8_0-flash"
ROUNDOFFS = Roundoffs(row_wise=2.0**-24, product=2.0**-8, cache=2.0**-7, attention=2.0**-9)
CONFIGURED = Arithmetic(NATIVE, ROUNDOFFS)
CHAIN = (
    Site.LAYER_IN, Site.ATTN_NORM_OUT, Site.Q_PROJ, Site.K_PROJ, Site.V_PROJ, Site.Q_ROPE, Site.K_ROPE, Site.K_CACHE,
    Site.V_CACHE, Site.ATTN_SCORES, Site.ATTN_PROBS, Site.ATTN_CTX, Site.ATTN_OUT, Site.RESID_ATTN, Site.FFN_NORM_OUT,
    Site.MLP_OUT, Site.LAYER_OUT,
)  # fmt: skip


def layer(site: Site, rel_l2: float, **changes: Any) -> DriftTable:
    """One layer whose sites all have the same bits, but for one."""
    rows = []
    for item in CHAIN:
        spoilt: dict[str, Any] = {"rel_l2": rel_l2, "equal": False, **changes} if item is site else {"equal": True}
        rows.append(drift_row(MODE, NATIVE, address=Address("p", 3, 0, item), **spoilt))
    return DriftTable.of(rows)


BOUNDS = {
    Site.ATTN_NORM_OUT: 16 * ROUNDOFFS.row_wise,
    Site.Q_PROJ: 4 * ROUNDOFFS.product,
    Site.Q_ROPE: 16 * ROUNDOFFS.row_wise,
    Site.K_CACHE: 4 * ROUNDOFFS.cache,
    Site.ATTN_SCORES: 4 * ROUNDOFFS.attention,
    Site.ATTN_PROBS: 64 * ROUNDOFFS.attention,
    Site.ATTN_CTX: 16 * ROUNDOFFS.attention,
    Site.ATTN_OUT: 4 * ROUNDOFFS.product,
    Site.RESID_ATTN: 16 * ROUNDOFFS.row_wise,
    Site.MLP_OUT: 4 * ROUNDOFFS.product,
    Site.LAYER_OUT: 16 * ROUNDOFFS.row_wise,
}


@pytest.mark.parametrize("site", BOUNDS)
def test_each_kind_of_operation_has_its_own_bound(site: Site) -> None:
    for share, side in ((0.99, "H0"), (1.01, "H1")):
        table = layer(site, share * BOUNDS[site])
        found = judge_native(table, MODE, CONFIGURED)
        assert found.excess[Place(0, site)] == pytest.approx(share)
        assert found.evidence.supports == side
        beyond = beyond_alone(table.select(MODE, NATIVE), CONFIGURED)
        assert beyond.addresses() == ([] if side == "H0" else [Address("p", 3, 0, site)])


def test_a_row_that_decode_did_not_write_may_not_differ_at_all() -> None:
    found = judge_native(layer(Site.V_CACHE, 1e-12, n_bad_past=1), MODE, CONFIGURED)
    assert found.excess[Place(0, Site.V_CACHE)] == math.inf


OPTIONAL = (Site.Q_NORM, Site.K_NORM, Site.ROUTER)


def chain(spoilt: Mapping[Site, Mapping[str, Any]], without: tuple[Site, ...] = ()) -> DriftTable:
    """One layer of which some sites differ, as `spoilt` says, and some are not recorded."""
    rows = []
    for item in (*CHAIN, *OPTIONAL):
        if item in without or (item in OPTIONAL and item not in spoilt):
            continue
        how: dict[str, Any] = {"equal": False, **spoilt[item]} if item in spoilt else {"equal": True}
        rows.append(drift_row(MODE, NATIVE, address=Address("p", 3, 0, item), **how))
    return DriftTable.of(rows)


def excess_of(table: DriftTable, site: Site) -> float | None:
    found = judge_native(table, MODE, CONFIGURED)
    value = found.excess.get(Place(0, site))
    alone = Address("p", 3, 0, site) in beyond_alone(table.select(MODE, NATIVE), CONFIGURED).addresses()
    assert alone is (value is not None and value > 1.0)
    assert (Place(0, site) in found.first) is alone
    return value


CARRIED = [  # a site, what it is computed from, by how much a difference may grow, and its own rounding
    (Site.Q_NORM, Site.Q_PROJ, 32, 16 * ROUNDOFFS.row_wise),
    (Site.Q_ROPE, Site.Q_NORM, 2, 16 * ROUNDOFFS.row_wise),
    (Site.K_ROPE, Site.K_NORM, 2, 16 * ROUNDOFFS.row_wise),
    (Site.K_CACHE, Site.K_ROPE, 2, 4 * ROUNDOFFS.cache),
    (Site.V_CACHE, Site.V_PROJ, 2, 4 * ROUNDOFFS.cache),
    (Site.ATTN_SCORES, Site.Q_ROPE, 32, 4 * ROUNDOFFS.attention),
    (Site.ATTN_CTX, Site.V_CACHE, 32, 16 * ROUNDOFFS.attention),
    (Site.ATTN_OUT, Site.ATTN_CTX, 32, 4 * ROUNDOFFS.product),
    (Site.RESID_ATTN, Site.ATTN_OUT, 32, 16 * ROUNDOFFS.row_wise),
    (Site.FFN_NORM_OUT, Site.RESID_ATTN, 32, 16 * ROUNDOFFS.row_wise),
    (Site.MLP_OUT, Site.FFN_NORM_OUT, 32, 4 * ROUNDOFFS.product),
    (Site.LAYER_OUT, Site.MLP_OUT, 32, 16 * ROUNDOFFS.row_wise),
]


@pytest.mark.parametrize(("site", "parent", "growth", "own"), CARRIED)
def test_what_follows_a_site_that_differs_may_differ_by_a_multiple_of_it(
    site: Site, parent: Site, growth: float, own: float
) -> None:
    bound = own + growth * 1e-3
    for share in (0.99, 1.01):
        table = chain({parent: {"rel_l2": 1e-3}, site: {"rel_l2": share * bound}})
        assert excess_of(table, site) == pytest.approx(share)


def test_the_stated_minimum_is_the_largest_bound() -> None:
    handed_on = {Site.ATTN_CTX: {"rel_l2": 1e-3}, Site.ATTN_OUT: {"rel_l2": 1e-4}}
    found = judge_native(chain(handed_on, without=(Site.ATTN_PROBS,)), MODE, CONFIGURED).evidence
    assert found.supports == "H0"
    assert found.minimum_detectable == pytest.approx(4 * ROUNDOFFS.product + 32 * 1e-3)


def test_the_stated_minimum_is_not_that_of_what_a_fault_did() -> None:
    """What lies behind it is bounded by its size, and nothing is claimed of that."""
    clean = judge_native(chain({}), MODE, CONFIGURED).evidence.minimum_detectable
    for gross in (Site.Q_PROJ, Site.V_CACHE):
        spoilt: dict[Site, dict[str, object]] = {gross: {"rel_l2": 0.5}, Site.ATTN_CTX: {"rel_l2": 0.4}}
        found = judge_native(chain(spoilt), MODE, CONFIGURED).evidence
        assert found.supports == "H1"
        assert found.minimum_detectable == clean


def test_a_site_that_was_not_recorded_hands_on_what_its_own_inputs_allow() -> None:
    passed = 4 * ROUNDOFFS.product + 32 * 1e-6
    bound = 16 * ROUNDOFFS.row_wise + 32 * passed
    for share in (0.99, 1.01):
        spoilt: dict[Site, dict[str, object]] = {
            Site.ATTN_CTX: {"rel_l2": 1e-6},
            Site.RESID_ATTN: {"rel_l2": share * bound},
        }
        assert excess_of(chain(spoilt, without=(Site.ATTN_OUT,)), Site.RESID_ATTN) == pytest.approx(share)


def test_older_rows_may_not_differ_whatever_went_into_the_newest() -> None:
    inputs: dict[Site, dict[str, object]] = {Site.V_PROJ: {"rel_l2": 1e-3}}
    assert excess_of(chain({**inputs, Site.V_CACHE: {"rel_l2": 1e-9, "n_bad_past": 1}}), Site.V_CACHE) == math.inf
    assert excess_of(chain({**inputs, Site.V_CACHE: {"rel_l2": 1e-9}}), Site.V_CACHE) < 1.0  # type: ignore[operator]


def test_keys_that_one_side_does_not_see_are_no_rounding() -> None:
    lost = {Site.Q_ROPE: {"rel_l2": 1e-3}, Site.ATTN_SCORES: {"rel_l2": math.inf, "n_lost": 1}}
    assert excess_of(chain(lost), Site.ATTN_SCORES) == math.inf


def test_probabilities_whose_scores_differ_are_left_to_replay() -> None:
    assert (
        excess_of(chain({Site.ATTN_SCORES: {"rel_l2": 1e-3}, Site.ATTN_PROBS: {"rel_l2": 0.5}}), Site.ATTN_PROBS)
        is None
    )


def test_experts_of_another_choice_are_not_judged() -> None:
    """A near tie that turns sends a token elsewhere, with nothing wrong."""
    turned: dict[Site, dict[str, object]] = {
        Site.FFN_NORM_OUT: {"rel_l2": 1e-5},
        Site.ROUTER: {"rel_l2": 1e-5},
        Site.MLP_OUT: {"rel_l2": 0.5},
    }
    assert excess_of(chain(turned), Site.MLP_OUT) is None
    assert excess_of(chain({**turned, Site.ROUTER: {"equal": True}}), Site.MLP_OUT) > 1.0  # type: ignore[operator]


def test_an_input_that_could_not_be_compared_bounds_nothing() -> None:
    """It is there, on one side at least, and its difference is not known."""
    table = chain({Site.RESID_ATTN: {"rel_l2": 0.5}}, without=(Site.ATTN_OUT,))
    assert excess_of(table, Site.RESID_ATTN) > 1.0  # type: ignore[operator]
    table.unpaired.append((MODE, NATIVE, Unpaired("p", 0, Site.ATTN_OUT, 3, "decode")))
    assert judge_native(table, MODE, CONFIGURED).excess.get(Place(0, Site.RESID_ATTN)) is None


def test_logits_whose_final_norm_was_not_recorded_are_not_judged() -> None:
    logits = drift_row(MODE, NATIVE, address=Address("p", 3, None, Site.LOGITS), rel_l2=0.5, equal=False)
    norm = drift_row(MODE, NATIVE, address=Address("p", 3, None, Site.FINAL_NORM_OUT), equal=True)
    place = Place(None, Site.LOGITS)
    assert judge_native(DriftTable.of([logits]), MODE, CONFIGURED).excess.get(place) is None
    assert judge_native(DriftTable.of([norm, logits]), MODE, CONFIGURED).excess[place] > 1.0


def test_an_input_that_is_not_finite_bounds_nothing() -> None:
    broken = {Site.ATTN_OUT: {"rel_l2": math.inf}, Site.RESID_ATTN: {"rel_l2": 0.5}}
    assert excess_of(chain(broken), Site.RESID_ATTN) is None


def test_without_roundoffs_an_unknown_precision_is_not_judged() -> None:
    found = judge_native(layer(Site.ATTN_OUT, 1.0), MODE, Arithmetic(NATIVE))
    assert not found.evidence.valid
    assert found.excess == {}


def test_a_layer_whose_input_was_not_recorded_was_not_given_that_of_prefill() -> None:
    """As where a layer is handed several streams: what it computes from them has other inputs in decode."""
    rows = [drift_row(MODE, "bfloat16", address=Address("p", 3, 1, Site.ATTN_NORM_OUT), rel_l2=0.5, equal=False)]
    assert not judge_native(DriftTable.of(rows), MODE, CONFIGURED.at("bfloat16")).evidence.valid


@pytest.mark.parametrize("native", [NATIVE, "bfloat16"])
def test_a_layer_of_which_only_the_boundaries_are_known_is_not_judged(native: str) -> None:
    """With --layers all layers hand on their outputs, and those of the others were made by a whole layer."""
    rows = [
        drift_row(MODE, native, address=Address("p", 3, 0, Site.LAYER_IN), equal=True),
        drift_row(MODE, native, address=Address("p", 3, 0, Site.LAYER_OUT), rel_l2=0.5, equal=False),
        drift_row(MODE, native, address=Address("p", 3, 1, Site.LAYER_IN), equal=True),
        drift_row(MODE, native, address=Address("p", 3, 1, Site.ATTN_NORM_OUT), equal=True),
    ]
    found = judge_native(DriftTable.of(rows), MODE, CONFIGURED.at(native))
    assert Place(0, Site.LAYER_OUT) not in found.excess
    assert found.evidence.supports == "H0"
