"""The tensors of a layer and of a batch of tokens on the device, made when asked for."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from bench.gpu.cases import Case, make_ids
from moe_ops import reference
from moe_ops.bench.shapes import Bank, Shape, Tokens, make_bank

DTYPE = torch.bfloat16


class Weights:
    """The bank of a layer, and its copies in fp8; made when asked for."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self._shape, self._device = shape, device

    @cached_property
    def bank(self) -> Bank:
        return make_bank(self._shape, DTYPE, device=self._device)

    @cached_property
    def fp8(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w_gate_up, its scales, w_down, its scales, as moe_ffn_fp8 takes them."""
        return (*_quantized(self.bank.w_gate_up), *_quantized(self.bank.w_down))


def _quantized(w: Tensor) -> tuple[Tensor, Tensor]:
    """An expert at a time: no fp32 copy of a bank."""
    from moe_ops.quant import quantize_fp8_blocks

    parts = [quantize_fp8_blocks(expert) for expert in w]
    return torch.stack([q for q, _ in parts]), torch.stack([scale for _, scale in parts])


class Layer:
    """Inputs of the cases of one layer, one number of tokens and one routing."""

    def __init__(self, case: Case, weights: Weights, device: torch.device) -> None:
        self.case, self.weights, self.device = case, weights, device
        self._generator = torch.Generator(device).manual_seed(case.T + 1)

    @property
    def bank(self) -> Bank:
        return self.weights.bank

    def normal(self, *size: int) -> Tensor:
        """In a 16-bit type, a part at a time: no fp32 copy of a large tensor."""
        out = torch.empty(size, dtype=DTYPE, device=self.device)
        for part in out.split(4096):
            part.copy_(torch.randn(part.shape, generator=self._generator, device=self.device))
        return out

    @cached_property
    def tokens(self) -> Tokens:
        case = self.case
        ids = make_ids(case.shape, case.T, case.routing, self.device)
        weights = torch.rand(ids.shape, generator=self._generator, device=self.device)
        weights = weights / weights.sum(1, keepdim=True)
        # Some baselines take them in halves: all get what halves can hold.
        return Tokens(self.normal(case.T, case.shape.H), weights.to(DTYPE).float(), ids)

    @cached_property
    def grad_y(self) -> Tensor:
        return self.normal(self.case.T, self.case.shape.H)

    @cached_property
    def logits(self) -> Tensor:
        size = (self.case.T, self.case.shape.E)
        return torch.randn(size, generator=self._generator, device=self.device)

    @cached_property
    def sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        """expert_offsets [E+1], row_to_slot [N], slot_to_row [T, K] of the tokens."""
        return reference.sort_slots(self.tokens.topk_ids, self.case.shape.E)

    @cached_property
    def counts(self) -> list[int]:
        """Rows of each expert, on the host."""
        return self.sorted[0].diff().tolist()

    @cached_property
    def rows_h(self) -> Tensor:
        """[N, H]."""
        return self.normal(self.case.num_slots, self.case.shape.H)

    @cached_property
    def rows_2i(self) -> Tensor:
        """[N, 2I]."""
        return self.normal(self.case.num_slots, 2 * self.case.shape.I)

    @cached_property
    def rows_i(self) -> Tensor:
        """[N, I]."""
        return self.normal(self.case.num_slots, self.case.shape.I)
