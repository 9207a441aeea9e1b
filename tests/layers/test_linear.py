"""Dense layers of inference."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moe_ops
from moe_ops.layers import linear
from moe_ops.quant import QuantizedLinear, dequantize_weight, quantize_weight
from moe_ops.quant.config import config_named
from moe_ops.testing import assert_identical, eps, short

FORMATS = ("int8", "int4 g32", "int4 g64", "int4 g128")
formats = pytest.mark.parametrize("format", FORMATS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5), (64,), (65,), (0,)], ids=str)
def test_few_rows(shape, dtype, set_threads):
    layer = nn.Linear(70, 33).to(dtype)
    x = torch.randn(*shape, 70).to(dtype)
    with torch.no_grad():
        y = linear.linear(x, layer.weight, layer.bias)
        want = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert y.dtype == dtype and y.shape == (*shape, 33)
    assert (y - want).norm() <= 2 * eps(dtype) * want.norm() + 1e-30


def test_which_rows_go_where(monkeypatch):
    rows = []
    product = linear.grouped_gemm

    def watched(a, *args, **kwargs):
        rows.append(a.shape[0])
        return product(a, *args, **kwargs)

    monkeypatch.setattr(linear, "grouped_gemm", watched)
    layer = linear.FewRowsLinear(8, 4)
    with torch.no_grad():
        for shape in ((1, 8), (2, 3, 8), (linear.FEW_ROWS, 8), (linear.FEW_ROWS + 1, 8), (0, 8)):
            layer(torch.randn(shape))
    assert rows == [1, 6, linear.FEW_ROWS]
    layer(torch.randn(2, 8)).sum().backward()  # Training is torch's.
    with torch.no_grad(), torch.autocast("cpu"):
        assert layer(torch.randn(2, 8)).dtype == torch.bfloat16
    layer.double()(torch.randn(2, 8).double())
    assert len(rows) == 3
    assert layer.weight.grad is not None


@formats
def test_a_quantized_layer(format):
    layer = nn.Linear(256, 72)
    quantized = QuantizedLinear(layer, config_named("", format))
    q, scale = quantize_weight(layer.weight, format)
    assert torch.equal(quantized.q, q) and torch.equal(quantized.scale, scale)
    assert_identical(quantized.weight, dequantize_weight(q, scale, format))
    x = torch.randn(3, 40, 256)
    with torch.no_grad():
        y, want = quantized(x), F.linear(x, quantized.weight, layer.bias)
    assert (y - want).norm() <= 0.02 * want.norm()
    assert quantized.bias is layer.bias
    assert sum(b.nbytes for b in quantized.buffers()) == q.nbytes + scale.nbytes
    assert quantized.q.nbytes * (4 if format == "int8" else 8) == layer.weight.nbytes
    assert isinstance(quantized, nn.Linear)
    assert [name for name, _ in quantized.named_parameters()] == ["bias"]


@formats
def test_state_dict_is_that_of_a_linear_layer(format):
    layer = nn.Linear(128, 24, dtype=torch.bfloat16)
    quantized = QuantizedLinear(layer, config_named("", format))
    state = quantized.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
        k: (v.shape, v.dtype) for k, v in layer.state_dict().items()
    }
    other = QuantizedLinear(nn.Linear(128, 24), config_named("", format))
    model = nn.Sequential(other)
    model.load_state_dict({f"0.{k}": v for k, v in layer.state_dict().items()})
    assert torch.equal(other.q, quantized.q) and torch.equal(other.scale, quantized.scale)
    with pytest.raises(RuntimeError, match="weight must be floating point of shape"):
        other.load_state_dict({**state, "weight": torch.zeros(3, 3)})
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        other.load_state_dict({"bias": state["bias"]})
    untied = QuantizedLinear(layer, config_named("", format), saved=False)
    assert list(untied.state_dict()) == ["bias"]
    assert torch.equal(copy.deepcopy(quantized).weight, quantized.weight)


def test_casts_keep_codes_and_scales():
    quantized = QuantizedLinear(nn.Linear(64, 16), moe_ops.Int8WeightConfig())
    q, scale = quantized.q.clone(), quantized.scale.clone()
    quantized.to(torch.bfloat16)
    assert torch.equal(quantized.q, q) and assert_same(quantized.scale, scale)
    assert quantized.weight.dtype == quantized.bias.dtype == torch.bfloat16
    with torch.no_grad():
        assert quantized(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16


def assert_same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


@formats
def test_the_gradient_goes_through_the_dequantized_weight(format):
    layer = nn.Linear(128, 24)
    quantized = QuantizedLinear(layer, config_named("", format))
    x = torch.randn(5, 128, requires_grad=True)
    grad = torch.randn(5, 24)
    (quantized(x) * grad).sum().backward()
    torch.testing.assert_close(x.grad, grad @ quantized.weight)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


def test_compiles():
    torch.compiler.reset()
    model = nn.Sequential(
        linear.FewRowsLinear(64, 64), QuantizedLinear(nn.Linear(64, 32), moe_ops.Int8WeightConfig())
    )
    x = torch.randn(1, 3, 64)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


def test_bad_calls():
    with pytest.raises(
        ValueError, match=r"must be a multiple of 64 for int4 g64, got 40; use int8"
    ):
        QuantizedLinear(nn.Linear(40, 8))
    layer = nn.Linear(64, 8)
    layer.weight.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"must be finite"):
        QuantizedLinear(layer, moe_ops.Int8WeightConfig())
