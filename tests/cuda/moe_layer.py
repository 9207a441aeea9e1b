"""Runs a MoE layer forward and backward on a backend and saves what comes out. Run by
test_layers.py: moe_layer.py cpu|sim CALL RESULT."""

from __future__ import annotations

import sys

import torch
from tests.helpers.moe import build_moe
from tests.helpers.simulator import use_simulator


def run(build, state, x, grad):
    layer = build_moe(**build).to(x.dtype)
    layer.load_state_dict(state)
    x.requires_grad_()
    out = layer(x, return_routing=True)
    leaves = {"x": x, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(out.y, list(leaves.values()), grad, allow_unused=True)
    named = {k: g for k, g in zip(leaves, grads, strict=True) if g is not None}
    return {"y": out.y.detach(), "topk_ids": out.topk_ids, **named}


if __name__ == "__main__":
    backend, call, result = sys.argv[1:]
    if backend == "sim":
        use_simulator()
    torch.save(run(**torch.load(call)), result)
