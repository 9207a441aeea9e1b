"""Forward and backward of the layer: moe_ops, transformers, plain torch.

Gradients of x, of the routing weights and of both weights are asked for. The usual way leaves fresh
gradients in ``.grad``, which is cleared before every step; into kept gradients (``main_grads``),
`moe_ffn` adds those of the weights, in buffers that live as long as the weights.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import moe_ops
from moe_ops import memory
from moe_ops.bench.baselines import hf_experts, loop_over_experts
from moe_ops.bench.shapes import Bank, Tokens

Step = Callable[[], dict[str, Tensor]]
OURS = "moe_ops"


def steps(bank: Bank, tokens: Tokens, grad_y: Tensor) -> dict[str, Callable[[], Step]]:
    """What makes each baseline's step, which returns the gradients of x, w_gate_up and w_down."""
    absent, own = skipped(), bank.in_huge_pages
    return {
        name: functools.partial(make, own if name.startswith(OURS) else bank, tokens, grad_y)
        for name, make in STEPS.items()
        if name not in absent
    }


def skipped() -> dict[str, str]:
    if importlib.util.find_spec("transformers"):
        return {}
    return {"HF grouped_mm": "transformers is not installed"}


def exact_grad_x(bank: Bank, tokens: Tokens, grad_y: Tensor) -> Tensor:
    """Gradient of x in fp64, from the derivatives written out, expert by expert."""
    x, weights, ids = tokens.x.double(), tokens.topk_weights.double(), tokens.topk_ids
    grad_x = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, slot = torch.where(ids == expert)
        w_gate_up, w_down = bank.w_gate_up[expert].double(), bank.w_down[expert].double()
        gate, up = (x[token] @ w_gate_up.T).chunk(2, dim=-1)
        grad_h = (grad_y[token].double() * weights[token, slot, None]) @ w_down
        s = torch.sigmoid(gate)
        grad_gate = grad_h * up * s * (1 + gate * (1 - s))
        grad_x.index_add_(0, token, torch.cat([grad_gate, grad_h * gate * s], -1) @ w_gate_up)
    return grad_x


def _leaves(bank: Bank, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, topk_weights = tokens.x.clone(), tokens.topk_weights.to(bank.dtype)
    return (
        x.requires_grad_(),
        bank.w_gate_up.detach().requires_grad_(),
        bank.w_down.detach().requires_grad_(),
        topk_weights.requires_grad_(),
    )


def _kept(bank: Bank, tokens: Tokens, grad_y: Tensor) -> Step:
    x, w_gate_up, w_down, topk_weights = _leaves(bank, tokens)
    main_grads = (torch.zeros_like(bank.w_gate_up), torch.zeros_like(bank.w_down))
    memory.use_huge_pages(*main_grads)
    first = True

    def step() -> dict[str, Tensor]:
        nonlocal first
        x.grad = topk_weights.grad = None
        y = moe_ops.moe_ffn(
            x, w_gate_up, w_down, topk_weights, tokens.topk_ids, main_grads=main_grads
        )
        y.backward(grad_y)
        assert x.grad is not None
        result = {"x": x.grad}
        if first:  # Later ones are sums of steps.
            result |= {"w_gate_up": main_grads[0].clone(), "w_down": main_grads[1].clone()}
        first = False
        return result

    return step


def _fresh(function: Callable[..., Tensor], bank: Bank, tokens: Tokens, grad_y: Tensor) -> Step:
    x, w_gate_up, w_down, topk_weights = leaves = _leaves(bank, tokens)

    def step() -> dict[str, Tensor]:
        for leaf in leaves:
            leaf.grad = None
        function(x, w_gate_up, w_down, topk_weights, tokens.topk_ids).backward(grad_y)
        return _grads(x, w_gate_up, w_down)

    return step


def hugging_face(bank: Bank, tokens: Tokens, grad_y: Tensor, keep: bool = False) -> Step:
    """transformers; `keep`: gradients of the weights stay and are added to, as with
    ``zero_grad(set_to_none=False)``, or from the second of several batches on."""
    experts: Any = hf_experts(bank, "grouped_mm")
    x, _, _, topk_weights = _leaves(bank, tokens)
    leaves = (x, topk_weights) if keep else (x, topk_weights, *experts.parameters())
    ids = tokens.topk_ids.long()

    def step() -> dict[str, Tensor]:
        for leaf in leaves:
            leaf.grad = None
        experts(x, ids, topk_weights).backward(grad_y)
        return _grads(x, experts.gate_up_proj, experts.down_proj)

    return step


def _grads(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> dict[str, Tensor]:
    assert x.grad is not None and w_gate_up.grad is not None and w_down.grad is not None
    return {"x": x.grad, "w_gate_up": w_gate_up.grad, "w_down": w_down.grad}


STEPS: dict[str, Callable[[Bank, Tokens, Tensor], Step]] = {
    OURS: functools.partial(_fresh, moe_ops.moe_ffn),
    "moe_ops main_grads": _kept,
    "HF grouped_mm": hugging_face,
    "per-expert mm": functools.partial(_fresh, loop_over_experts),
}
