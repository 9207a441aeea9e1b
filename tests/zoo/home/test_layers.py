"""Gates, feature gates and expert norms of the multi-task models."""

from __future__ import annotations

import copy

import pytest
import torch
from bench.studies.home.models import OpenGates
from bench.studies.home.traces import gate_entropy, scale_ratio, zero_fraction
from torch import nn

from moe_ops.zoo.home.layers import FeatureGate, Gates

from .common import T, batch, feature_gate, make


def test_gates_of_one_and_of_no_expert():
    mask = torch.tensor([[True, True, False], [False, True, False], [False, False, False]])
    x = torch.randn(T, 4, dtype=torch.float64, requires_grad=True)
    for kind in (Gates, OpenGates):
        gates = kind(mask, 4).double()
        nn.init.normal_(gates.linear.weight)
        weights = gates(x)
        logits = torch.einsum("th,moh->tmo", x, gates.linear.weight)
        torch.testing.assert_close(weights[:, 0, :2], logits[:, 0, :2].softmax(-1))
        expected = logits[:, 1, 1].sigmoid() if kind is Gates else torch.ones_like(x[:, 0])
        torch.testing.assert_close(weights[:, 1, 1], expected)
        assert not weights[~mask.expand(T, -1, -1)].any()
        grads = torch.autograd.grad(weights.square().sum(), [x, *gates.parameters()])
        assert all(g.isfinite().all() for g in grads)
        assert not grads[1][~mask].any()
    all_lone = Gates(mask[1:2], 4)
    assert all_lone(x.float()).shape == (T, 1, 3)


def test_feature_gates_start_as_the_identity():
    gate = FeatureGate(3, 8, 2)
    v = torch.randn(T, 8)
    torch.testing.assert_close(gate(v), v[:, None].expand(-1, 3, -1))
    y = gate(v)
    y.square().sum().backward()
    assert gate.up.weight.grad.abs().min() > 0  # so training leaves the identity


@pytest.mark.parametrize("num_lora", [1, 2, 3, 4])
@pytest.mark.parametrize("own", [False, True])
def test_feature_gates_of_any_rank(own, num_lora):
    """Up to two pairs a gate are one product, more are two."""
    module = FeatureGate(3, 7, num_lora).double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    v = torch.randn(T, 3, 7, dtype=torch.float64) if own else torch.randn(T, 7).double()
    read = [v[:, g] if own else v for g in range(3)]
    expected = torch.stack([feature_gate(module, g, read[g]) for g in range(3)], dim=1)
    torch.testing.assert_close(module(v), expected)


@pytest.mark.parametrize("norm", [False, True])
def test_a_trace_changes_nothing(norm):
    model = make("home", expert_norm=norm)
    categorical, dense = batch()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(model(categorical, dense), twin(categorical, dense, []))
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name))


def test_expert_norm_cures_dead_outputs():
    categorical, dense = batch(400)
    health = {}
    for norm in (False, True):
        model = make("home", expert_norm=norm)
        trace = []
        model(categorical, dense, trace)
        assert [t.outputs.shape[1:] for t in trace] == [(8, 5), (13, 5)]
        assert gate_entropy(trace[1]).shape == (5,)
        health[norm] = trace[1]
    assert zero_fraction(health[False]).max() > 0.2
    assert zero_fraction(health[True]).max() == 0
    assert scale_ratio(health[True]) < scale_ratio(health[False])
