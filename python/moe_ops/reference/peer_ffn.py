from __future__ import annotations

import torch
from torch import Tensor

from ._common import acc_dtype
from .gated_act import GATED, gated_act, plain_act


def peer_ffn(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "gelu",
    sparse_grad: bool = False,
) -> Tensor:
    """Computes y[t] = sum_k weight[t, k] act(u_e . x[t]) v_e, e = topk_ids[t, k]; u_e is
    w_gate_up[e].

    Gradients are dense, whatever `sparse_grad` is.
    """
    acc, num_experts = acc_dtype(x.dtype), w_gate_up.shape[0]
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    ids = topk_ids.long().masked_fill(~valid, num_experts)  # the row of zeros
    preact = torch.einsum("tkgh,th->tkg", _gathered(w_gate_up.to(acc), ids), x.to(acc))
    preact = torch.where(valid[..., None], preact, 0)
    act = gated_act if activation in GATED else plain_act
    h = act(preact, activation)[..., 0]
    factors = h * torch.where(valid, topk_weights.to(acc), 0)
    return torch.einsum("tk,tkh->th", factors, _gathered(w_down.to(acc)[..., 0], ids)).to(x.dtype)


def _gathered(table: Tensor, ids: Tensor) -> Tensor:
    return torch.cat([table, table.new_zeros(1, *table.shape[1:])])[ids]
