"""Soft MoE."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moe_ops
from moe_ops.layers import Experts, SoftMoE

B, S, H, E, P, O = 2, 7, 6, 3, 2, 4


def make(normalize: bool = True) -> SoftMoE:
    experts = Experts(E, H, 5, output_size=O, activation="gelu", bias=True, dtype=torch.float64)
    layer = SoftMoE(experts, P, normalize=normalize, dtype=torch.float64)
    if layer.scale is not None:
        torch.nn.init.constant_(layer.scale, 3.0)
    return layer


def definition(layer: SoftMoE, x: Tensor, mask: Tensor) -> Tensor:
    """Equations 1 to 3 of the paper, a slot and a token at a time; x [S, H], mask [S]."""
    phi = layer.phi.view(-1, H)
    keys, scale = x, 1.0
    if layer.scale is not None:
        keys, phi = x / x.norm(dim=1, keepdim=True), phi / phi.norm(dim=1, keepdim=True)
        scale = layer.scale
    logits = scale * keys @ phi.T
    made = []
    for j in range(E * P):
        d = logits[mask, j].softmax(0)
        row = (d[:, None] * x[mask]).sum(0)
        made.append(layer.experts.outputs(row[None])[0, j // P])
    rows = [
        (logits[s].softmax(0)[:, None] * torch.stack(made)).sum(0) * mask[s] for s in range(len(x))
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("normalize", [True, False])
def test_output_and_gradients_are_those_of_the_definition(normalize):
    layer = make(normalize)
    x = torch.randn(B, S, H, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, 4:] = False
    out = layer(x, token_mask=mask, return_routing=True)
    expected = torch.stack([definition(layer, x[b], mask[b]) for b in range(B)])
    torch.testing.assert_close(out.y, expected)
    upstream = torch.randn_like(expected)
    leaves = [x, *layer.parameters()]
    got = torch.autograd.grad((out.y * upstream).sum(), leaves)
    wanted = torch.autograd.grad((expected * upstream).sum(), leaves)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert out.dispatch.shape == (B, E, P, S) and out.combine.shape == (B, S, E, P)
    torch.testing.assert_close(out.dispatch.sum(-1), torch.ones(B, E, P, dtype=torch.float64))
    assert not out.dispatch[1, ..., 4:].any() and not out.combine[1, 4:].any()


def test_shapes_dtypes_and_modes():
    layer = make()
    x = torch.randn(B, S, H, dtype=torch.float64)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    assert layer(x[:, :0]).shape == (B, 0, O) and layer(x[:0]).shape == (0, S, O)
    with moe_ops.batch_invariant():
        torch.testing.assert_close(layer(x), layer(x))
        assert torch.equal(layer(x)[1:], layer(x[1:]))
    half = SoftMoE(Experts(E, H, 5), P).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert half.float()(x.float()).shape == x.shape


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SoftMoE(Experts(E, H, 5), 0), "slots_per_expert"),
        (lambda: make()(torch.randn(S, H + 1)), "x must be"),
        (lambda: make()(torch.randn(S, H), token_mask=torch.ones(S + 1)), "token_mask"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value) and ", got " in str(caught.value)
