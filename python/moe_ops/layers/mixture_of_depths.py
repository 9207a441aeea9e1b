"""Mixture-of-Depths: a block of a model computes some tokens of a sequence; the others skip it.

Letters: B sequences, S tokens per sequence, C computed tokens, H hidden size.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops.ops import permute, unpermute
from moe_ops.ops._checks import check_positive

from .functional import apply_linear, linear, plain_activation
from .inputs import takes_dense


class MixtureOfDepthsOutput(NamedTuple):
    """Output of `MixtureOfDepths` with `return_routing=True`.

    Attributes:
        y: [..., S, H].
        kept: [..., S] bool, the tokens computed.
        router_logits: [..., S].
        predictor_loss: scalar, cross-entropy of the predictor for `kept`; its gradient reaches only
            the predictor. None without a predictor, 0 without tokens.
    """

    y: Tensor
    kept: Tensor
    router_logits: Tensor
    predictor_loss: Tensor | None


class MixtureOfDepths(nn.Module):
    """Block that computes only the C tokens of a sequence with the largest r[s] = w . x[s].

    y[s] = x[s] + r[s] * block(kept tokens)[s] for these, y[s] = x[s] for the others. The block,
    including its attention, sees a shorter sequence: the kept tokens in their order. The selection
    depends on the whole sequence. If future tokens are not available (`causal=True`), a predictor,
    trained to predict the selection from the token alone, makes it instead.

    Parameters:
        weight: [1, H], w.
        predictor_in.weight, .bias: [G, H], [G]. predictor_out.weight, .bias: [1, G], [1].

    Args:
        block: called as block(tokens [B, C, H], positions=[B, C] int64); returns the residual of
            the tokens, of the same shape: attention and feed-forward without the outer residual
            connection. Positions refer to the whole sequence, for rotary embeddings. With
            `causal=True`, shorter sequences are padded at their end: a token must not see later
            rows.
        hidden_size: H.
        capacity: C / S, in (0, 1]; C is rounded up. The paper uses 0.125 in every other block.
        predictor_size: G; 0 disables the predictor.
        device, dtype: of the parameters.

    Initialization: like `nn.Linear`.

    Raises:
        ValueError: a size or capacity out of range.

    Source: Raposo et al. 2024 (Mixture-of-Depths, arXiv 2404.02258), with the predictor, one of its
    two sampling methods.
    """

    def __init__(
        self,
        block: nn.Module,
        hidden_size: int,
        *,
        capacity: float = 0.125,
        predictor_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("MixtureOfDepths", hidden_size=hidden_size)
        if not 0 < capacity <= 1:
            raise ValueError(f"MixtureOfDepths: capacity must be in (0, 1], got {capacity}.")
        if predictor_size < 0:
            raise ValueError(
                f"MixtureOfDepths: predictor_size must be at least 0, got {predictor_size}."
            )
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.block = block
        self.hidden_size = hidden_size
        self.capacity = capacity
        self.predictor_size = predictor_size
        self.weight = nn.Parameter(torch.empty(1, hidden_size, **where))
        self.predictor_in: nn.Linear | None = None
        self.predictor_out: nn.Linear | None = None
        if predictor_size:
            self.predictor_in = nn.Linear(hidden_size, predictor_size, **where)
            self.predictor_out = nn.Linear(predictor_size, 1, **where)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values of w and the predictor."""
        bound = self.hidden_size**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        for layer in (self.predictor_in, self.predictor_out):
            if layer is not None:
                layer.reset_parameters()

    @takes_dense
    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        causal: bool = False,
        return_routing: bool = False,
    ) -> Tensor | MixtureOfDepthsOutput:
        """Computes the layer's output: a tensor, or a MixtureOfDepthsOutput with
        `return_routing=True`.

        Args:
            x: [..., S, H].
            positions: [..., S] int64; None: 0 to S - 1.
            causal: if True, the predictor selects any number of tokens, each independently of all
                others, with one device sync for their number. Otherwise the C tokens with the
                largest r are selected; ties go to the earlier token.
            return_routing: also return the selection and the predictor's loss.

        Raises:
            ValueError: shapes that do not match, or `causal` without a predictor.
        """
        if x.dim() < 2 or x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"MixtureOfDepths: x must be [..., S, {self.hidden_size}], got shape "
                f"{list(x.shape)}."
            )
        if positions is not None and positions.shape != x.shape[:-1]:
            raise ValueError(
                f"MixtureOfDepths: positions must be {list(x.shape[:-1])} like the tokens of x, "
                f"got shape {list(positions.shape)}."
            )
        if causal and self.predictor_in is None:
            raise ValueError(
                "MixtureOfDepths: causal must come with a predictor, got predictor_size=0."
            )
        seq_len = x.shape[-2]
        tokens = x.reshape(x.shape[:-2].numel(), seq_len, self.hidden_size)
        r = linear(tokens, self.weight)[..., 0]
        predicted = None
        if causal or return_routing:
            predicted = self._predict(tokens.detach())
        index, valid = self._choose(r.detach(), predicted if causal else None)
        kept = torch.zeros(r.shape, dtype=torch.bool, device=x.device).scatter(1, index, valid)
        y = tokens
        if index.numel():
            if positions is None:
                at = index
            else:
                at = positions.reshape(r.shape).gather(1, index)
            y = tokens + self._compute(tokens, r, index, valid, at)
        y = y.view(x.shape)
        if not return_routing:
            return y
        loss = None
        if predicted is not None:
            total = F.binary_cross_entropy_with_logits(
                predicted, kept.to(predicted.dtype), reduction="sum"
            )
            loss = total / max(kept.numel(), 1)
        shape = x.shape[:-1]
        return MixtureOfDepthsOutput(y, kept.view(shape), r.view(shape), loss)

    def _predict(self, tokens: Tensor) -> Tensor | None:
        """Computes [B, S], positive for tokens that are expected to be kept."""
        if self.predictor_in is None or self.predictor_out is None:
            return None
        h = plain_activation(apply_linear(self.predictor_in, tokens), "silu")
        return apply_linear(self.predictor_out, h)[..., 0]

    def _choose(self, r: Tensor, predicted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the indices of the tokens to compute, ascending, [B, C] int64, and a mask that is
        False for padding rows of a shorter sequence."""
        if predicted is None:
            count = math.ceil(self.capacity * r.shape[1])
            best = r.argsort(dim=1, descending=True, stable=True)[:, :count]
            index = best.sort(dim=1).values
            return index, torch.ones_like(index, dtype=torch.bool)
        wanted = predicted > 0
        count = int(wanted.sum(1).max()) if wanted.numel() else 0
        index = (~wanted).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
        return index, wanted.gather(1, index)

    def _compute(
        self, tokens: Tensor, r: Tensor, index: Tensor, valid: Tensor, positions: Tensor
    ) -> Tensor:
        """Computes the residual of the tokens, [B, S, H]."""
        num_tokens, num_rows = r.numel(), index.numel()
        starts = torch.arange(r.shape[0], device=r.device)[:, None] * r.shape[1]
        slots = (index + starts).view(-1)
        offsets = torch.arange(2, device=r.device) * num_rows
        rows = permute(tokens.reshape(num_tokens, self.hidden_size), offsets, slots, top_k=1)
        made = self.block(rows.view(*index.shape, self.hidden_size), positions=positions)
        row = torch.arange(num_rows, device=r.device).where(valid.view(-1), -1)
        slot_to_row = torch.full((num_tokens,), -1, device=r.device).scatter(0, slots, row)
        added = unpermute(
            made.reshape(num_rows, self.hidden_size),
            offsets,
            slot_to_row[:, None],
            r.reshape(-1, 1),
        )
        return added.view(tokens.shape)

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, capacity={self.capacity}, "
            f"predictor_size={self.predictor_size}"
        )
