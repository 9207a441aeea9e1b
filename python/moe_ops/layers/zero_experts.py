"""Zero-computation experts, added to regular experts.

Letters: T tokens, H hidden size, E experts, K experts per token, C constant experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .functional import linear
from .inputs import takes_dense
from .routing import valid_ids
from .stats import count_tokens_per_expert

KINDS = ("zero", "identity", "constant")


class ZeroComputationExperts(nn.Module):
    """Experts with additional, almost free experts, to which a router can send easy tokens.

    Ids are those of the real experts, then of zero experts (output 0), identity experts (output x),
    and constant experts (output a x + b v with a trained vector v and (a, b) = softmax(W x)). All
    are weighted like other experts, so a token with K slots uses at most K real experts.

    Example:
        MoE(TopKRouter(64, 12, 2), ZeroComputationExperts(Experts(8, 64, 32), num_identity=4))

    Parameters: constant [C, H], initialized as N(0, 1); constant_gate [C, 2, H], initialized like
    nn.Linear.

    Args:
        experts: real experts: `Experts` or a module with its interface.
        num_zero, num_identity, num_constant: number of experts of each kind.
        device, dtype: of the parameters of constant experts.

    Balancing losses treat all experts equally; for a target fraction of real experts, use
    `update_expert_bias` or weight the loss. `select`, `append`, `split` and `merge` raise
    NotImplementedError; apply them to `experts`.

    Raises:
        ValueError: a negative number.

    Source: Jin et al. 2024 (MoE++, arXiv 2410.07348), all kinds; Meituan 2025 (LongCat-Flash, arXiv
    2509.01322), identity experts.
    """

    def __init__(
        self,
        experts: nn.Module,
        *,
        num_zero: int = 0,
        num_identity: int = 0,
        num_constant: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        numbers = dict(zip(KINDS, (num_zero, num_identity, num_constant), strict=True))
        for kind, number in numbers.items():
            if number < 0:
                raise ValueError(
                    f"ZeroComputationExperts: num_{kind} must be at least 0, got {number}."
                )
        bank: Any = experts
        self.experts = bank
        self.hidden_size: int = bank.hidden_size
        self.num_zero, self.num_identity, self.num_constant = numbers.values()
        self.num_real: int = bank.num_experts
        self.num_experts = self.num_real + sum(numbers.values())
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (num_constant, self.hidden_size)
        self.constant = nn.Parameter(torch.empty(shape, **where)) if num_constant else None
        self.constant_gate = (
            nn.Parameter(torch.empty(num_constant, 2, self.hidden_size, **where))
            if num_constant
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values of the constant experts."""
        if self.constant is not None and self.constant_gate is not None:
            nn.init.normal_(self.constant)
            bound = self.hidden_size**-0.5
            nn.init.uniform_(self.constant_gate, -bound, bound)

    @takes_dense
    def forward(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        apply_router_weight_on_input: bool = False,
    ) -> Tensor:
        """Computes y[t] = sum_k topk_weights[t, k] * expert topk_ids[t, k] of x[t]; see
        `Experts.forward`.

        Raises:
            ValueError: `apply_router_weight_on_input` with constant experts.
        """
        if apply_router_weight_on_input and self.num_constant:
            raise ValueError(
                "ZeroComputationExperts: apply_router_weight_on_input must be False with constant "
                "experts, got True."
            )
        # The real experts ignore ids out of their range.
        y: Tensor = self.experts(
            x, topk_weights, topk_ids, apply_router_weight_on_input=apply_router_weight_on_input
        )
        first = self.num_real + self.num_zero
        if first == self.num_experts or not x.shape[0]:
            return y
        num_free = self.num_experts - first
        valid, index = valid_ids(topk_ids - first, num_free)
        weights = topk_weights.masked_fill(~valid, 0.0)
        share = weights.new_zeros(x.shape[0], num_free).scatter_add(1, index, weights)
        scale = share[:, : self.num_identity].sum(1, keepdim=True)
        constants: Tensor | float = 0.0
        if self.constant is not None and self.constant_gate is not None:
            gate = linear(x, self.constant_gate.flatten(0, 1).to(x.dtype))
            a, b = gate.unflatten(1, (-1, 2)).to(share.dtype).softmax(-1).unbind(-1)
            share = share[:, self.num_identity :]
            scale = scale + (share * a).sum(1, keepdim=True)
            constants = linear(share * b, self.constant.to(share.dtype).t())
        return (y + scale * x + constants).to(y.dtype)

    def tokens_per_kind(self, topk_ids: Tensor) -> dict[str, Tensor]:
        """Counts slots per kind of expert, without a device sync.

        Args:
            topk_ids: [..., K]; ids outside [0, E) are not counted.

        Returns:
            {"real": int64 scalar, "zero": ..., "identity": ..., "constant": ...}. "real" divided by
            the number of tokens is the mean number of real experts per token.
        """
        counts = count_tokens_per_expert(topk_ids, self.num_experts)
        sizes = [self.num_real, self.num_zero, self.num_identity, self.num_constant]
        parts = counts.split(sizes)
        return {kind: part.sum() for kind, part in zip(("real", *KINDS), parts, strict=True)}

    def pack_weights(self) -> int:
        """Packs the weights of the real experts; see `Experts.pack_weights`."""
        packed: int = self.experts.pack_weights()
        return packed

    def unpack_weights(self) -> int:
        """Drops the packed weights of the real experts; see `Experts.unpack_weights`."""
        dropped: int = self.experts.unpack_weights()
        return dropped

    def select(self, *_: Any, **__: Any) -> nn.Module:
        """Raises NotImplementedError, like `append`, `split` and `merge`."""
        raise NotImplementedError(
            "ZeroComputationExperts: bank operations apply to the real experts alone; change "
            "`experts` and build the layer anew."
        )

    append = split = merge = select

    def extra_repr(self) -> str:
        numbers = (f"num_{kind}={getattr(self, f'num_{kind}')}" for kind in KINDS)
        return f"num_experts={self.num_experts}, {', '.join(numbers)}"
