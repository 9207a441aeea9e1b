"""The measured layers, their weights and tokens, and the amount of work."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moe_ops import memory
from moe_ops.ops import topk_router

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Bytes per weight. int8 and int4 have separate fp32 scales, see `Tokens.weight_bytes`; fp8 has one
# for 128 x 128 weights, mxfp4 one of a byte for 32.
_WEIGHT_BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "int8": 1.0,
    "int4": 0.5,
    "fp8": 1.0 + 4.0 / 128**2,
    "mxfp4": 0.5 + 1.0 / 32,
}
INT4_GROUP = 32


@dataclass(frozen=True)
class Shape:
    """Layer of E experts of width I on tokens of width H, K experts per token."""

    name: str
    H: int
    I: int
    E: int
    K: int
    like: str = ""

    def __str__(self) -> str:
        return f"H{self.H} I{self.I} E{self.E} K{self.K}"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("a32", 2048, 768, 32, 8, "Qwen3-30B-A3B with 32 of its 128 experts"),
        Shape("b", 2048, 3584, 8, 2, "Mixtral, half as wide"),
        Shape("c", 2048, 1024, 64, 8, "OLMoE"),
        Shape("d", 256, 512, 16, 2, "a small model"),
        Shape("e", 1024, 512, 32, 4, "a medium model"),
        Shape("f16", 7168, 2048, 16, 8, "DeepSeek-V3 with 16 of its 256 experts"),
    )
}


@dataclass(frozen=True)
class Bank:
    """Weights of one layer, in Hugging Face's layout."""

    shape: Shape
    w_gate_up: Tensor
    w_down: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.w_gate_up.dtype

    @cached_property
    def in_huge_pages(self) -> Bank:
        """Returns a copy whose weights are stored like those of moe_ops layers."""

        def copy(w: Tensor) -> Tensor:
            result = torch.empty_like(w)
            memory.use_huge_pages(result)
            return result.copy_(w)

        return Bank(self.shape, copy(self.w_gate_up), copy(self.w_down))


@dataclass(frozen=True)
class Tokens:
    """The first T tokens of a batch with their routing."""

    x: Tensor
    topk_weights: Tensor
    topk_ids: Tensor

    @property
    def count(self) -> int:
        return self.x.shape[0]

    @cached_property
    def experts_used(self) -> int:
        return int(self.topk_ids.unique().numel())

    def weight_bytes(self, shape: Shape, dtype: str) -> float:
        """Returns the bytes of weights of the experts that have tokens."""
        weights = 3.0 * shape.H * shape.I
        each = weights * _WEIGHT_BYTES[dtype]
        if dtype == "int8":
            each += 4.0 * (2 * shape.I + shape.H)
        if dtype == "int4":
            each += 4.0 * weights / INT4_GROUP
        return self.experts_used * each


def flops(shape: Shape, num_tokens: int, *, training: bool = False) -> float:
    """Returns multiplications and additions of the three GEMMs; a training step has three times as
    many."""
    return num_tokens * shape.K * 6.0 * shape.H * shape.I * (3 if training else 1)


def make_bank(
    shape: Shape, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu"
) -> Bank:
    """Creates weights with a variance that keeps activations near one."""
    generator = torch.Generator(device).manual_seed(seed)

    def weights(*size: int) -> Tensor:
        w = torch.empty(size, dtype=dtype, device=device)
        for expert in w:  # One at a time, to avoid an fp32 copy of all experts.
            normal = torch.randn(expert.shape, generator=generator, device=device)
            expert.copy_(normal * size[-1] ** -0.5)
        return w

    return Bank(
        shape,
        weights(shape.E, 2 * shape.I, shape.H),
        weights(shape.E, shape.H, shape.I),
    )


def make_tokens(shape: Shape, dtype: torch.dtype, num_tokens: int, seed: int = 1) -> Tokens:
    """Creates random x and a routing by random logits: mildly uneven, like a trained router's.

    Routing weights are exactly representable in `dtype`, because some baselines convert them to it.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, shape.H, generator=generator).to(dtype)
    logits = torch.randn(num_tokens, shape.E, generator=generator)
    topk_weights, topk_ids = topk_router(logits, shape.K, renormalize=True)
    return Tokens(x, topk_weights.to(dtype).float(), topk_ids)


def take(tokens: Tokens, count: int) -> Tokens:
    return Tokens(tokens.x[:count], tokens.topk_weights[:count], tokens.topk_ids[:count])


def exact_output(bank: Bank, tokens: Tokens, rows: Tensor) -> Tensor:
    """Returns the layer's output in fp64 for the chosen tokens, [len(rows), H], computed expert by
    expert to save memory."""
    x, weights, ids = tokens.x[rows].double(), tokens.topk_weights[rows], tokens.topk_ids[rows]
    y = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, slot = torch.where(ids == expert)
        gate, up = (x[token] @ bank.w_gate_up[expert].double().T).chunk(2, dim=-1)
        out = (torch.nn.functional.silu(gate) * up) @ bank.w_down[expert].double().T
        y.index_add_(0, token, out * weights[token, slot, None].double())
    return y
