"""The tensors of a layer and of a batch of tokens on the device, created on first use."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from bench.gpu.cases import Case, make_ids
from moe_ops import reference
from moe_ops.bench.shapes import Bank, Shape, Tokens, make_bank


class Weights:
    """Expert weights of a layer, and copies in other formats, created on first use. `dtype` is the
    weights' type: 8- and 4-bit weights are copies of bf16 ones."""

    def __init__(self, shape: Shape, device: torch.device, dtype: str = "bf16") -> None:
        self._shape, self._device = shape, device
        self.type = torch.float16 if dtype == "fp16" else torch.bfloat16

    @cached_property
    def bank(self) -> Bank:
        return make_bank(self._shape, self.type, device=self._device)

    @cached_property
    def fp8(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns w_gate_up, its scales, w_down, its scales, as moe_ffn_fp8 takes them."""
        from moe_ops.quant import quantize_fp8_blocks

        bank = self.bank
        return (
            *_quantized(bank.w_gate_up, quantize_fp8_blocks),
            *_quantized(bank.w_down, quantize_fp8_blocks),
        )

    @cached_property
    def int8(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns w_gate_up, its scales, w_down, its scales, as moe_ffn_quantized takes them."""
        return self._integers("int8")

    @cached_property
    def int4(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns int4 weights in the order of `int8`, with one scale per 64 weights."""
        return self._integers("int4 g64")

    def _integers(self, format: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from moe_ops.quant import quantize_weight

        bank = self.bank
        return (
            *_quantized(bank.w_gate_up, lambda w: quantize_weight(w, format)),
            *_quantized(bank.w_down, lambda w: quantize_weight(w, format)),
        )

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """Returns the weights in the model's layout: gate_up_proj [E, H, 2I] and down_proj [E, I,
        H]. Llama 4 has gate and up in halves; gpt-oss interleaves them and has biases [E, 2I] and
        [E, H], each following its weight."""
        bank, shape = self.bank, self._shape
        if shape.name.startswith("llama4"):
            return {
                "gate_up_proj": bank.w_gate_up.transpose(1, 2).contiguous(),
                "down_proj": bank.w_down.transpose(1, 2).contiguous(),
            }
        gate, up = bank.w_gate_up.chunk(2, dim=1)
        generator = torch.Generator(self._device).manual_seed(2)

        def bias(size: int) -> Tensor:
            values = torch.randn(shape.E, size, generator=generator, device=self._device)
            return values.to(self.type)

        return {
            "gate_up_proj": torch.stack([gate, up], 2).flatten(1, 2).transpose(1, 2).contiguous(),
            "gate_up_proj_bias": bias(2 * shape.I),
            "down_proj": bank.w_down.transpose(1, 2).contiguous(),
            "down_proj_bias": bias(shape.H),
        }


def _quantized(
    w: Tensor, quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Quantizes one expert at a time, which avoids an fp32 copy of all experts."""
    parts = [quantize(expert) for expert in w]
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
        """Draws a 16-bit tensor chunk by chunk, which avoids an fp32 copy of a large tensor."""
        out = torch.empty(size, dtype=self.weights.type, device=self.device)
        for part in out.split(4096):
            part.copy_(torch.randn(part.shape, generator=self._generator, device=self.device))
        return out

    @cached_property
    def tokens(self) -> Tokens:
        case = self.case
        ids = make_ids(case.shape, case.T, case.routing, self.device)
        weights = torch.rand(ids.shape, generator=self._generator, device=self.device)
        weights = weights / weights.sum(1, keepdim=True)
        # Some baselines take them in float16: all get values that float16 can hold.
        x = self.normal(case.T, case.shape.H)
        return Tokens(x, weights.to(torch.bfloat16).float(), ids)

    @cached_property
    def grad_y(self) -> Tensor:
        return self.normal(self.case.T, self.case.shape.H)

    @cached_property
    def logits(self) -> Tensor:
        size = (self.case.T, self.case.shape.E)
        return torch.randn(size, generator=self._generator, device=self.device)

    @cached_property
    def sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns expert_offsets [E+1], row_to_slot [N], slot_to_row [T, K] of the tokens."""
        return reference.sort_by_expert(self.tokens.topk_ids, self.case.shape.E)

    @cached_property
    def counts(self) -> list[int]:
        """Returns the number of rows of each expert, on the host."""
        return self.sorted[0].diff().tolist()

    @cached_property
    def rows_h(self) -> Tensor:
        """Returns random rows [N, H]."""
        return self.normal(self.case.num_slots, self.case.shape.H)

    @cached_property
    def rows_2i(self) -> Tensor:
        """Returns random rows [N, 2I]."""
        return self.normal(self.case.num_slots, 2 * self.case.shape.I)

    @cached_property
    def rows_i(self) -> Tensor:
        """Returns random rows [N, I]."""
        return self.normal(self.case.num_slots, self.case.shape.I)
