"""Parts of a block like Llama's, on the tensors of a checkpoint and in terms of the references."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops import reference


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return reference.add_rms_norm(x, weight)[0]


def swiglu(w: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    """The network of `prefix` on x [..., H]."""
    gate, up, down = (w[f"{prefix}.{n}_proj.weight"] for n in ("gate", "up", "down"))
    return reference.gated_act(torch.cat([x @ gate.T, x @ up.T], -1)) @ down.T


def attention(w: dict[str, Tensor], prefix: str, x: Tensor, num_heads: int) -> Tensor:
    """Causal attention of x [S, H] with rotary positions."""
    q, k, v = ((x @ w[f"{prefix}.{n}_proj.weight"].T).unflatten(-1, (num_heads, -1)) for n in "qkv")
    size = q.shape[-1]
    angles = torch.arange(len(x))[:, None] * 10_000.0 ** (-torch.arange(0, size, 2) / size)
    cos, sin = angles.double().cos(), angles.double().sin()
    q, k = (reference.rotary(t[None], cos, sin) for t in (q, k))
    out = reference.moa_attention(q[:, :, None], k, v[None], kind="softmax")
    return out[0].flatten(1) @ w[f"{prefix}.o_proj.weight"].T
