"""moe_ffn_fp8: moe_ffn with float8_e4m3fn weights and 128 x 128 scales."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import direct_call, register_no_gradient
from moe_ops.ops._checks import (
    NARROW_FLOATS,
    check,
    check_dtype,
    check_index,
    check_result_dtype,
    check_same_device,
    check_shape,
    check_tensor,
    new_like,
)
from moe_ops.ops._library import register_fake
from moe_ops.ops.gated_act import check_activation
from moe_ops.ops.grouped_gemm_fp8 import check_fp8_weights
from moe_ops.ops.moe_ffn import (
    DEFAULT_OPTIONS,
    check_bias,
    check_routing,
    check_width,
    options_of,
)
from moe_ops.ops.quantize_fp8 import FP8, fp8_blocks

_moe_ffn_fp8 = direct_call("moe_ffn_fp8")

_OP = "moe_ffn_fp8"


def moe_ffn_fp8(
    x: Tensor,
    w_gate_up: Tensor,
    w_gate_up_scale: Tensor,
    w_down: Tensor,
    w_down_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    apply_router_weight_on_input: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    x_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Computes moe_ffn for inference with float8_e4m3fn expert weights in the format of
    DeepSeek-V3.

    Both GEMMs are those of :func:`grouped_gemm_fp8`. :func:`quantize_fp8` quantizes x once per
    token, and the rows of experts are gathered from the result, without a permuted copy of x in its
    own dtype. Bias and activation run in fp32. The activated features are quantized in blocks of
    128 like x, which changes a value by at most 1/16 of itself, or 1/458752 of its block's maximum.
    For normally distributed x this adds an error of about 3 % to the result, as does the
    quantization of the weights. Results are bitwise identical for every run.

    Args:
        x: [T, H] tokens; float32, bfloat16 or float16, any strides; or float8_e4m3fn with x_scale,
            from :func:`quantize_fp8`.
        w_gate_up: [E, 2I, H] float8_e4m3fn, gate half first; I instead of 2I for activations
            without a gate. H and I need not be multiples of 128.
        w_gate_up_scale: [E, ceil(2I / 128), ceil(H / 128)] float32.
        w_down: [E, H, I] float8_e4m3fn.
        w_down_scale: [E, ceil(H / 128), ceil(I / 128)] float32.
        topk_weights: [T, K] in any float dtype, used in fp32.
        topk_ids: [T, K], int32 or int64. Ids outside [0, E) are empty slots.
        b_gate_up: [E, 2I] ([E, I]) in x's dtype, or None; for quantized x in float32, bfloat16 or
            float16.
        b_down: [E, H] in a dtype of b_gate_up, or None; multiplied by the routing weight like the
            rest.
        activation: see :func:`moe_ffn`.
        interleaved: gate in even, up in odd features of w_gate_up and b_gate_up.
        apply_router_weight_on_input: multiply the token's scales by the routing weight and add the
            outputs of its experts unweighted (Llama 4).
        alpha, limit: parameters of ``"swiglu_oai"``.
        x_scale: [T, ceil(H / 128)] float32, the scales of quantized x; results are bitwise
            identical to those of unquantized x.
        out_dtype: dtype of the result: x's dtype (None) or float32, the unrounded sum over a
            token's experts; for quantized x float32, bfloat16 or float16, and not None.

    Returns:
        [T, H] in out_dtype. A token without experts gets zeros; T = 0 gives [0, H]. A token with an
        infinity or a NaN gets NaN; other tokens are unaffected.

    Raises:
        ValueError: wrong dtype, rank, size or activation.
        NotImplementedError: if a gradient is needed.

    Source:
        DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.
    """
    options = options_of(
        b_gate_up, b_down, activation, interleaved, apply_router_weight_on_input, alpha, limit
    )
    if x_scale is not None or out_dtype is not None:
        options = (*(options or DEFAULT_OPTIONS), x_scale, out_dtype)
    weights = (w_gate_up, w_gate_up_scale, w_down, w_down_scale)
    return _moe_ffn_fp8(x, *weights, topk_weights, topk_ids, *options)


@register_fake(_OP)
def _(
    x: Tensor,
    w_gate_up: Tensor,
    w_gate_up_scale: Tensor,
    w_down: Tensor,
    w_down_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    interleaved: bool,
    apply_router_weight_on_input: bool,
    alpha: float,
    limit: float,
    x_scale: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    check_activation(_OP, activation, alpha, limit, False)
    check_index(_OP, "topk_ids", topk_ids, "[T, K]")
    check_tensor(_OP, "x", x, NARROW_FLOATS if x_scale is None else (FP8,), "[T, H]")
    tokens, hidden = x.shape
    _check_out_dtype(x, x_scale, out_dtype)
    check_fp8_weights(_OP, "w_gate_up", w_gate_up, w_gate_up_scale)
    num_experts, width, _ = w_gate_up.shape
    check(
        num_experts >= 1,
        f"{_OP}: w_gate_up must hold at least one expert, got shape {list(w_gate_up.shape)}.",
    )
    check_shape(_OP, "w_gate_up", w_gate_up, "[E, O, H]", H=hidden)
    intermediate = check_width(_OP, w_gate_up, activation)
    check_fp8_weights(_OP, "w_down", w_down, w_down_scale)
    sizes = {"E": num_experts, "H": hidden, "I": intermediate}
    check_shape(_OP, "w_down", w_down, "[E, H, I]", **sizes)
    check_routing(_OP, topk_weights, topk_ids, tokens)
    for name, bias, features in (("b_gate_up", b_gate_up, width), ("b_down", b_down, hidden)):
        if x_scale is None:
            check_bias(_OP, name, bias, x, num_experts, features)
        else:
            sizes = {"E": num_experts, "features": features}
            check_tensor(_OP, name, bias, NARROW_FLOATS, "[E, features]", **sizes)
    if x_scale is not None:
        sizes = {"T": tokens, "blocks": fp8_blocks(hidden)}
        check_tensor(_OP, "x_scale", x_scale, (torch.float32,), "[T, blocks]", **sizes)
    check_same_device(
        _OP,
        x=x,
        w_gate_up=w_gate_up,
        w_gate_up_scale=w_gate_up_scale,
        w_down=w_down,
        w_down_scale=w_down_scale,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        b_gate_up=b_gate_up,
        b_down=b_down,
        x_scale=x_scale,
    )
    return new_like(x, out_dtype)


def _check_out_dtype(x: Tensor, x_scale: Tensor | None, out_dtype: torch.dtype | None) -> None:
    if x_scale is None:
        if out_dtype is not None:
            check_result_dtype(_OP, "out_dtype", out_dtype, x)
        return
    if out_dtype is None:
        raise ValueError(f"{_OP}: out_dtype must be given with x_scale, got None.")
    check_dtype(_OP, "out_dtype", out_dtype, NARROW_FLOATS)


register_no_gradient(_OP, "dequantize the weights and call moe_ffn")
register_autocast(_OP, ["x", "b_gate_up", "b_down"])
