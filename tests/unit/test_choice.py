"""Choices of a generation loop against the logits of prefill."""

import math

import numpy as np
import pytest

from kvdrift.instruments.choice import ChoiceTable, judge_choices
from kvdrift.trace.model import PassPair, Trace
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import Site


def pair(tokens: tuple[int, ...], prefill: list[list[float]], decode: list[list[float]], first: int = 1) -> PassPair:
    """Return passes with logits at the positions from `first` on."""
    positions = tuple(range(first, first + len(prefill)))
    traces = []
    for name, logits in (("prefill", prefill), ("decode", decode)):
        trace = Trace("p", name, "x", "float32", tokens)  # type: ignore[arg-type]
        trace.add_rows(None, Site.LOGITS, positions, np.array(logits, dtype=np.float32))
        traces.append(trace)
    return PassPair(Mode.AS_DESIGNED, traces[0], traces[1], positions)


def greedy(tokens: tuple[int, ...], prefill: list[list[float]], decode: list[list[float]]) -> ChoiceTable:
    table = ChoiceTable()
    table.add(pair(tokens, prefill, decode), "greedy")
    return table


def test_a_choice_that_prefill_calls_for_is_no_news() -> None:
    table = greedy((5, 6, 2, 0), [[0.0, 1.0, 3.0], [2.0, 1.0, 0.0]], [[0.0, 1.0, 3.1], [2.0, 1.0, 0.0]])
    seen = judge_choices(table, "as_designed", is_rounding=True)

    assert table.all_turned() == []
    assert seen is not None
    assert (seen.statistic, seen.supports) == (0.0, None)
    assert "call for all 2 choices" in seen.text


def test_a_gap_within_twice_the_drift_is_a_near_tie() -> None:
    table = greedy((5, 6, 1), [[0.0, 2.0, 2.25]], [[0.0, 2.125, 2.125]])
    (turned,) = table.all_turned()
    seen = judge_choices(table, "as_designed", is_rounding=True)

    assert turned.address == Address("p", 1, None, Site.LOGITS)
    assert (turned.chosen, turned.better, turned.gap, turned.noise) == (1, 2, 0.25, 0.25)
    assert not turned.is_wrong
    assert seen is not None
    assert (seen.statistic, seen.supports) == (1.0, None)
    assert seen.detail["turned"][0]["kind"] == "near tie"  # type: ignore[index]


def test_it_is_not_called_a_near_tie_where_the_drift_is_none_of_rounding() -> None:
    seen = judge_choices(greedy((5, 6, 1), [[0.0, 2.0, 2.25]], [[0.0, 4.0, 1.0]]), "as_designed", is_rounding=False)

    assert seen is not None
    assert seen.supports is None
    assert seen.detail["turned"][0]["kind"] == "turned by drift"  # type: ignore[index]


def test_a_gap_beyond_twice_the_drift_is_wrong() -> None:
    table = greedy((5, 6, 1), [[0.0, 2.0, 2.25]], [[0.0, 2.0625, 2.1875]])
    seen = judge_choices(table, "as_designed", is_rounding=True)

    assert [turned.is_wrong for turned in table.all_turned()] == [True]
    assert seen is not None
    assert (seen.statistic, seen.supports) == (2.0, "H1")
    assert "1 wrong" in seen.text


def test_equal_bits_and_another_token_is_wrong_whatever_the_gap() -> None:
    table = greedy((5, 6, 1), [[0.0, 2.0, 2.0000002]], [[0.0, 2.0, 2.0000002]])
    seen = judge_choices(table, "as_designed", is_rounding=True)

    assert seen is not None
    assert (seen.statistic, seen.supports) == (math.inf, "H1")


@pytest.mark.parametrize("taken", [1, 2])
def test_an_exact_tie_is_fine_either_way(taken: int) -> None:
    assert greedy((5, 6, taken), [[0.0, 2.0, 2.0]], [[0.0, 2.0, 2.0]]).all_turned() == []


def test_a_token_that_is_impossible_on_both_routes_is_no_drift() -> None:
    table = greedy((5, 6, 1), [[-math.inf, 2.0, 1.0]], [[-math.inf, 2.0, 1.0]])

    assert table.compared == 1
    assert table.all_turned() == []


def test_logits_that_are_not_finite_are_judged_by_others() -> None:
    table = greedy((5, 6, 1), [[math.nan, 2.0, 1.0]], [[0.0, 2.0, 1.0]])

    assert table.compared == 0
    assert judge_choices(table, "as_designed", is_rounding=True) is None


def test_the_last_token_was_chosen_by_nothing_that_was_compared() -> None:
    assert greedy((5, 6), [[0.0, 2.0, 1.0]], [[0.0, 2.0, 1.0]]).compared == 0


FLAT = [0.0, 0.0, 0.0]


def beams(*rows: tuple[tuple[int, ...], list[list[float]]], drift: float = 0.0) -> ChoiceTable:
    table = ChoiceTable()
    for tokens, logits in rows:
        other = [[logits[0][0] + drift, *logits[0][1:]], *logits[1:]]
        table.add(pair(tokens, logits, other), "beams x")
    return table


def test_beams_in_their_order_are_no_news() -> None:
    table = beams(((5, 6, 2), [[0.0, 1.0, 3.0]]), ((5, 6, 1), [[0.0, 1.0, 3.0]]))

    assert table.all_turned() == []


def test_beams_out_of_order_are_wrong() -> None:
    (turned,) = beams(((5, 6, 1), [[0.0, 1.0, 3.0]]), ((5, 6, 2), [[0.0, 1.0, 3.0]])).all_turned()

    assert turned.is_wrong
    assert turned.gap == pytest.approx(2.0)
    assert (turned.chosen, turned.better) == (1, 2)


def test_beams_out_of_order_by_less_than_their_drift_are_a_near_tie() -> None:
    rows = ((5, 6, 1), [[0.0, 1.0, 1.01]]), ((5, 6, 2), [[0.0, 1.0, 1.01]])

    assert [turned.is_wrong for turned in beams(*rows, drift=0.1).all_turned()] == [False]


def test_beams_whose_scores_only_float32_tells_apart_are_a_near_tie() -> None:
    rows = ((5, 6, 1), [[0.0, 1.0, 1.0000001]]), ((5, 6, 2), [[0.0, 1.0, 1.0000001]])

    assert [turned.is_wrong for turned in beams(*rows).all_turned()] == [False]


def test_a_continuation_that_surpasses_a_returned_beam_is_wrong() -> None:
    table = beams(((5, 6, 2, 1), [FLAT, [0.0, 3.0, 2.9]]), ((5, 6, 1, 0), [FLAT, [0.0, 0.0, 0.0]]))

    (turned,) = table.all_turned()

    # Token 2 behind 5 6 2 comes before what was returned last: both first steps cost log 3, and so does that last one.
    assert (turned.address.position, turned.better) == (2, 2)
    assert turned.gap == pytest.approx(2.9 - math.log(1.0 + math.exp(3.0) + math.exp(2.9)) + math.log(3.0), rel=1e-6)


def test_the_score_is_that_of_all_steps() -> None:
    """The second beam is behind in its last step and before in sum."""
    table = beams(
        ((5, 6, 1, 2), [[0.0, -4.0, 0.0], [0.0, 0.0, 5.0]]), ((5, 6, 2, 2), [[0.0, -4.0, 0.0], [0.0, 0.0, 4.0]])
    )

    assert any("returned before the next beam" in turned.text for turned in table.all_turned())
