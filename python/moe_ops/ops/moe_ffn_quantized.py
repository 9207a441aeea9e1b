"""moe_ffn_quantized: moe_ffn of weights of 8 or 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import direct_call, register_no_gradient
from moe_ops.ops._checks import (
    NARROW_FLOATS,
    check,
    check_index,
    check_same_device,
    check_size,
    check_tensor,
    new_like,
)
from moe_ops.ops._library import register_fake
from moe_ops.ops._quantized import check_quantized
from moe_ops.ops.gated_act import check_activation
from moe_ops.ops.moe_ffn import check_bias, check_routing, check_width, options_of

_moe_ffn_quantized = direct_call("moe_ffn_quantized")

_OP = "moe_ffn_quantized"


def moe_ffn_quantized(
    x: Tensor,
    w_gate_up: Tensor,
    w_gate_up_scale: Tensor,
    w_down: Tensor,
    w_down_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    x_scale: Tensor | None = None,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    apply_router_weight_on_input: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Tensor:
    """moe_ffn for inference with expert weights of 8 or 4 bits.

    The function of :func:`moe_ffn` with each weight an integer times a scale, in one of two
    formats, told by the dtype of the weight:

    - 8 bits: int8 [E, O, D] with scales [E, O], one an output feature:
      ``w[e, o, k] = q[e, o, k] * scale[e, o]``.
    - 4 bits: uint8 [E, O, D/2] with scales [E, O, D/G], G = 32, 64 or 128. Byte j of a row holds
      k = 2j in its low and k = 2j + 1 in its high four bits, each as q + 8 with q from -8 to 7:
      ``w[e, o, k] = q[e, o, k] * scale[e, o, k // G]``.

    The rows that meet a weight are x and the activated features. They are rounded to integers of 16
    bits, with a scale a row, or to integers from -127 to 127, with a scale for each 32 of them. 16
    bits move a value by at most 1/65278 of the largest of its row, and results on normal x by about
    5e-5. 8 bits move it by at most 1/254 of the largest of its 32, and results by about 1 %: a
    tenth of what 4-bit weights cost, and twice what 8-bit weights do.

    - 4 bits: 8, where an expert has up to 8 tokens or x is bfloat16 or float16.
    - 8 bits: 16, where an expert has up to 8 tokens or x is bfloat16 or float16. But 8 on a
      processor with AVX-512 VNNI, if x is of a half type and an expert has many tokens: more than
      3 to 6, K / 160 for a depth of K.
    - Else, with more than 8 tokens of float32, or of any type without AVX2, weights are widened in
      cache, which is exact, and products are in fp32.

    So x in float32 is the more accurate way. Sums of integers are exact, others run in fp32 in a
    fixed order: the same bits every run, whatever the number of threads.

    On CUDA rows are not rounded to integers: numbers of x's type meet the weights, products are
    summed in fp32, and the scales multiply these sums (float32 x with 4 bits in large calls: the
    weights, in fp32). What is rounded to x's type is x times `x_scale`, the activated features and
    an expert's output, as by :func:`moe_ffn`.

    Args:
        x: [T, H] tokens; float32, bfloat16 or float16, any strides.
        w_gate_up: [E, 2I, H] int8 or [E, 2I, H/2] uint8, gate half first; I instead of 2I for
            activations without a gate.
        w_gate_up_scale: float32, [E, 2I] or [E, 2I, H/G].
        w_down: [E, H, I] int8 or [E, H, I/2] uint8.
        w_down_scale: float32, [E, H] or [E, H, I/G].
        topk_weights: [T, K] in any float dtype, used in fp32.
        topk_ids: [T, K], int32 or int64. Anything outside [0, E) means "no expert here".
        x_scale: [H] float32, or None: multiplies x in front of w_gate_up. A quantiser that looks at
            activations divides the columns of w_gate_up by it.
        b_gate_up: [E, 2I] ([E, I]) in x's dtype, or None.
        b_down: [E, H] in x's dtype, or None; multiplied by the routing weight like the rest.
        activation: as for :func:`moe_ffn`.
        interleaved: gate in even, up in odd features of w_gate_up and b_gate_up.
        apply_router_weight_on_input: multiply the token by the routing weight before the experts
            and add their outputs unweighted (Llama 4).
        alpha, limit: of ``"swiglu_oai"``.

    Returns:
        [T, H] in x's dtype. A token without any expert gets zeros; T = 0 gives [0, H].

    Raises:
        ValueError: wrong dtype, rank, size or activation.
        NotImplementedError: where a gradient is wanted.

    Source:
        Integer products on blocks of rounded activations: Gerganov et al., ggml (q8_0, q4_0);
        the activation-aware scale: Lin et al. 2023, arXiv 2306.00978.
    """
    options = options_of(
        b_gate_up, b_down, activation, interleaved, apply_router_weight_on_input, alpha, limit
    )
    weights = (w_gate_up, w_gate_up_scale, w_down, w_down_scale)
    return _moe_ffn_quantized(x, *weights, topk_weights, topk_ids, x_scale, *options)


@register_fake(_OP)
def _(
    x: Tensor,
    w_gate_up: Tensor,
    w_gate_up_scale: Tensor,
    w_down: Tensor,
    w_down_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    x_scale: Tensor | None,
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    interleaved: bool,
    apply_router_weight_on_input: bool,
    alpha: float,
    limit: float,
) -> Tensor:
    check_activation(_OP, activation, alpha, limit, False)
    check_index(_OP, "topk_ids", topk_ids, "[T, K]")
    check_tensor(_OP, "x", x, NARROW_FLOATS, "[T, H]")
    tokens, hidden = x.shape
    up_depth = check_quantized(_OP, "w_gate_up", w_gate_up, w_gate_up_scale)
    num_experts, width, _ = w_gate_up.shape
    check(
        up_depth == hidden,
        f"{_OP}: w_gate_up must have rows of H = {hidden} weights, got {up_depth} "
        f"(shape {list(w_gate_up.shape)}).",
    )
    intermediate = check_width(_OP, w_gate_up, activation)
    down_depth = check_quantized(_OP, "w_down", w_down, w_down_scale)
    check_size(_OP, "w_down", w_down, 0, num_experts, "E")
    check_size(_OP, "w_down", w_down, 1, hidden, "H")
    check(
        down_depth == intermediate,
        f"{_OP}: w_down must have rows of I = {intermediate} weights, got {down_depth} "
        f"(shape {list(w_down.shape)}).",
    )
    check_routing(_OP, topk_weights, topk_ids, tokens)
    check_tensor(_OP, "x_scale", x_scale, (torch.float32,), "[H]", H=hidden)
    check_bias(_OP, "b_gate_up", b_gate_up, x, num_experts, width)
    check_bias(_OP, "b_down", b_down, x, num_experts, hidden)
    check_same_device(
        _OP,
        x=x,
        w_gate_up=w_gate_up,
        w_gate_up_scale=w_gate_up_scale,
        w_down=w_down,
        w_down_scale=w_down_scale,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        x_scale=x_scale,
        b_gate_up=b_gate_up,
        b_down=b_down,
    )
    return new_like(x)


register_no_gradient(_OP, f"moe_ops.reference.{_OP}, which can be differentiated")
register_autocast(_OP, ["x", "b_gate_up", "b_down"])
