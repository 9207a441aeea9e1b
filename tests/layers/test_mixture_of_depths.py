"""Mixture-of-Depths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moe_ops.layers import MixtureOfDepths

B, S, H = 3, 8, 6


class Causal(nn.Module):
    """Attention with one head and no projections but one: a token sees the rows before it."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(H, H, dtype=torch.float64)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, *, positions: Tensor) -> Tensor:
        self.seen.append(positions)
        scores = x @ x.transpose(1, 2)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        angles = positions[..., None].to(x.dtype)
        return scores.masked_fill(future, -torch.inf).softmax(-1) @ self.value(x) * angles.cos()


def make(**options) -> MixtureOfDepths:
    return MixtureOfDepths(Causal(), H, dtype=torch.float64, **options)


def definition(layer: MixtureOfDepths, x: Tensor, kept: Tensor, positions: Tensor) -> Tensor:
    """Equation 1 of the paper, a sequence at a time."""
    y = x.clone()
    for b in range(len(x)):
        at = kept[b].nonzero()[:, 0]
        if len(at):
            r = x[b, at] @ layer.weight[0]
            made = layer.block(x[b, at][None], positions=positions[b, at][None])[0]
            y[b, at] = x[b, at] + r[:, None] * made
    return y


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_output_and_gradients_are_those_of_the_definition(causal, shifted):
    layer = make(capacity=0.3, predictor_size=4)
    x = torch.randn(B, S, H, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(S).expand(B, S) + (torch.arange(B)[:, None] * 5 if shifted else 0)
    out = layer(x, positions=positions if shifted else None, causal=causal, return_routing=True)
    if causal:
        counts = out.kept.sum(1)
        assert counts.min() < counts.max(), "the test wants sequences of different lengths"
    else:
        best = (x @ layer.weight[0]).topk(3, dim=1).indices  # ceil(0.3 * 8)
        assert torch.equal(out.kept, torch.zeros(B, S).scatter(1, best, 1.0).bool())
    expected = definition(layer, x, out.kept, positions)
    torch.testing.assert_close(out.y, expected)
    upstream = torch.randn_like(expected)
    leaves = [x, layer.weight, *layer.block.parameters()]
    got = torch.autograd.grad((out.y * upstream).sum(), leaves, retain_graph=True)
    wanted = torch.autograd.grad((expected * upstream).sum(), leaves)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    # The loss is the predictor's alone.
    grads = torch.autograd.grad(out.predictor_loss, [*layer.parameters(), x], allow_unused=True)
    named = dict(zip([n for n, _ in layer.named_parameters()] + ["x"], grads, strict=True))
    assert {n for n, g in named.items() if g is not None} == {
        n for n in named if n.startswith("predictor")
    }


def test_a_causal_token_depends_on_no_later_one():
    layer = make(predictor_size=4)
    x = torch.randn(B, S, H, dtype=torch.float64)
    whole = layer(x, causal=True)
    for n in range(1, S + 1):
        torch.testing.assert_close(layer(x[:, :n], causal=True), whole[:, :n])


def test_predictor_learns_the_choice():
    layer = make(capacity=0.5, predictor_size=16)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    for _ in range(150):
        out = layer(torch.randn(8, 16, H, dtype=torch.float64), return_routing=True)
        optimizer.zero_grad()
        out.predictor_loss.backward()
        optimizer.step()
    x = torch.randn(8, 16, H, dtype=torch.float64)
    chosen, predicted = (layer(x, causal=c, return_routing=True).kept for c in (False, True))
    assert (chosen == predicted).double().mean() > 0.8


def test_edges():
    layer = make(capacity=1.0, predictor_size=0)
    x = torch.randn(B, S, H, dtype=torch.float64)
    positions = torch.arange(S).expand(B, S)
    every = torch.ones(B, S, dtype=torch.bool)
    torch.testing.assert_close(layer(x), definition(layer, x, every, positions))
    assert layer(x, return_routing=True).predictor_loss is None
    assert layer(x[:, :0]).shape == (B, 0, H) and layer(x[0]).shape == (S, H)
    one = make(capacity=0.1)
    with torch.no_grad():
        one.weight.zero_()  # All tie: the first is kept.
        assert one(x, return_routing=True).kept.sum(0).tolist() == [B] + [0] * (S - 1)
        one.predictor_out.weight.zero_(), one.predictor_out.bias.fill_(-1.0)
    assert torch.equal(one(x, causal=True), x)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make(capacity=0.0), "capacity"),
        (lambda: make(predictor_size=-1), "predictor_size"),
        (lambda: make(predictor_size=0)(torch.randn(S, H), causal=True), "predictor"),
        (lambda: make()(torch.randn(S, H + 1)), "x must be"),
        (lambda: make()(torch.randn(S, H), positions=torch.arange(3)), "positions"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value) and ", got " in str(caught.value)
