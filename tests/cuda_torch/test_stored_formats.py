"""Weights as checkpoints store them, on CUDA tensors: few tokens in CUDA graphs, and many tokens
without anything that waits for the device."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.nearness import WithoutHost
from tests.helpers.quantized import STORED_GROUPS, STORED_RECORDS, stored_call
from tests.helpers.routing import Routing
from torch import Tensor, nn

import moe_ops
from moe_ops.ops._library import cuda_formulas
from moe_ops.quant import Int4WeightConfig, Int8WeightConfig
from moe_ops.quant.linear import QuantizedLinear
from moe_ops.quant.stored_linear import StoredLinear
from moe_ops.weight_formats import parse_format

kinds = pytest.mark.parametrize("kind", [*STORED_GROUPS, *STORED_RECORDS])


def sizes(kind):
    return (480, 160) if "g160" in kind else (576, 192) if "g96" in kind else (512, 256)


def operands(kind, tokens, seed):
    torch.manual_seed(seed)
    with torch.device("cpu"):
        call = stored_call(kind, Routing(tokens, 4, 2), *sizes(kind), torch.bfloat16, bias=True)
    return {n: v.cuda() if isinstance(v, Tensor) else v for n, v in call.items()}


def replayed(run, static, new):
    """Returns what a captured call makes of new values, and what the call itself makes of them."""
    run()  # what the allocator and caches do once is no part of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for name, value in new.items():
        static[name].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    return y.cpu(), run().cpu()


@kinds
def test_few_tokens_in_a_graph(kind):
    call, new = operands(kind, 3, 1), operands(kind, 3, 2)
    tensors = {name: value for name, value in new.items() if isinstance(value, Tensor)}
    y, want = replayed(lambda: moe_ops.moe_ffn_quantized(**call), call, tensors)
    assert want.abs().sum() > 0
    torch.testing.assert_close(y, want, rtol=0, atol=0)


@kinds
def test_a_stored_layer_in_a_graph(kind):
    features = sizes(kind)[0]
    layer = StoredLinear(features, 40, parse_format(kind), bias=True, dtype=torch.bfloat16).cuda()
    weights = {
        "codes": operands(kind, 1, 3)["w_gate_up"][0, :40],
        "scale": operands(kind, 1, 3)["w_gate_up_scale"][0, : len(layer.scale)],
    }
    with torch.no_grad():
        for name, value in weights.items():
            getattr(layer, name).copy_(value)
        static = {"x": torch.randn(2, features, device="cuda", dtype=torch.bfloat16)}
        new = {"x": torch.randn(2, features, device="cuda", dtype=torch.bfloat16)}
        y, want = replayed(lambda: layer(static["x"]), static, new)
    assert want.abs().sum() > 0
    torch.testing.assert_close(y, want, rtol=0, atol=0)


@pytest.mark.parametrize("config", [Int8WeightConfig(), Int4WeightConfig(64)], ids=str)
def test_a_quantized_layer_in_a_graph(config):
    with torch.device("cpu"):
        layer = QuantizedLinear(nn.Linear(256, 96, dtype=torch.bfloat16), config)
    layer = layer.cuda()
    static = {"x": torch.randn(1, 3, 256, device="cuda", dtype=torch.bfloat16)}
    new = {"x": torch.randn(1, 3, 256, device="cuda", dtype=torch.bfloat16)}
    with torch.no_grad():
        y, want = replayed(lambda: layer(static["x"]), static, new)
        exact = new["x"].cpu().double() @ layer.weight.cpu().double().T + layer.bias.cpu().double()
    assert (want.double() - exact).norm() <= 0.01 * exact.norm()
    torch.testing.assert_close(y, want, rtol=0, atol=0)


@kinds
def test_many_tokens_never_wait(kind):
    """More than 64 slots per expert are made of torch's kernels."""
    call = operands(kind, 140, 4)
    names = ["x", "w_gate_up", "w_gate_up_scale", "w_down", "w_down_scale", "topk_weights"]
    rest = (call["format"], None, call["b_gate_up"], call["b_down"], "swiglu", False, False)
    zeros = call.get("w_gate_up_zero"), call.get("w_down_zero")
    run = cuda_formulas["moe_ffn_quantized_fwd"]
    with WithoutHost():
        y, *_ = run(*(call[n] for n in names), call["topk_ids"], *rest, 1.702, 7.0, *zeros)
    few = {n: call[n][:9] for n in ("x", "topk_weights", "topk_ids")}
    want = moe_ops.moe_ffn_quantized(**{**call, **few})
    assert (y[:9] - want).norm() <= 0.02 * want.norm()
