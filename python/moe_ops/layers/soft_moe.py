"""Soft MoE: experts process weighted means of tokens, tokens get weighted means of their outputs.

Letters: B sequences, S tokens per sequence, H hidden size, E experts, P slots per expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops.ops import grouped_gemm, grouped_gemm_wgrad, grouped_sum
from moe_ops.ops._checks import check_positive

from .all_experts import mix_outputs
from .functional import multiplies_by_ops
from .inputs import jagged_parts, leaf_of_fx


class SoftMoEOutput(NamedTuple):
    """Output of `SoftMoE` with `return_routing=True`.

    y: [..., S, O].
    dispatch: [..., E, P, S] float, each slot's weights of the tokens, which sum to 1 over S.
    combine: [..., S, E, P] float, each token's weights of the slots, which sum to 1.
    """

    y: Tensor
    dispatch: Tensor
    combine: Tensor


class SoftMoE(nn.Module):
    """Mixture of experts with weighted means instead of top-k selection.

    With logits[s, j] = x[s] . phi[j] for the E P slots j, slot j gets the mean of the tokens under
    softmax over s, each expert processes its slots, and a token gets the mean of the slots' outputs
    under softmax over j. The layer is balanced by construction and differentiable everywhere, and
    processes E P expert rows per sequence of any length. A token's output depends on all tokens of
    its sequence, so it does not suit causal models.

    Example:
        SoftMoE(Experts(16, 64, 128, activation="gelu", bias=True), slots_per_expert=4)

    Parameters:
        phi: [E, P, H]. scale: [1], with `normalize=True`.
        experts: those of `experts`.

    Args:
        experts: `Experts` or a module with its interface.
        slots_per_expert: P, at least 1. The paper uses E P near S.
        normalize: normalizes tokens and phi to length 1 in the logits, which are multiplied by
            `scale` (section 2.3 of the paper: otherwise softmax saturates in wide models).
        device, dtype: of phi and scale.

    Initialization: phi N(0, 1 / H), scale 1.

    Raises:
        ValueError: P below 1.

    Source: Puigcerver et al. 2023 (From Sparse to Soft Mixtures of Experts, arXiv 2308.00951).
    """

    def __init__(
        self,
        experts: nn.Module,
        slots_per_expert: int = 1,
        *,
        normalize: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("SoftMoE", slots_per_expert=slots_per_expert)
        bank: Any = experts
        self.experts = bank
        self.num_experts: int = bank.num_experts
        self.hidden_size: int = bank.hidden_size
        self.slots_per_expert = slots_per_expert
        self.normalize = normalize
        shape = (self.num_experts, slots_per_expert, self.hidden_size)
        self.phi = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype)) if normalize else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values of phi and scale."""
        nn.init.normal_(self.phi, std=self.hidden_size**-0.5)
        if self.scale is not None:
            nn.init.ones_(self.scale)

    @leaf_of_fx
    def forward(
        self, x: Tensor, *, token_mask: Tensor | None = None, return_routing: bool = False
    ) -> Tensor | SoftMoEOutput:
        """Computes the layer's output: a tensor, or a SoftMoEOutput with `return_routing=True`.

        Args:
            x: [..., S, H] in the dtype of the experts (any under autocast); sequences are
                independent. x may have no tokens. x may be jagged [B, j*, H] (torch.nested),
                without a token_mask; results then have the sequence lengths of x.
            token_mask: [..., S] bool, False for padding tokens: no slot reads them, and their
                outputs are 0.
            return_routing: also return the weights.

        Returns:
            [..., S, O], O the experts' output size.

        Raises:
            ValueError: shapes that do not match.
        """
        if x.is_nested:
            return self._forward_jagged(x, token_mask, return_routing)
        if x.dim() < 2 or x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"SoftMoE: x must be [..., S, {self.hidden_size}], got shape {list(x.shape)}."
            )
        if token_mask is not None and token_mask.shape != x.shape[:-1]:
            raise ValueError(
                f"SoftMoE: token_mask must be {list(x.shape[:-1])} like the tokens of x, got shape "
                f"{list(token_mask.shape)}."
            )
        lead, experts, slots = x.shape[:-2], self.num_experts, self.slots_per_expert
        tokens = x.reshape(lead.numel(), *x.shape[-2:])
        logits = self._logits(tokens)
        combine = logits.softmax(-1)
        mask = None
        if token_mask is not None:
            mask = token_mask.reshape(*tokens.shape[:2], 1)
            logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
            combine = combine.masked_fill(~mask, 0.0)
        dispatch = logits.transpose(1, 2).softmax(-1)
        made = self._run_experts(_mix(dispatch.to(x.dtype), tokens), logits.dtype)
        y = _mix(combine.to(made.dtype), made)
        y = y.view(*x.shape[:-1], made.shape[-1])
        if not return_routing:
            return y
        dispatch = dispatch.view(*lead, experts, slots, x.shape[-2])
        return SoftMoEOutput(y, dispatch, combine.view(*x.shape[:-1], experts, slots))

    def _forward_jagged(
        self, x: Tensor, token_mask: Tensor | None, return_routing: bool
    ) -> Tensor | SoftMoEOutput:
        """Computes `forward` for sequences of different lengths, with both means as grouped GEMMs
        in which sequences take the role of experts."""
        jagged = jagged_parts("SoftMoE", x)
        tokens, offsets = jagged
        if x.dim() != 3 or tokens.shape[-1] != self.hidden_size:
            raise ValueError(
                f"SoftMoE: a jagged x must be [B, j*, {self.hidden_size}], got values of shape "
                f"{list(tokens.shape)}."
            )
        if token_mask is not None:
            raise ValueError(
                "SoftMoE: token_mask must be None with a jagged x, whose tokens are all real, got "
                "one."
            )
        logits = self._logits(tokens[None])[0]
        combine = logits.softmax(-1)
        dispatch = _softmax_of_sequences(logits, offsets)
        made = self._run_experts(
            grouped_gemm_wgrad(dispatch.to(x.dtype), tokens, offsets), logits.dtype
        )
        y = jagged.like(grouped_gemm(combine.to(made.dtype), made.transpose(1, 2), offsets))
        if not return_routing:
            return y
        slots = self.num_experts, self.slots_per_expert
        return SoftMoEOutput(
            y,
            jagged.like(dispatch.t().unflatten(0, slots), dim=3),
            jagged.like(combine.unflatten(1, slots)),
        )

    def _run_experts(self, rows: Tensor, weight_dtype: torch.dtype) -> Tensor:
        """Maps [B, E P, H], the slots of B sequences, to [B, E P, O]."""
        ids = torch.arange(self.num_experts, dtype=torch.int32, device=rows.device)
        ids = ids.repeat_interleave(self.slots_per_expert).repeat(rows.shape[0])[:, None]
        weights = torch.ones_like(ids, dtype=weight_dtype)
        made: Tensor = self.experts(rows.reshape(-1, self.hidden_size), weights, ids)
        return made.view(*rows.shape[:2], made.shape[-1])

    def _logits(self, tokens: Tensor) -> Tensor:
        """Computes logits [B, S, E P] from [B, S, H], in fp32 (fp64 for fp64)."""
        phi = self.phi.flatten(0, 1)
        if self.scale is not None:
            tokens = F.normalize(tokens, dim=-1)
            phi = self.scale * F.normalize(phi, dim=-1)
        logits = _mix(tokens, phi.to(tokens.dtype).t().expand(tokens.shape[0], -1, -1))
        return logits if logits.dtype == torch.float64 else logits.float()

    def extra_repr(self) -> str:
        return f"slots_per_expert={self.slots_per_expert}, normalize={self.normalize}"


def _softmax_of_sequences(logits: Tensor, offsets: Tensor) -> Tensor:
    """Computes softmax over the tokens of each sequence, for logits [T, N]; `offsets` [B + 1] are
    the starts of the sequences."""
    token = torch.arange(logits.shape[0], device=logits.device)
    sequence = torch.bucketize(token, offsets[1:], right=True)
    largest = logits.detach().new_full((offsets.shape[0] - 1, logits.shape[1]), -torch.inf)
    largest = largest.scatter_reduce(
        0, sequence[:, None].expand_as(logits), logits.detach(), "amax"
    )
    powers = (logits - largest[sequence]).exp()
    return powers / grouped_sum(powers, offsets)[sequence]


def _mix(weights: Tensor, x: Tensor) -> Tensor:
    """Computes `torch.bmm` of [B, M, N] and [B, N, O]."""
    if multiplies_by_ops(x):
        return mix_outputs(x.contiguous(), weights.contiguous())
    return torch.bmm(weights, x)
