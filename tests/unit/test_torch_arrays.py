"""From torch to numpy: the same bits, in memory of their own, however the tensor lies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvdrift.engines.torch.arrays import rows_of, to_array, to_tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())


def lying_in_every_way(dtype: torch.dtype) -> list[Tensor]:
    """Tensors [5, 4, 6] with NaN, infinity and -0.0 in them, contiguous, transposed, cut and repeated."""
    values = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(3))
    values[1, 2, :3] = torch.tensor([torch.nan, torch.inf, -0.0])
    tensor = values.to(dtype)
    repeated = tensor[:, :1].expand(5, 4, 6)
    turned = tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return [tensor, turned, torch.cat([tensor, tensor])[::2], repeated, tensor.clone().requires_grad_()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_those_that_were_asked_for_bit_by_bit(dtype: torch.dtype) -> None:
    at = torch.tensor([3, 1, 1])
    for tensor in lying_in_every_way(dtype):
        for chosen, wanted in ((None, tensor), (at, tensor[at]), (at[:1], tensor[at[:1]])):
            rows = rows_of(tensor, chosen)

            assert rows.shape == (len(wanted), 24)
            assert rows.flags.c_contiguous
            assert rows.tobytes() == bits(wanted.detach())
            assert to_tensor(rows, tensor.device).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_copy_keeps_its_values_when_the_tensor_changes(dtype: torch.dtype) -> None:
    for tensor in (values.detach().contiguous() for values in lying_in_every_way(dtype)):
        before = bits(tensor)
        copies = [to_array(tensor), rows_of(tensor, None), rows_of(tensor, torch.arange(5))]

        tensor.zero_()

        assert [copy.tobytes() for copy in copies] == [before] * 3
