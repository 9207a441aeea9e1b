"""Tests of what models do with CUDA tensors: autocast, pinned memory, the compiler, and their
mistakes."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.contract.every_op import operands_of
from tests.helpers.quantized import weight_config
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_ops
from moe_ops import reference
from moe_ops.layers import Experts, MoE, TopKRouter

from .calls import CASES, IDS, Step, call_of


def layer_and_input(dtype: torch.dtype = torch.float32) -> tuple[MoE, torch.Tensor]:
    with torch.device("cpu"):
        torch.manual_seed(6)
        layer = MoE(TopKRouter(32, 4, top_k=2), Experts(4, 32, 48))
        return layer.to(dtype), torch.randn(9, 32, dtype=dtype)


def output_of(result: object) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def test_autocast_as_on_the_cpu():
    layer, x = layer_and_input()
    on_cuda = copy.deepcopy(layer).cuda()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = output_of(layer(x))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = output_of(on_cuda(x.cuda()))
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.cpu(), want, rtol=3e-2, atol=3e-2)
    got.sum().backward()
    assert all(p.grad is not None and p.grad.is_cuda for p in on_cuda.parameters())


def test_pinned_memory():
    layer, x = layer_and_input()
    pinned = x.pin_memory()
    assert pinned.is_pinned()
    want = output_of(copy.deepcopy(layer).cuda()(x.cuda()))
    got = output_of(copy.deepcopy(layer).cuda()(pinned.to("cuda", non_blocking=True)))
    assert torch.equal(got, want)
    # Pinned memory is memory of the host: ops on it run on the CPU.
    assert torch.equal(output_of(layer(pinned)), output_of(layer(x)))


@pytest.mark.parametrize(("op", "dtype"), CASES, ids=IDS)
def test_fake_cuda_tensors(op, dtype):
    """Shapes, types and devices without a kernel, as the compiler asks for them."""
    call = call_of(op, dtype, seed=7)
    want = Step(op, backward=False)(call)
    with FakeTensorMode() as mode:
        fakes = {
            n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in call.items()
        }
        got = Step(op, backward=False)(fakes)
    facts = [(t.shape, t.stride(), t.dtype, t.device) for t in want]
    assert [(t.shape, t.stride(), t.dtype, t.device) for t in got] == facts


def test_compiled_layer():
    layer, x = layer_and_input()
    layer, x = layer.cuda(), x.cuda()
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    want, got = output_of(layer(x)), output_of(compiled(x))
    torch.testing.assert_close(got, want)
    want.sum().backward()
    got.sum().backward()
    for p, q in zip(layer.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("topk_router", "expert_bias"),
        ("moe_ffn", "w_gate_up"),
        ("permute", "row_to_slot"),
        ("grouped_gemm", "b"),
        ("moa_attention", "k"),
    ],
)
def test_tensor_of_the_host(op, name):
    call = call_of(op, torch.float32, seed=8)
    if call.get(name) is None:
        call[name] = torch.zeros(call["router_logits"].shape[1])
    call[name] = call[name].cpu()
    with pytest.raises(ValueError, match=rf"^{op}: {name} must be on cuda:0 .*, got a CPU tensor"):
        getattr(moe_ops, op)(**call)


@pytest.mark.parametrize(
    "op",
    [
        "all_experts_ffn",
        "mix_expert_outputs",
        "moe_ffn_packed",
        "moe_ffn_quantized",
        "router_linear",
        "rotary",
        "add_rms_norm",
    ],
)
def test_ops_are_their_references(op):
    """Those that are torch's operations on CUDA, or round otherwise than on the CPU."""
    with torch.device("cpu"):
        call = operands_of(op, torch.float32)
        want = getattr(reference, op)(**call)
    call = {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in call.items()}
    got = getattr(moe_ops, op)(**call)
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    for a, b in pairs:
        assert a.is_cuda
        assert (a.cpu() - b).norm() <= 1e-5 * b.norm()


def test_a_prepacked_bank_moves():
    layer, x = layer_and_input()
    layer.eval()
    with torch.no_grad():
        want = output_of(layer(x))
        assert moe_ops.pack_weights(layer) > 0
        layer.cuda()
        assert moe_ops.packed_weight_bytes(layer) == 0
        torch.testing.assert_close(output_of(layer(x.cuda())).cpu(), want, rtol=1e-4, atol=1e-5)
        assert moe_ops.pack_weights(layer) == 0
        torch.testing.assert_close(output_of(layer(x.cuda())).cpu(), want, rtol=1e-4, atol=1e-5)
    assert moe_ops.pack_experts(layer.experts.w_down).shape == (0,)


@pytest.mark.parametrize(("format", "group"), [("int8", None), ("int4", 32)])
def test_quantized_experts(format, group):
    """Quantized on CUDA, or on the CPU and moved: the same bank, and no integers of its tokens."""
    layer, x = layer_and_input()
    with torch.device("cpu"):
        layer.experts = Experts(4, 32, 64)
    moved, layer = copy.deepcopy(layer).eval(), layer.eval().cuda()
    moe_ops.quantize(layer, weight_config(format, group))
    moe_ops.quantize(moved, weight_config(format, group))
    with torch.no_grad():
        y = output_of(layer(x.cuda()))
        assert torch.equal(output_of(moved.cuda()(x.cuda())), y)
        layer.experts = layer.experts.dequantize()
        torch.testing.assert_close(output_of(layer(x.cuda())), y, rtol=1e-4, atol=1e-5)
