"""Latent projection: routed experts with a smaller width than the model.

Letters: T tokens, H hidden size, L latent size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_ops.ops._checks import check_positive

from .functional import apply_linear
from .norm import AddRMSNorm


class LatentProjection(nn.Module):
    """Projections from the model's width to that of a `MoE`'s routed experts, and back.

    Example:
        latent = LatentProjection(H, L)
        layer = MoE(TopKRouter(H, E, K), Experts(E, L, I), SharedExperts(H, I), latent=latent)

    The layer computes up(norm(sum_k weight_k * expert_k(down(x)))) + shared(x). The router and
    shared experts read x itself. A routed expert has L / H of the parameters and memory traffic of
    one of width H, so that more experts, and more per token, have equal cost.

    Parameters:
        down.weight: [L, H]. up.weight: [H, L]. With `bias=True` down.bias [L] and up.bias [H].
        norm.weight: [L], with `norm=True`.

    Args:
        hidden_size, latent_size: H and L, at least 1.
        norm: adds an RMS norm of the experts' sum before the up projection (Kimi K3).
        norm_eps: added to the mean of squares.
        bias: adds biases to both maps.
        device, dtype: of the parameters.

    Initialization: maps like `nn.Linear`, the norm's weight 1.

    Raises:
        ValueError: a size below 1.

    Source: Elango et al. 2026 (LatentMoE, arXiv 2601.18089; in Nemotron 3); with the norm, Moonshot
    AI 2026 (Kimi K3 technical report, section 2.3.1).
    """

    def __init__(
        self,
        hidden_size: int,
        latent_size: int,
        *,
        norm: bool = False,
        norm_eps: float = 1e-6,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("LatentProjection", hidden_size=hidden_size, latent_size=latent_size)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.hidden_size = hidden_size
        self.latent_size = latent_size
        self.down = nn.Linear(hidden_size, latent_size, bias=bias, **where)
        self.norm = AddRMSNorm(latent_size, eps=norm_eps, **where) if norm else None
        self.up = nn.Linear(latent_size, hidden_size, bias=bias, **where)

    def enter(self, x: Tensor) -> Tensor:
        """Projects x [T, H] to [T, L]."""
        return apply_linear(self.down, x)

    def leave(self, y: Tensor) -> Tensor:
        """Projects the weighted sum of the experts [T, L] to [T, H]."""
        if self.norm is not None:
            y = self.norm(y)[0].to(y.dtype)
        return apply_linear(self.up, y)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, latent_size={self.latent_size}"
