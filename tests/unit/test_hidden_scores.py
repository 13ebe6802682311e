"""Which scores are those of masked keys: no number that a key can have may be taken for one."""

import pytest
import torch

from kvdrift.engines.torch.masks import hide_masked, hide_scaled


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_smallest_number_of_a_mask_is_hidden_and_large_scores_are_not(dtype: torch.dtype) -> None:
    mask = torch.finfo(torch.float32 if dtype is torch.float64 else dtype).min
    scores = torch.tensor([1500.0, -1500.0, -30000.0, mask, mask + 5.0], dtype=dtype)

    assert hide_masked(scores, dtype).isneginf().tolist() == [False, False, False, True, True]


def test_a_mask_that_is_scaled_with_float32_scores_is_hidden() -> None:
    scores = torch.tensor([2.0, (torch.finfo(torch.bfloat16).min + 3.0) / 16.0])

    assert hide_masked(scores, torch.float32).isneginf().tolist() == [False, True]


def test_a_scaled_mask_of_float16_is_hidden_only_where_the_key_has_no_probability() -> None:
    scores = torch.tensor([2.0, -65504.0 / 16.0, -65504.0 / 16.0])

    hidden = hide_scaled(scores, scores, torch.tensor([0.9, 0.0, 0.1]), torch.float16)

    assert hidden.isneginf().tolist() == [False, True, False]
