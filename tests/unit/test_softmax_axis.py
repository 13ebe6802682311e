"""Which products a softmax weighs is told by the axis that it runs along."""

import pytest
import torch

from kvdrift.engines.torch.attended import OperandPair, along, axis_of


@pytest.mark.parametrize(("axis", "flipped"), [(-1, False), (3, False), (-2, True), (2, True)])
def test_keys_stand_in_the_axis_of_the_softmax(axis: int, flipped: bool) -> None:
    query, key = torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8)
    pairs = [OperandPair(query, key), OperandPair(query, key, is_flipped=True)]

    assert [pair.is_flipped for pair in along(pairs, torch.zeros(1, 4, 1, 1), axis)] == [flipped]


def test_no_product_has_its_keys_in_the_axis_of_heads() -> None:
    query, key = torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8)

    assert along([OperandPair(query, key), OperandPair(query, key, is_flipped=True)], torch.zeros(1, 4, 1, 1), 1) == []


def test_a_softmax_names_its_axis_by_place_or_by_name_and_runs_along_the_last_without() -> None:
    scores = torch.zeros(1, 2)
    assert (axis_of((scores, 2), {}), axis_of((scores,), {"dim": -2}), axis_of((scores,), {})) == (2, -2, -1)
