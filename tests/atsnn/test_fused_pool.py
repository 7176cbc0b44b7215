"""Max pooling on channels-last maps: values and gradients of torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from atsnn.fused_pool import fits, max_pool


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 8), (8, 8), (9, 5)])
@pytest.mark.parametrize("binary", [True, False])
def test_values_and_gradients_of_torch(size: tuple[int, int], binary: bool) -> None:
    torch.manual_seed(0)
    maps = torch.randn(3, 20, *size)
    maps = (maps > 0.8).float() if binary else maps
    maps = maps.contiguous(memory_format=torch.channels_last).requires_grad_()
    pooled, expected = max_pool(maps), functional.max_pool2d(maps, 3, 2, 1)
    assert torch.equal(pooled, expected)
    weight = torch.randn_like(expected)
    (ours,) = torch.autograd.grad((pooled * weight).sum(), maps)
    (theirs,) = torch.autograd.grad((expected * weight).sum(), maps)
    assert torch.equal(ours, theirs)


def test_needs_contiguous_channels() -> None:
    assert not fits(torch.zeros(2, 3, 4, 4))
    assert fits(torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
    assert not fits(torch.zeros(2, 3, 4, 4, dtype=torch.int64))
