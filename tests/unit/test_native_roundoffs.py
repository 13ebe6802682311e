"""Fresh sites of an engine whose native precision is no dtype: each kind of operation against its own roundoff."""

import math

import pytest

from kvdrift.address import Address
from kvdrift.compare.drift import DriftTable
from kvdrift.instruments.native import beyond_alone, judge_native
from kvdrift.sites import Site
from kvdrift.trace.model import Roundoffs
from tests.support.traces import drift_row

MODE, NATIVE = "kv_aligned", "q4_1-kv_q8_0-flash"
ROUNDOFFS = Roundoffs(row_wise=2.0**-24, product=2.0**-8, cache=2.0**-7, attention=2.0**-9)
CHAIN = (
    Site.LAYER_IN, Site.ATTN_NORM_OUT, Site.Q_PROJ, Site.K_PROJ, Site.V_PROJ, Site.Q_ROPE, Site.K_ROPE, Site.K_CACHE,
    Site.V_CACHE, Site.ATTN_SCORES, Site.ATTN_PROBS, Site.ATTN_CTX, Site.ATTN_OUT, Site.RESID_ATTN, Site.FFN_NORM_OUT,
    Site.MLP_OUT, Site.LAYER_OUT,
)  # fmt: skip


def layer(site: Site, rel_l2: float, **changes: object) -> DriftTable:
    """One layer whose sites all have the same bits, but for one."""
    rows = []
    for item in CHAIN:
        spoilt = {"rel_l2": rel_l2, "equal": False, **changes} if item is site else {"equal": True}
        rows.append(drift_row(MODE, NATIVE, address=Address("p", 3, 0, item), **spoilt))  # type: ignore[arg-type]
    return DriftTable(rows)


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
        found = judge_native(table, MODE, NATIVE, ROUNDOFFS)
        assert found.excess[0, str(site)] == pytest.approx(share)
        assert found.evidence.supports == side
        beyond = beyond_alone(table.select(MODE, NATIVE), NATIVE, ROUNDOFFS)
        assert beyond == ([] if side == "H0" else [("p", 3, 0, str(site))])


def test_a_row_that_decode_did_not_write_may_not_differ_at_all() -> None:
    found = judge_native(layer(Site.V_CACHE, 1e-12, n_bad_past=1), MODE, NATIVE, ROUNDOFFS)
    assert found.excess[0, "v_cache"] == math.inf


def test_what_follows_a_site_that_differs_is_inherited_and_not_judged() -> None:
    found = judge_native(layer(Site.ATTN_OUT, 1e-9), MODE, NATIVE, ROUNDOFFS)
    assert (0, "attn_out") in found.excess
    assert (0, "resid_attn") not in found.excess


def test_without_roundoffs_an_unknown_precision_is_not_judged() -> None:
    found = judge_native(layer(Site.ATTN_OUT, 1.0), MODE, NATIVE)
    assert not found.evidence.valid
    assert found.excess == {}


@pytest.mark.parametrize("native", [NATIVE, "bfloat16"])
def test_a_layer_of_which_only_the_boundaries_are_known_is_not_judged(native: str) -> None:
    """With --layers all layers hand on their outputs, and those of the others were made by a whole layer."""
    rows = [
        drift_row(MODE, native, address=Address("p", 3, 0, Site.LAYER_IN), equal=True),
        drift_row(MODE, native, address=Address("p", 3, 0, Site.LAYER_OUT), rel_l2=0.5, equal=False),
        drift_row(MODE, native, address=Address("p", 3, 1, Site.ATTN_NORM_OUT), equal=True),
    ]
    found = judge_native(DriftTable(rows), MODE, native, ROUNDOFFS if native == NATIVE else None)
    assert (0, "layer_out") not in found.excess
    assert found.evidence.supports == "H0"
