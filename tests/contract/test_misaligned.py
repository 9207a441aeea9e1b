"""Operands whose memory begins at an odd address, as a tensor's may that lies in a file or a
buffer: bitwise identical results as from aligned memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_ops.testing import assert_identical

from .every_op import FLOATS, OPS, backward_of, forward_of, operands_of

# UBSan checks in this test that no element is read in a way that needs an aligned address.
pytestmark = pytest.mark.cpu_only


def at_odd_address(t: Tensor) -> Tensor:
    size = t.element_size()
    memory = torch.zeros(t.numel() * size + size, dtype=torch.uint8)
    odd = torch.frombuffer(memory.numpy().data[1 : 1 + t.numel() * size], dtype=torch.uint8)
    moved = odd.view(t.dtype).view(t.shape)
    moved.copy_(t)
    assert moved.data_ptr() % 2 == 1
    return moved


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("op", OPS)
def test_any_address(op, dtype):
    call = operands_of(op, dtype)
    moved = {
        name: at_odd_address(value) if isinstance(value, Tensor) else value
        for name, value in call.items()
    }
    pairs = [(forward_of(op, moved), forward_of(op, call))]
    backward = backward_of(op, call)
    if backward is not None:
        pairs.append((backward_of(op, moved, at_odd_address), backward))
    for actual, expected in pairs:
        for a, b in zip(actual(), expected(), strict=True):
            assert_identical(a, b)
