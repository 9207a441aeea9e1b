"""RMSNorm of a residual stream, fused with the preceding addition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_ops.ops.add_rms_norm import add_rms_norm

from .inputs import jagged_parts, leaf_of_fx, values_of


class AddRMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` of [..., H] that first adds the previous layer's output to the residual stream.

    Parameters: weight [H]. Results are those of `nn.RMSNorm`.

    Args:
        hidden_size: H.
        eps: added to the mean of squares.
        device, dtype: of the weight.
    """

    eps: float

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps=eps, device=device, dtype=dtype)

    @leaf_of_fx
    def forward(  # type: ignore[override]
        self, x: Tensor, delta: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Computes the norm of the sum x + delta + bias, and the sum.

        Args:
            x: [..., H], the residual stream; may be jagged.
            delta: like x, added to it, or None.
            bias: [H] or None.

        Returns:
            Both [..., H], in the widest dtype of x, delta and weight.
        """
        if x.is_nested:
            jagged = jagged_parts("AddRMSNorm", x)
            delta = values_of("AddRMSNorm", "delta", delta, x)
            y, total = self.forward(jagged.values, delta, bias)
            return jagged.like(y), jagged.like(total)
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        if delta is not None:
            dtype = torch.promote_types(dtype, delta.dtype)
            delta = delta.to(dtype)
        if bias is not None:
            bias = bias.to(dtype)
        return add_rms_norm(x.to(dtype), self.weight.to(dtype), delta, bias=bias, eps=self.eps)
