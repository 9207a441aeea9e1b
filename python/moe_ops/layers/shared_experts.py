"""The dense network of shared experts. Letters: H hidden size, I intermediate size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_ops.ops import gated_act
from moe_ops.ops._checks import check_positive

from .experts import check_activation
from .functional import linear, plain_activation
from .inputs import takes_jagged


class SharedExperts(nn.Module):
    """Dense feed-forward network applied to every token: y = W_down act(W_gate_up x).

    Several shared experts are represented by one network of their total width.

    Parameters:
        w_gate_up: [2I, H], gate half first; [I, H] when the activation is not gated.
        w_down: [H, I].

    Args:
        hidden_size, intermediate_size: H and I (the total width), at least 1.
        activation: see `Experts`.
        alpha, limit: parameters of "swiglu_oai".
        device, dtype: of the parameters.

    Initialization: uniform in +-1/sqrt(fan_in), like `nn.Linear`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "swiglu",
        alpha: float = 1.702,
        limit: float = 7.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
        check_positive("SharedExperts", **sizes)
        self.gated = check_activation("SharedExperts", activation, False)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.activation = activation
        self.alpha = alpha
        self.limit = limit
        width = intermediate_size * (2 if self.gated else 1)
        self.w_gate_up = nn.Parameter(torch.empty(width, hidden_size, device=device, dtype=dtype))
        self.w_down = nn.Parameter(
            torch.empty(hidden_size, intermediate_size, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values described in the class docstring."""
        for weight in (self.w_gate_up, self.w_down):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    @takes_jagged
    def forward(self, x: Tensor) -> Tensor:
        """Maps x [..., H], which may be jagged, to [..., H] in the dtype of x."""
        preact = linear(x, self.w_gate_up)
        if self.gated:
            h = gated_act(preact, self.activation, alpha=self.alpha, limit=self.limit)
        else:
            h = plain_activation(preact, self.activation)
        return linear(h, self.w_down)

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"activation={self.activation!r}"
        )
