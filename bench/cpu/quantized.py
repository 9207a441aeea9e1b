"""Integer weights: int8 with a scale a row, int4 with one a group."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

import moe_ops
from moe_ops import memory
from moe_ops.bench.baselines import Bind, Call, MoeOps, MoeOpsPacked
from moe_ops.bench.measure import Cells, Session, forward_cells
from moe_ops.bench.shapes import INT4_GROUP, SHAPES, Bank, Tokens, make_bank
from moe_ops.quant import formats


def run_quantized(session: Session) -> Cells:
    """int8 and int4 baselines on weights that were bf16, beside our own bf16 (`bf16 moe_ops`)."""
    cells = []
    for shape in session.plan.quantized_shapes:
        bank = make_bank(SHAPES[shape], torch.bfloat16)
        for weight_format in ("int8", "int4"):
            cells += forward_cells(session, bank, weight_format, [Bfloat16()])
        del bank
        gc.collect()
    return cells


class Bfloat16(MoeOpsPacked):
    """Our bf16 among quantised baselines."""

    name = "bf16 moe_ops"
    formats = ()


class MoeOpsQuantized(MoeOps):
    """moe_ffn_quantized: one scale a row for int8, one per INT4_GROUP weights for int4."""

    name = "moe_ops quantized"
    formats = ("int8", "int4")

    def prepare(self, bank: Bank, weight_format: str) -> Bind:
        weights = (
            *quantize(bank.w_gate_up, weight_format, INT4_GROUP),
            *quantize(bank.w_down, weight_format, INT4_GROUP),
        )
        memory.use_huge_pages(*weights)

        def bind(tokens: Tokens) -> Call:
            routing = (tokens.topk_weights, tokens.topk_ids)
            return lambda: moe_ops.moe_ffn_quantized(tokens.x, *weights, *routing)

        return bind


def quantize(w: Tensor, weight_format: str, group: int) -> tuple[Tensor, Tensor]:
    """`moe_ops.quant.quantize` of [E, O, K] expert by expert, since each is widened to fp32."""
    groups = group if weight_format == "int4" else None
    experts = [formats.quantize(expert, weight_format, groups) for expert in w]
    return torch.stack([q for q, _ in experts]), torch.stack([scale for _, scale in experts])
