"""quantize_fp8: rows as float8_e4m3fn with a scale for every 128 columns."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import direct_call, register_no_gradient
from moe_ops.ops._checks import NARROW_FLOATS, check_tensor
from moe_ops.ops._library import register_fake

_quantize_fp8 = direct_call("quantize_fp8")

_OP = "quantize_fp8"
FP8 = torch.float8_e4m3fn
FP8_BLOCK = 128


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds rows to float8_e4m3fn, 128 columns to a scale.

    ``scale = amax / 448`` of the block's largest magnitude, and each code is the number of e4m3
    nearest to ``x * (448 / amax)``, ties to even; both in fp32. A code is off by at most 1/16 of
    what it stands for, or 2^-10 * scale near zero, whichever is more. The same bits on every
    device.

    - A block of zeros gets codes 0 and the scale 2^-126; amax counts as at least 448 * 2^-126.
    - A block that holds an infinity or a NaN gets the scale NaN and codes NaN: whatever is computed
      with it is NaN, and other blocks do not notice.

    Args:
        x: [N, D]; float32, bfloat16 or float16, any strides. D need not be a multiple of 128.

    Returns:
        q: float8_e4m3fn [N, D].
        scale: float32 [N, ceil(D / 128)]; x is about ``q * scale``.

    Raises:
        ValueError: wrong dtype or rank.
        NotImplementedError: where a gradient is wanted.

    Source:
        1 x 128 tiles of activations: DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.2.
    """
    q, scale = _quantize_fp8(x)
    return q, scale


def fp8_blocks(n: int) -> int:
    return (n + FP8_BLOCK - 1) // FP8_BLOCK


@register_fake(_OP)
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    check_tensor(_OP, "x", x, NARROW_FLOATS, "[N, D]")
    scale = x.new_empty((x.shape[0], fp8_blocks(x.shape[1])), dtype=torch.float32)
    return x.new_empty(tuple(x.shape), dtype=FP8), scale


register_no_gradient(_OP, "on x.detach()")
register_autocast(_OP)
