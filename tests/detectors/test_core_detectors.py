"""Every fault that the core can see is planted in a synthetic run and found; its clean twin stays quiet.

The faults on real models are in test_planted_faults.py; here each detector is met alone, at every kind of address.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvdrift.verdict.judge import decide_route
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import EXPECTED_SITES, Site
from tests.support.traces import Edit, Place, dropped, scaled, synthetic_run, touches

OUTSIDE = (Site.EMBED_OUT, Site.FINAL_NORM_OUT, Site.LOGITS)
RARE = (Site.Q_NORM, Site.K_NORM, Site.ROUTER)
ADDRESSES = [
    Address("p6_len_16", position, None if site in OUTSIDE else layer, site)
    for site in (*EXPECTED_SITES, *RARE)
    for layer, position in ([(0, 17)] if site in OUTSIDE else [(0, 16), (1, 17)])
]


def at(address: Address, **more: object) -> Callable[[Place], bool]:
    """The decode value at one address, in every mode and at every rung."""
    return touches(
        address.site,
        layer=address.layer,
        position=address.position,
        prompt=address.prompt,
        **more,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "address", [pytest.param(a, marks=[pytest.mark.matrix] if a.layer == 1 else [], id=str(a)) for a in ADDRESSES]
)
def test_a_plateau_is_found_where_it_was_planted(address: Address) -> None:
    decision = decide_route(synthetic_run(edits=[scaled(at(address), 1e-5)], extra_sites=RARE))
    assert decision.verdict is Verdict.MISMATCH
    assert decision.first_failure == address
    assert [outcome.first_failure for outcome in decision.outcomes] == [address, address]


@pytest.mark.parametrize("seed", range(8))
def test_a_clean_run_is_structural_drift(seed: int) -> None:
    decision = decide_route(synthetic_run(seed=seed, extra_sites=RARE))
    assert decision.verdict is Verdict.STRUCTURAL_DRIFT
    assert decision.reasons == ()


@pytest.mark.parametrize("address", ADDRESSES[::4], ids=str)
def test_a_difference_that_shrinks_as_rounding_does_is_no_fault(address: Address) -> None:
    edits = [
        scaled(at(address, rungs=[rung], label="as_designed"), 4.0 * u)
        for rung, u in (("bfloat16", 2.0**-8), ("float32", 2.0**-24), ("float64", 2.0**-53))
    ]
    assert decide_route(synthetic_run(edits=edits, extra_sites=RARE)).verdict is Verdict.STRUCTURAL_DRIFT


@pytest.mark.parametrize("address", ADDRESSES[::4], ids=str)
def test_a_value_that_was_not_recorded_is_missed(address: Address) -> None:
    decision = decide_route(synthetic_run(edits=[dropped(at(address))], extra_sites=RARE))
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert {outcome.n_unpaired for outcome in decision.outcomes} == {3}  # one at each rung


@pytest.mark.parametrize("mode", ["as_designed", "kv_aligned"])
def test_a_fault_of_one_mode_is_not_seen_in_the_other(mode: str) -> None:
    address = Address("p6_len_16", 17, 1, Site.K_CACHE)
    decision = decide_route(synthetic_run(edits=[scaled(at(address, label=mode), 1e-5)]))
    assert {outcome.mode: outcome.first_failure for outcome in decision.outcomes} == {
        mode: address,
        ({"as_designed", "kv_aligned"} - {mode}).pop(): None,
    }


# ------------------------------------------------------------------------------------------------------ cache faults


def cache_edit(change: Callable[[Any], Any]) -> Edit:
    """A change of what decode reads of layer 1's keys, from position 16 on."""
    matches = touches(Site.K_CACHE, layer=1, prompt="p6_len_16")
    return lambda place, values: change(values.copy()) if matches(place) else values


def alias(rows: Any) -> Any:
    rows[5] = rows[4]
    return rows


def shift(rows: Any) -> Any:
    return np.roll(rows, 1, axis=0)


def swap_heads(rows: Any) -> Any:
    return rows[:, ::-1]


def lose_last(rows: Any) -> Any:
    return rows[:-1]


def keep(rows: Any) -> Any:
    return rows


@pytest.mark.parametrize("fault", [alias, shift, swap_heads, lose_last])
def test_a_fault_in_the_cache_is_found_at_the_cache(fault: Callable[[Any], Any]) -> None:
    decision = decide_route(synthetic_run(edits=[cache_edit(fault)]))
    assert decision.verdict is Verdict.MISMATCH
    assert decision.first_failure == Address("p6_len_16", 16, 1, Site.K_CACHE)


def test_a_cache_that_is_left_alone_is_no_fault() -> None:
    assert decide_route(synthetic_run(edits=[cache_edit(keep)])).verdict is Verdict.STRUCTURAL_DRIFT


@pytest.mark.parametrize("slot", [0, 7, 15])
def test_a_single_bad_slot_is_named(slot: int) -> None:
    def spoil(rows: Any) -> Any:
        rows[slot] = rows[slot] * rows.dtype.type(1.5)
        return rows

    assert decide_route(synthetic_run(edits=[cache_edit(spoil)])).first_slot == slot


# --------------------------------------------------------------------------------------------------- attention faults


def lose_key(key: int) -> Edit:
    """Mask one key in decode's scores, and take its probability away."""
    scores, probs = touches(Site.ATTN_SCORES, layer=1), touches(Site.ATTN_PROBS, layer=1)

    def edit(place: Place, values: Any) -> Any:
        if not (scores(place) or probs(place)):
            return values
        values = values.copy()
        values[:, key] = -np.inf if scores(place) else 0.0
        return values

    return edit


@pytest.mark.parametrize("key", [0, -1])
def test_a_lost_key_is_found_at_the_scores(key: int) -> None:
    decision = decide_route(synthetic_run(edits=[lose_key(key)]))
    assert decision.verdict is Verdict.MISMATCH
    assert decision.first_failure == Address("p0_short", 1, 1, Site.ATTN_SCORES)


def test_the_faults_are_planted_in_decode_alone() -> None:
    clean, faulty = synthetic_run(), synthetic_run(edits=[scaled(touches(), 1e-2)])
    hashes = [
        {row.address: row.sha256_prefill for row in run.table if row.mode != "control"} for run in (clean, faulty)
    ]
    assert hashes[0] == hashes[1]
    assert any(
        first.sha256_decode != second.sha256_decode for first, second in zip(clean.table, faulty.table, strict=True)
    )
