"""Ways to run the experts of a layer forward: moe_ops, transformers, plain torch.

Formats are those of the weights: fp32, bf16, int8, int4. A baseline prepares its own copy of the
weights once, binds it to a batch of tokens, and the call that comes out is what is timed.
"""

from __future__ import annotations

import functools
import importlib.metadata
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
    """One way to run the layer.

    `name` is what reports print, `formats` the weight formats it has, `package` the distribution
    whose version is reported.
    """

    name: str
    formats: tuple[str, ...] = ("fp32", "bf16")
    package: str = "torch"
    # Whether the environment of `--isa` holds it to that instruction set.
    follows_isa: bool = True

    def missing(self) -> str | None:
        """Why it cannot run here, in a few words; None if it can."""
        return None

    def prepare(self, bank: Bank, weight_format: str) -> Bind:
        """Converts the weights. The returned function binds tokens; its result is timed."""
        raise NotImplementedError

    def version(self) -> str:
        return importlib.metadata.version(self.package)


def tolerance(weight_format: str) -> float:
    """Largest relative error against fp64, beyond which a baseline is refused.

    fp32: a sum of some thousand terms rounds to 1e-6 to 4e-6, and an approximated exponential may
    add as much. bf16: eight roundings of an intermediate. Integers: uniform errors of half a step,
    where the largest of a row of 2048 normal weights is 4 of their deviations (int8, one scale a
    row, activations likewise) and of 32 to 128 weights 2.1 to 2.7 (int4); three products in a row;
    twice that is allowed.
    """
    return {
        "fp32": 1e-5,
        "bf16": 8 * 2.0**-8,
        "int8": 2 * 3**0.5 * 2**0.5 * (4 / 127) / 12**0.5,
        "int4": 2 * 3**0.5 * (2.7 / 7.5) / 12**0.5,
    }[weight_format]


# --------------------------------------------------------------------------------- moe_ops


class MoeOps(Baseline):
    """moe_ffn on the weights as they are, but in huge pages, where layers keep them."""

    name = "moe_ops"
    package = "torch-moe-ops"

    def prepare(self, bank: Bank, weight_format: str) -> Bind:
        bank = bank.in_huge_pages

        def bind(tokens: Tokens) -> Call:
            arguments = (tokens.x, bank.w_gate_up, bank.w_down)
            return lambda: moe_ops.moe_ffn(*arguments, tokens.topk_weights, tokens.topk_ids)

        return bind

    def version(self) -> str:
        return moe_ops.__version__


class MoeOpsPacked(MoeOps):
    """moe_ffn_packed: what layers do in inference."""

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
    """The experts of a Qwen3-MoE block of transformers around the weights of `bank`."""
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
            # Its router hands weights over in the dtype of the model.
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
    """The usual PyTorch loop: gather an expert's tokens, two products, add back.

    The weights are unbound once: indexing them in the loop, as is often seen, makes the backward
    pass add a gradient of the size of all experts for every single one. `widen` makes fp32 of each
    expert's weights first, where bf16 products are slow.
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


# The last of these that ran in a cell stands for moe_ops.
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
