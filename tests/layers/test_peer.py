"""PEER: product keys and experts of one neuron."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops.layers import PEER

T, H, E, K, R, D = 6, 7, 16, 3, 2, 8


def make(**options) -> PEER:
    options = {"num_heads": R, "query_size": D, "dtype": torch.float64, **options}
    return PEER(H, E, K, **options)


def definition(layer: PEER, x: Tensor) -> tuple[Tensor, Tensor]:
    """All E keys of all heads written out; the sorted experts of each token and head too."""
    queries = layer.query(x)
    if layer.query_norm is not None:
        queries = layer.query_norm(queries)
    first, second = layer.sub_keys
    side = len(first)
    keys = torch.cat([first.repeat_interleave(side, 0), second.repeat(side, 1)], 1)
    scores = queries.view(T, R, D) @ keys.T  # [T, R, E]
    best, ids = scores.topk(K, dim=-1)
    weights = best.softmax(-1)
    u, v = layer.experts.w_gate_up[:, 0], layer.experts.w_down[:, :, 0]
    h = F.gelu(torch.einsum("trkh,th->trk", u[ids], x))
    return torch.einsum("trk,trkh->th", weights * h, v[ids]), ids


@pytest.mark.parametrize("query_norm", [False, True])
def test_output_and_gradients_are_those_of_the_definition(query_norm):
    layer = make(query_norm=query_norm)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    out = layer(x, return_routing=True)
    expected, ids = definition(layer, x)
    assert torch.equal(out.topk_ids.view(T, R, K).long(), ids)
    torch.testing.assert_close(out.topk_weights.view(T, R, K).sum(-1), torch.ones(T, R).double())
    torch.testing.assert_close(out.y, expected)
    upstream = torch.randn_like(expected)
    leaves = [x, *layer.parameters()]
    got = torch.autograd.grad((out.y * upstream).sum(), leaves)
    wanted = torch.autograd.grad((expected * upstream).sum(), leaves)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_both_ways_through_the_experts_are_one_function(activation):
    layer = make(activation=activation)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(T, R * K, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(E, (T, R * K), dtype=torch.int32)
    gathered, sorted_ = layer._run_experts(x, weights, ids), layer.experts(x, weights, ids)
    torch.testing.assert_close(gathered, sorted_)
    upstream = torch.randn_like(gathered)
    leaves = [x, weights, *layer.experts.parameters()]
    got = torch.autograd.grad((gathered * upstream).sum(), leaves)
    wanted = torch.autograd.grad((sorted_ * upstream).sum(), leaves)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_sparse_gradients():
    """Those of the experts alone, and with a bank that the op does not know, dense ones."""
    layer = make(sparse_grad=True, query_norm=False)
    x = torch.randn(T, H, dtype=torch.float64)
    layer(x).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.is_sparse == name.startswith("experts."), name
    sparse = layer.experts.w_down.grad.to_dense()
    layer.zero_grad()
    layer.sparse_grad = False
    layer(x).sum().backward()
    assert torch.equal(layer.experts.w_down.grad, sparse)


def test_shapes_and_types():
    layer = make(dtype=torch.float32)
    assert layer(torch.randn(2, 3, H)).shape == (2, 3, H)
    assert layer(torch.randn(0, H)).shape == (0, H)
    x = torch.randn(T, H).bfloat16()
    assert layer.eval().bfloat16()(x).dtype == torch.bfloat16
    assert PEER(H, 9, 2).query_size == H + 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: PEER(H, 15), "square"),
        (lambda: PEER(H, 16, 5), "top_k"),
        (lambda: PEER(H, 16, 2, query_size=5), "even"),
        (lambda: PEER(H, 16, 2, num_heads=0), "num_heads"),
        (lambda: make()(torch.randn(T, H + 1)), "x must be"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value) and ", got " in str(caught.value)
