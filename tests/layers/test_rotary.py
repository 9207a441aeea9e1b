"""Angles of positions, and the rotation of pairs of features by them."""

from __future__ import annotations

import math

import pytest
import torch

import moe_ops
from moe_ops.layers.rotary import Rope, Yarn

pytestmark = pytest.mark.cpu_only


def test_yarn_keeps_fast_frequencies_and_stretches_slow_ones():
    plain, stretched = Rope(64), Rope(64, yarn=Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0))
    ratio = plain.frequencies() / stretched.frequencies()
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(40.0, rel=1e-5)
    assert bool((ratio.diff() >= -1e-4).all())
    # Turns within 4096 tokens: 32 and more are kept, 1 and fewer are stretched.
    turns = 4096 * plain.frequencies() / (2 * math.pi)
    assert bool((ratio[turns > 40] == 1).all()) and bool((ratio[turns < 0.8] > 39.9).all())
    assert stretched.yarn.softmax_factor() == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    assert stretched.yarn.rotation_scale() == 1.0


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_a_product_of_complex_numbers(interleaved):
    """Features of a pair are the parts of a number that is multiplied by exp(i angle)."""
    rope = Rope(6, 100.0, interleaved)
    t = torch.randn(2, 5, 3, 6, dtype=torch.float64)
    angles = (3 + torch.arange(5.0).double())[:, None] * 100.0 ** (-torch.arange(3.0).double() / 3)
    turned = torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = t.unflatten(-1, (3, 2)) if interleaved else t.unflatten(-1, (2, 3)).mT
    expected = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turned)
    ours = rope.rotate(t, rope.rotation(3, 5))
    # The first features of all pairs come before the second ones; angles are of fp32.
    torch.testing.assert_close(ours, expected.mT.flatten(-2), rtol=1e-5, atol=1e-5)


def test_the_op_rotates_alike():
    rope = Rope(8)
    t, rotation = torch.randn(2, 5, 3, 8), rope.rotation(7, 5)
    torch.testing.assert_close(moe_ops.rotary(t, *rotation), rope.rotate(t, rotation))


def test_positions_of_any_shape_and_type():
    rope = Rope(8, yarn=Yarn(4.0, 64))
    whole = rope.rotation(0, 12)
    positions = torch.tensor([[3, 0], [11, 3]])
    at = rope.at(positions)
    assert at.cos.shape == (2, 2, 4) and at.cos.dtype == torch.float32
    assert torch.equal(at.cos, whole.cos[positions])
    assert torch.equal(at.sin, whole.sin[positions])
