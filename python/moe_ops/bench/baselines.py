"""Implementations of a layer's experts, forward and in training: moe_ops, transformers, plain
torch.

Formats are weight formats: fp32, bf16, int8, int4, fp8, mxfp4. A baseline prepares its own copy of
the weights once and binds it to a batch of tokens; the resulting call is timed.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_ops
from moe_ops.bench.shapes import Bank, Tokens

Call = Callable[[], Tensor]
Bind = Callable[[Tokens], Call]


class Baseline:
    """Implementation of the layer.

    `name` is printed in reports, `formats` are the supported weight formats, `package` is the
    distribution whose version is reported.
    """

    name: str
    formats: tuple[str, ...] = ("fp32", "bf16")
    package: str = "torch"

    def missing(self) -> str | None:
        """Returns a short reason why it cannot run here, or None if it can."""
        return None

    def prepare(self, bank: Bank, weight_format: str) -> Bind:
        """Converts the weights. The returned function binds tokens; its result is timed."""
        raise NotImplementedError


def tolerance(weight_format: str) -> float:
    """Returns the largest accepted relative error against fp64; a baseline beyond it is rejected.

    fp32: a sum of some thousand terms rounds to 1e-6 to 4e-6, and an approximated exponential may
    add as much. bf16: eight roundings of an intermediate. Integers: uniform errors of half a step,
    where the largest of 2048 normal weights of a row is 4 standard deviations (int8, one scale per
    row, also for activations) and of 32 to 128 weights 2.1 to 2.7 (int4); three GEMMs in sequence;
    the tolerance is twice that. fp8 and mxfp4 have 3 and 1 bits behind the leading one: uniform
    errors of half a unit of the last bit, twice that for three GEMMs as well.
    """
    return {
        "fp32": 1e-5,
        "bf16": 8 * 2.0**-8,
        "int8": 2 * 3**0.5 * 2**0.5 * (4 / 127) / 12**0.5,
        "int4": 2 * 3**0.5 * (2.7 / 7.5) / 12**0.5,
        "fp8": 2 * 3**0.5 * 2.0**-3 / 12**0.5,
        "mxfp4": 2 * 3**0.5 * 2.0**-1 / 12**0.5,
    }[weight_format]


# --------------------------------------------------------------------------------- moe_ops


class MoeOps(Baseline):
    """Runs moe_ffn on unpacked weights in huge pages, where layers store them."""

    name = "moe_ops"
    package = "torch-moe-ops"

    def prepare(self, bank: Bank, weight_format: str) -> Bind:
        bank = bank.in_huge_pages

        def bind(tokens: Tokens) -> Call:
            arguments = (tokens.x, bank.w_gate_up, bank.w_down)
            return lambda: moe_ops.moe_ffn(*arguments, tokens.topk_weights, tokens.topk_ids)

        return bind


class MoeOpsPacked(MoeOps):
    """Runs moe_ffn_packed, as layers do in inference."""

    name = "moe_ops packed"

    def prepare(self, bank: Bank, weight_format: str) -> Bind:
        copies = (
            moe_ops.pack_experts(bank.w_gate_up, halves=True),
            moe_ops.pack_experts(bank.w_down),
        )

        def bind(tokens: Tokens) -> Call:
            arguments = (tokens.x, bank.w_gate_up, bank.w_down, *copies)
            routing = (tokens.topk_weights, tokens.topk_ids)
            return lambda: moe_ops.moe_ffn_packed(*arguments, *routing)

        return bind


# ----------------------------------------------------------------------------- transformers


def hf_experts(bank: Bank, implementation: str) -> Any:
    """Returns the experts of transformers' Qwen3-MoE block, with the weights of `bank`."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    shape = bank.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.H,
        moe_intermediate_size=shape.I,
        num_experts=shape.E,
        num_experts_per_tok=shape.K,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(bank.w_gate_up)
    experts.down_proj = torch.nn.Parameter(bank.w_down)
    return experts


class HuggingFace(Baseline):
    """The experts of transformers' Qwen3-MoE with one of its own implementations."""

    package = "transformers"

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation
        self.name = f"HF {implementation}"

    def missing(self) -> str | None:
        return None if importlib.util.find_spec("transformers") else "transformers is not installed"

    def prepare(self, bank: Bank, weight_format: str) -> Bind:
        experts = hf_experts(bank, self.implementation)

        def bind(tokens: Tokens) -> Call:
            # Its router returns weights in the dtype of the model.
            arguments = (tokens.x, tokens.topk_ids.long(), tokens.topk_weights.to(bank.dtype))
            return lambda: experts(*arguments)

        return bind


# ------------------------------------------------------------------------------ plain torch


