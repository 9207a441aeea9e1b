"""float8_e4m3fn weights with a scale for each 128 x 128: the format of DeepSeek-V3's checkpoints,
and what :func:`moe_ops.grouped_gemm_fp8` and :func:`moe_ops.moe_ffn_fp8` take.

Such a checkpoint holds two tensors for a linear layer: `weight` [O, D] in float8_e4m3fn and
`weight_scale_inv` [ceil(O / 128), ceil(D / 128)] in fp32. "inv" is seen from the quantizer, which
multiplied the float weight by 448 / amax: the inverse of that, amax / 448, is what codes are
multiplied by to get the weight back. So `weight_scale_inv` is the `scale` of this module as it is,
with nothing to invert. A checkpoint whose scales are powers of two (`scale_fmt` "ue8m0") needs
nothing else either, once they are fp32.

Letters: E experts, O output features, D input features of a weight [..., O, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.formulas.codes import FP8_BLOCK as BLOCK
from moe_ops.formulas.codes import round_fp8_blocks
from moe_ops.ops._checks import dtype_name

FP8 = torch.float8_e4m3fn


def quantize_fp8_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a weight to the nearest numbers of e4m3, with one scale for each 128 x 128.

    ``scale = amax / 448`` of the block in fp32, so its largest number becomes 448. A block of zeros
    gets the scale 2^-126. A number moves by at most 1/16 of itself, or by 2^-10 * scale where that
    is more; on normal weights the error is 2.6 % of the weight's norm.

    Args:
        w: [..., O, D], float; any strides. O and D need not be multiples of 128.

    Returns:
        q: float8_e4m3fn [..., O, D].
        scale: fp32 [..., ceil(O / 128), ceil(D / 128)].

    Raises:
        ValueError: no float tensor of two dimensions or more, or a number that is not finite.
    """
    if not w.is_floating_point() or w.dim() < 2:
        raise ValueError(
            f"quantize_fp8_blocks: w must be a float tensor [..., O, D], got "
            f"{dtype_name(w.dtype)} of shape {list(w.shape)}."
        )
    codes, scale = round_fp8_blocks(w.detach())
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("quantize_fp8_blocks: w must be finite, got infinities or NaNs.")
    return codes, scale


def dequantize_fp8_blocks(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [..., O, D] that codes and scales stand for; products are made in fp32.

    Args:
        q, scale: as `quantize_fp8_blocks` returns them, or `weight` and `weight_scale_inv` of a
            checkpoint.
        dtype: of the result; the products are made in fp64 for fp64.

    Raises:
        ValueError: types or shapes that do not belong together.
    """
    check_fp8_pair("dequantize_fp8_blocks", "q", q, scale)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    factors = scale.to(acc).repeat_interleave(BLOCK, -2)[..., : q.shape[-2], :]
    factors = factors.repeat_interleave(BLOCK, -1)[..., : q.shape[-1]]
    return q.to(acc).mul_(factors).to(dtype)


def fuse_fp8_gate_up(
    gate: Tensor, gate_scale: Tensor, up: Tensor, up_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`w_gate_up` [..., 2I, D] and its scale from the two projections that a checkpoint stores.

    The halves keep their scales, so I must be a multiple of 128; else a block of w_gate_up would
    hold rows of both. Dequantize, concatenate and quantize again there.

    Args:
        gate, up: float8_e4m3fn [..., I, D].
        gate_scale, up_scale: fp32 [..., I / 128, ceil(D / 128)], their `weight_scale_inv`.

    Raises:
        ValueError: types or shapes that do not belong together, or another I.
    """
    check_fp8_pair("fuse_fp8_gate_up", "gate", gate, gate_scale)
    check_fp8_pair("fuse_fp8_gate_up", "up", up, up_scale)
    if gate.shape != up.shape or gate.shape[-2] % BLOCK:
        raise ValueError(
            f"fuse_fp8_gate_up: gate and up must have one shape [..., I, D] with I a multiple of "
            f"{BLOCK}, got {list(gate.shape)} and {list(up.shape)}."
        )
    return torch.cat([gate, up], -2), torch.cat([gate_scale, up_scale], -2)


def check_fp8_pair(name: str, what: str, q: Tensor, scale: Tensor) -> None:
    """Raises ValueError where `scale` is not the scale of a weight stored in `q`."""
    if q.dtype != FP8 or q.dim() < 2:
        raise ValueError(
            f"{name}: {what} must be float8_e4m3fn [..., O, D], got {dtype_name(q.dtype)} of shape "
            f"{list(q.shape)}."
        )
    wanted = [*q.shape[:-2], -(-q.shape[-2] // BLOCK), -(-q.shape[-1] // BLOCK)]
    if list(scale.shape) != wanted or scale.dtype != torch.float32:
        raise ValueError(
            f"{name}: the scale of {what} must be float32 {wanted}, got "
            f"{dtype_name(scale.dtype)} of shape {list(scale.shape)}."
        )
