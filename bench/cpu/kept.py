"""Training steps that accumulate into existing gradients.

`moe_ops.moe_ffn` adds weight gradients to buffers that live as long as the weights
(``main_grads``); with transformers ``.grad`` stays and is added to, as with
``zero_grad(set_to_none=False)``, or from the second of several batches on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import moe_ops
from moe_ops import memory
from moe_ops.bench.baselines import STEPS, Step, grads_of, hf_experts, leaves_of
from moe_ops.bench.shapes import Bank, Tokens


def main_grads_step(bank: Bank, tokens: Tokens, grad_y: Tensor) -> Step:
    x, w_gate_up, w_down, topk_weights = leaves_of(bank, tokens)
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


def kept_grad_step(bank: Bank, tokens: Tokens, grad_y: Tensor) -> Step:
    experts: Any = hf_experts(bank, "grouped_mm")
    x, _, _, topk_weights = leaves_of(bank, tokens)
    ids = tokens.topk_ids.long()

    def step() -> dict[str, Tensor]:
        x.grad = topk_weights.grad = None
        experts(x, ids, topk_weights).backward(grad_y)
        return grads_of(x, experts.gate_up_proj, experts.down_proj)

    return step


# In the order of the recorded results.
TIMED = {"moe_ops": STEPS["moe_ops"], "moe_ops main_grads": main_grads_step, **STEPS}
MEASURED = {**TIMED, "HF grouped_mm kept .grad": kept_grad_step}
