"""Choices of experts that rounding turned are told from equal ones, and only inform."""

import numpy as np

from kvdrift.instruments.router import RouterTable, judge_router, router_caveat
from kvdrift.trace.model import Array, PassPair, Trace
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import Site

TOKENS = (1, 2, 3)


def pair(prefill: Array, decode: Array) -> PassPair:
    traces = (Trace("p", "prefill", "full", "float32", TOKENS), Trace("p", "decode", "full", "float32", TOKENS))
    for trace, logits in zip(traces, (prefill, decode), strict=True):
        trace.add_rows(4, Site.ROUTER, (1, 2), logits.astype(np.float32))
        trace.add_rows(4, Site.LAYER_OUT, (1, 2), np.ones((2, 3), dtype=np.float32))
    return PassPair(Mode.AS_DESIGNED, *traces, (1, 2))


LOGITS = np.array([[3.0, 1.0, 0.99, -2.0], [0.5, 2.0, -1.0, 1.5]])


def table_of(decode: Array, n_chosen: int = 2) -> RouterTable:
    table = RouterTable()
    table.add(pair(LOGITS, decode), n_chosen)
    return table


def test_a_turned_near_tie_is_named_with_its_gap() -> None:
    turned = LOGITS.copy()
    turned[0, 1:3] = 0.985, 1.0
    table = table_of(turned)
    evidence = judge_router(table, "as_designed")
    assert evidence is not None
    assert (evidence.statistic, evidence.supports) == (1.0, None)
    (flip,) = table.flips
    assert (flip.address.position, flip.address.layer, flip.address.site) == (1, 4, Site.ROUTER)
    assert np.isclose(flip.gap, 0.01)
    assert np.isclose(flip.drift, 0.015)
    caveat = router_caveat(table)
    assert caveat is not None
    assert caveat.code == "ROUTER_FLIP"


def test_drift_that_changes_no_choice_is_none() -> None:
    table = table_of(LOGITS + np.array([[0.0, 0.1, 0.0, 0.4], [0.3, 0.0, 0.1, 0.0]]))
    evidence = judge_router(table, "as_designed")
    assert evidence is not None
    assert (evidence.statistic, evidence.detail["n_compared"]) == (0.0, 2)
    assert router_caveat(table) is None


def test_another_order_of_the_same_experts_is_the_same_choice() -> None:
    assert table_of(LOGITS + np.array([[-1.5, 2.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])).flips == []


def test_all_experts_are_no_choice_and_numbers_are_needed() -> None:
    assert judge_router(table_of(LOGITS, n_chosen=4), "as_designed") is None
    assert judge_router(table_of(LOGITS * np.nan), "as_designed") is None
    assert judge_router(table_of(LOGITS), "kv_aligned") is None
