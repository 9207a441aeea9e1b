from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import acc_dtype

GATED = ("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai", "swiglu_clamped")
NON_GATED = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def gated_act(
    gate_up: Tensor,
    activation: str = "swiglu",
    *,
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Tensor:
    """Computes act(gate) * up over the last dimension, [..., 2I] to [..., I].

    The gate is the first half, or the even columns if `interleaved`. Two activations clamp gate to
    at most `limit` and up to between -limit and limit: "swiglu_oai" (gpt-oss), which is
    (up + 1) * gate * sigmoid(alpha * gate), and "swiglu_clamped", which is silu(gate) * up.
    """
    wide = gate_up.to(acc_dtype(gate_up.dtype))
    if interleaved:
        gate, up = wide[..., 0::2], wide[..., 1::2]
    else:
        gate, up = wide.chunk(2, dim=-1)
    if activation == "swiglu":
        h = F.silu(gate) * up
    elif activation == "geglu":
        h = F.gelu(gate) * up
    elif activation == "geglu_tanh":
        h = F.gelu(gate, approximate="tanh") * up
    elif activation == "reglu":
        h = F.relu(gate) * up
    elif activation in ("swiglu_oai", "swiglu_clamped"):
        # The gradient of torch's clamp at its bounds is 1 before torch 2.14 and 0 from then on.
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
        if activation == "swiglu_oai":
            h = (up + 1) * gate * torch.sigmoid(alpha * gate)
        else:
            h = F.silu(gate) * up
    else:
        raise ValueError(f"gated_act: activation must be one of {GATED}, got {activation!r}")
    return h.to(gate_up.dtype)


def plain_act(preact: Tensor, activation: str) -> Tensor:
    """Computes the non-gated activations of `moe_ffn`, [..., I] to [..., I]."""
    wide = preact.to(acc_dtype(preact.dtype))
    if activation == "silu":
        h = F.silu(wide)
    elif activation == "gelu":
        h = F.gelu(wide)
    elif activation == "gelu_tanh":
        h = F.gelu(wide, approximate="tanh")
    elif activation == "relu":
        h = F.relu(wide)
    elif activation == "relu2":
        h = F.relu(wide).square()
    else:
        raise ValueError(
            f"moe_ffn: activation must be one of {GATED + NON_GATED}, got {activation!r}"
        )
    return h.to(preact.dtype)
