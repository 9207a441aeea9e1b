from __future__ import annotations

import torch
from torch import Tensor

from .moe_ffn import moe_ffn

__all__ = ["moe_ffn_packed", "pack_experts"]


def pack_experts(w: Tensor, *, halves: bool = False) -> Tensor:
    """Returns the bytes of w. The op's order of bytes is private."""
    return w.detach().contiguous().view(torch.uint8).flatten()


def moe_ffn_packed(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    packed_gate_up: Tensor,
    packed_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    apply_router_weight_on_input: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    out_dtype: torch.dtype | None = None,
    packed_only: bool = False,
) -> Tensor:
    """Computes moe_ffn: the copies contain the values of the weights.

    packed_only does not matter here: the op's order of bytes is private, so the weights are read.
    """
    return moe_ffn(
        x,
        w_gate_up,
        w_down,
        topk_weights,
        topk_ids,
        b_gate_up=b_gate_up,
        b_down=b_down,
        activation=activation,
        interleaved=interleaved,
        apply_router_weight_on_input=apply_router_weight_on_input,
        alpha=alpha,
        limit=limit,
        out_dtype=out_dtype,
    )
