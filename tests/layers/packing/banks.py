"""Banks for the tests of packed copies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import moe_ops
from moe_ops.layers import Experts

H, I, E, K, T = 48, 40, 4, 2, 9


def make(dtype=torch.float32, **kwargs) -> Experts:
    bank = Experts(E, H, I, dtype=dtype, **kwargs)
    with torch.no_grad():
        for p in bank.parameters():
            p.normal_(std=0.3)
    return bank.eval()


def operands(dtype=torch.float32, tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.rand(tokens, E).argsort(1)[:, :K].int()
    return torch.randn(tokens, H).to(dtype), torch.rand(tokens, K), ids


def plain(bank: Experts, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """moe_ffn on the parameters as they are."""
    with torch.no_grad():
        return moe_ops.moe_ffn(
            x,
            bank.w_gate_up,
            bank.w_down,
            weights,
            ids,
            b_gate_up=bank.b_gate_up,
            b_down=bank.b_down,
            activation=bank.activation,
            interleaved=bank.interleaved,
            alpha=bank.alpha,
            limit=bank.limit,
        )


def assert_right(bank: Experts, call: tuple[Tensor, ...] | None = None) -> None:
    """The bank's next result is that of its weights, up to the order of the sums."""
    call = operands(bank.w_down.dtype) if call is None else call
    with torch.no_grad():
        got, want = bank(*call).double(), plain(bank, *call).double()
    eps = torch.finfo(bank.w_down.dtype).eps
    assert (got - want).norm() <= 4 * eps * want.norm()


def is_packed(bank: nn.Module) -> bool:
    return moe_ops.packed_weight_bytes(bank) > 0