def loop_over_experts(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    widen: bool = False,
) -> Tensor:
    """Runs the usual PyTorch loop: gather an expert's tokens, two GEMMs, add back.

    The weights are unbound once: indexing them in the loop, as is common, makes the backward pass
    add a gradient of the size of all experts for every expert. `widen` converts each expert's
    weights to fp32 first, for machines where bf16 GEMMs are slow.
    """
    dtype = torch.float32 if widen else x.dtype
    y, wide = torch.zeros_like(x, dtype=dtype), x.to(dtype)
    weights = zip(w_gate_up.unbind(), w_down.unbind(), strict=True)
    for expert, (gate_up, down) in enumerate(weights):
        token, slot = torch.where(topk_ids == expert)
        if token.numel() == 0:
            continue
        gate, up = F.linear(wide[token], gate_up.to(dtype)).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, down.to(dtype))
        y.index_add_(0, token, (out * topk_weights[token, slot, None]).to(dtype))
    return y.to(x.dtype)


class Loop(Baseline):
    """One of the loops over experts above."""

    def __init__(self, name: str, function: Callable[..., Tensor], *formats: str) -> None:
        self.name, self.function, self.formats = name, function, formats

    def prepare(self, bank: Bank, weight_format: str) -> Bind:
        def bind(tokens: Tokens) -> Call:
            arguments = (tokens.x, bank.w_gate_up, bank.w_down)
            return lambda: self.function(*arguments, tokens.topk_weights, tokens.topk_ids)

        return bind


# The last of these that ran in a cell represents moe_ops.
OURS = ("moe_ops", "moe_ops packed", "moe_ops quantized")


def builtin_baselines() -> list[Baseline]:
    return [
        MoeOps(),
        MoeOpsPacked(),
        HuggingFace("grouped_mm"),
        HuggingFace("eager"),
        Loop("per-expert mm", loop_over_experts, "fp32", "bf16"),
        Loop("widened mm", functools.partial(loop_over_experts, widen=True), "bf16"),
    ]


# --------------------------------------------------------------------------------- training
#
# Gradients of x, of the routing weights and of both weights are computed into new .grad tensors,
# which are cleared before every step.

Step = Callable[[], dict[str, Tensor]]


def skipped_steps() -> dict[str, str]:
    if importlib.util.find_spec("transformers"):
        return {}
    return {"HF grouped_mm": "transformers is not installed"}


def exact_grad_x(bank: Bank, tokens: Tokens, grad_y: Tensor) -> Tensor:
    """Returns the gradient of x in fp64, from explicit derivatives, expert by expert."""
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


def leaves_of(bank: Bank, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns x, w_gate_up, w_down and topk_weights, with requires_grad."""
    x, topk_weights = tokens.x.clone(), tokens.topk_weights.to(bank.dtype)
    return (
        x.requires_grad_(),
        bank.w_gate_up.detach().requires_grad_(),
        bank.w_down.detach().requires_grad_(),
        topk_weights.requires_grad_(),
    )


def _fresh(function: Callable[..., Tensor], bank: Bank, tokens: Tokens, grad_y: Tensor) -> Step:
    x, w_gate_up, w_down, topk_weights = leaves = leaves_of(bank, tokens)

    def step() -> dict[str, Tensor]:
        for leaf in leaves:
            leaf.grad = None
        function(x, w_gate_up, w_down, topk_weights, tokens.topk_ids).backward(grad_y)
        return grads_of(x, w_gate_up, w_down)

    return step


def _hugging_face(bank: Bank, tokens: Tokens, grad_y: Tensor) -> Step:
    experts: Any = hf_experts(bank, "grouped_mm")
    x, _, _, topk_weights = leaves_of(bank, tokens)
    leaves, ids = (x, topk_weights, *experts.parameters()), tokens.topk_ids.long()

    def step() -> dict[str, Tensor]:
        for leaf in leaves:
            leaf.grad = None
        experts(x, ids, topk_weights).backward(grad_y)
        return grads_of(x, experts.gate_up_proj, experts.down_proj)

    return step


def grads_of(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> dict[str, Tensor]:
    assert x.grad is not None and w_gate_up.grad is not None and w_down.grad is not None
    return {"x": x.grad, "w_gate_up": w_gate_up.grad, "w_down": w_down.grad}


# Each returns a step, which returns the gradients of x, w_gate_up and w_down.
STEPS: dict[str, Callable[[Bank, Tokens, Tensor], Step]] = {
    "moe_ops": functools.partial(_fresh, moe_ops.moe_ffn),
    "HF grouped_mm": _hugging_face,
    "per-expert mm": functools.partial(_fresh, loop_over_experts),
}
