"""How a rung rounds: the unit roundoff and the bound of each site, by a dtype or by kind of operation."""

import pytest

from kvdrift.vocabulary.facts import EngineFacts
from kvdrift.vocabulary.precision import Arithmetic, Roundoffs
from kvdrift.vocabulary.sites import Site

BF16, F32 = 2.0**-8, 2.0**-24
ROUNDOFFS = Roundoffs(row_wise=2.0**-24, product=2.0**-8, cache=2.0**-7, attention=2.0**-9)
CONFIGURED = Arithmetic("q4_1-kv_q8_0-flash", ROUNDOFFS)

# A site, its bound at bfloat16, and the same if its values are kept in float32.
BOUNDS = [
    (Site.ATTN_NORM_OUT, 2 * BF16, 2 * BF16),
    (Site.K_CACHE, 4 * BF16, 4 * BF16),
    (Site.ATTN_CTX, 16 * BF16, 16 * BF16),
    (Site.ATTN_SCORES, 4 * BF16, 4 * F32),
    (Site.ATTN_PROBS, 64 * BF16, 64 * F32),
    (Site.ROUTER, 4 * BF16, 256 * F32),  # added up in no more digits than it is kept in
    (Site.Q_PROJ, 4 * BF16, 256 * F32),
]


@pytest.mark.parametrize(("site", "native", "widened"), BOUNDS)
def test_a_dtype_bounds_each_site_by_what_is_computed_there(site: Site, native: float, widened: float) -> None:
    arithmetic = Arithmetic("bfloat16")
    assert arithmetic.bound(site) == arithmetic.bound(site, "bfloat16") == native
    assert arithmetic.bound(site, "float32") == widened
    assert arithmetic.bound(site, "a dtype of its own") == native
    assert arithmetic.roundoff_at(site) == arithmetic.unit == BF16


@pytest.mark.parametrize(
    ("site", "bound", "roundoff"),
    [
        (Site.ATTN_NORM_OUT, 16 * ROUNDOFFS.row_wise, ROUNDOFFS.product),  # of its inputs, which a product made
        (Site.K_CACHE, 4 * ROUNDOFFS.cache, ROUNDOFFS.cache),
        (Site.ATTN_CTX, 16 * ROUNDOFFS.attention, ROUNDOFFS.attention),
        (Site.ATTN_SCORES, 4 * ROUNDOFFS.attention, ROUNDOFFS.attention),
        (Site.ATTN_PROBS, 64 * ROUNDOFFS.attention, ROUNDOFFS.attention),
        (Site.Q_PROJ, 4 * ROUNDOFFS.product, ROUNDOFFS.product),
    ],
)
def test_roundoffs_by_kind_bound_each_site_whatever_dtype_its_values_have(
    site: Site, bound: float, roundoff: float
) -> None:
    assert CONFIGURED.bound(site) == CONFIGURED.bound(site, "float32") == bound
    assert CONFIGURED.roundoff_at(site) == roundoff
    assert CONFIGURED.unit == ROUNDOFFS.attention


@pytest.mark.parametrize(
    ("arithmetic", "can_judge"),
    [
        (Arithmetic("bfloat16"), True),
        (Arithmetic("float16"), True),
        (Arithmetic("float32"), False),
        (CONFIGURED, True),
        (Arithmetic(CONFIGURED.dtype), False),
    ],
)
def test_rounding_alone_can_be_judged_where_sums_are_finer_than_what_they_are_rounded_to(
    arithmetic: Arithmetic, can_judge: bool
) -> None:
    assert arithmetic.can_judge is can_judge


def test_another_rung_of_a_configured_engine_rounds_as_its_dtype() -> None:
    assert CONFIGURED.at(CONFIGURED.dtype) is CONFIGURED
    assert CONFIGURED.at("float32") == Arithmetic("float32")


def test_an_unknown_dtype_excuses_nothing_and_bounds_nothing() -> None:
    unknown = Arithmetic("int3")
    assert unknown.roundoff_at(Site.Q_PROJ) == 2.0**-53
    with pytest.raises(KeyError):
        _ = unknown.unit
    with pytest.raises(KeyError):
        unknown.bound(Site.Q_PROJ)


def test_an_engine_states_the_arithmetic_of_its_native_run() -> None:
    facts = EngineFacts(engine="llamacpp", model="m", dtype=CONFIGURED.dtype, n_layers=1, roundoffs=ROUNDOFFS)
    assert facts.arithmetic == CONFIGURED
