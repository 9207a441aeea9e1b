"""Weights as models store them, dense along the output features, on CUDA tensors: the kernels are
those of contiguous weights, and gradients lie as the weights do."""

from __future__ import annotations

import re

import pytest
import torch
from tests.helpers.ffn import ffn_operands, stored
from tests.helpers.routing import Routing
from tests.hf.models import BLOCK_NAMES, build

import moe_ops
import moe_ops.hf

# Of the core of products, with a stage of the block in their epilogue or without.
STAGES = re.compile(r"UpConfig|DownBwdConfig|ConfigOf|few_rows")
SIZES = {"qwen3_moe": {"moe_intermediate_size": 24}}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_block_of_transformers(verbose, capfd, model_type):
    """Training: up, down, backward down, two weight gradients, the gradient of x. Decoding: two."""
    with torch.device("cpu"):
        model = build(model_type, dtype=torch.bfloat16, **SIZES.get(model_type, {}))
        x = torch.randn(1, 100, 32, dtype=torch.bfloat16)
    moe_ops.hf.enable(model)
    block = model.cuda().get_submodule(BLOCK_NAMES[model_type])
    x = x.cuda().requires_grad_()

    def stages(call):
        capfd.readouterr()
        call()
        lines = capfd.readouterr().err.splitlines()
        launches = [line for line in lines if re.match(r"ptxsim: \S+ grid \(", line)]
        return [found[0] for line in launches if (found := STAGES.search(line))]

    def train():
        y = block(x)
        (y if isinstance(y, torch.Tensor) else y[0]).sum().backward()

    assert stages(train) == ["UpConfig", "ConfigOf", "DownBwdConfig", *["ConfigOf"] * 3]
    for name, p in block.named_parameters():
        assert p.grad is None or p.grad.stride() == p.stride(), name
    with torch.no_grad():
        assert stages(lambda: block(x[:, :9])) == ["few_rows", "few_rows"]


@pytest.mark.parametrize("names", [("w_gate_up",), ("w_down",), ("w_gate_up", "w_down")])
def test_fake_gradients_lie_as_the_real_ones(names):
    call = stored(ffn_operands(Routing(9, 3, 2), 16, 8, torch.bfloat16), names)
    call = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    leaves = {n: call[n].requires_grad_() for n in ("x", "w_gate_up", "w_down")}
    torch.library.opcheck(
        torch.ops.moe_ops.moe_ffn.default,
        (*leaves.values(), call["topk_weights"], call["topk_ids"]),
        test_utils=("test_faketensor", "test_aot_dispatch_dynamic"),
    )
    moe_ops.moe_ffn(**{**call, **leaves}).sum().backward()
    for name in names:
        assert leaves[name].grad.stride() == leaves[name].stride()


def test_grouped_gemm():
    a = torch.randn(9, 16, device="cuda", dtype=torch.bfloat16)
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32, device="cuda")
    w = torch.randn(2, 16, 24, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (grad,) = torch.autograd.grad(moe_ops.grouped_gemm(a, w.mT, offsets).square().sum(), w)
    assert grad.is_contiguous()
    same = w.detach().mT.contiguous().requires_grad_()
    (want,) = torch.autograd.grad(moe_ops.grouped_gemm(a, same, offsets).square().sum(), same)
    torch.testing.assert_close(grad.mT, want)
