"""moe_ffn_quantized: moe_ffn of quantized weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_ops.formulas.codes import dequantized
from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import (
    direct_call,
    needs_input_grad,
    register_autograd,
    register_no_double_backward,
)
from moe_ops.ops._checks import (
    NARROW_FLOATS,
    check,
    check_dtype,
    check_index,
    check_same_device,
    check_size,
    check_tensor,
    new_if,
    new_like,
)
from moe_ops.ops._library import register_cuda_formula, register_fake
from moe_ops.ops._quantized import check_names, check_weight, have_kernels, joined, reads_stored
from moe_ops.ops.gated_act import check_activation
from moe_ops.ops.moe_ffn import (
    DEFAULT_OPTIONS,
    check_bias,
    check_routing,
    check_width,
    options_of,
)

_moe_ffn_quantized = direct_call("moe_ffn_quantized")
_moe_ffn_quantized_fwd = direct_call("moe_ffn_quantized_fwd")
_moe_ffn_quantized_bwd = direct_call("moe_ffn_quantized_bwd")

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
    format: str | Sequence[str],
    x_scale: Tensor | None = None,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    apply_router_weight_on_input: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    w_gate_up_zero: Tensor | None = None,
    w_down_zero: Tensor | None = None,
) -> Tensor:
    """moe_ffn with frozen quantized expert weights.

    The function of :func:`moe_ffn` with weights of the formats that `format` names. Two have
    kernels of integers:

    - "int8": int8 [E, O, D] with scales [E, O], one per output feature:
      ``w[e, o, k] = q[e, o, k] * scale[e, o]``.
    - "int4 g32", "int4 g64", "int4 g128": uint8 [E, O, D/2] with scales [E, O, D/G]. Byte j of a
      row holds k = 2j in its low and k = 2j + 1 in its high four bits, each as q + 8 with q from
      -8 to 7: ``w[e, o, k] = q[e, o, k] * scale[e, o, k // G]``.

    The others are as checkpoints store them. On the CPU, int8, int4, "mxfp4" and, for up to 8
    tokens of an expert, "nvfp4" are multiplied as integers, too. Other weights become float32, in
    registers where an expert has up to 4 tokens (2 without AVX-512) and else in cache, some rows at
    a time, or bfloat16 for x of that type where that is exact, and rows are not rounded to integers
    for them:

    - "int8 gG": int8 [E, O, D] with scales [E, O, D/G], G a multiple of 32.
    - "int4 gG" with another multiple of 32, with scales of "bfloat16" or "float16", or with "zero"
      points uint8 [E, O, D/G], for instance "int4 g128 float16 zero":
      ``w[e, o, k] = (code - zero[e, o, k // G]) * scale``, the code from 0 to 15, zero 8 where
      there is none (GPTQ, AWQ, compressed-tensors, q4_0).
    - "mxfp4": uint8 [E, O, D/2] of e2m1 with uint8 [E, O, D/32] of e8m0 (gpt-oss).
    - "fp8": float8_e4m3fn [E, O, D] with float32 [E, ceil(O/128), ceil(D/128)] (DeepSeek-V3).
    - "e4m3": float8_e4m3fn [E, O, D] with float32 [E, O], one scale per output; "e4m3 gG" with
      scales [E, O, D/G] (compressed-tensors, ModelOpt).
    - "q4_k" of ggml: uint8 [E, O, D/2] with records uint8 [E, O, D/256, 16] of d, dmin and the
      packed scales; "q6_k": uint8 [E, O, 3D/4] of ql and qh with records [E, O, D/256, 18] of
      scales and d.

    x and topk_weights have gradients, through weights that become float32 in cache likewise; the
    rounding of rows counts as none. Weights, scales and biases are frozen.

    Where products are of integers, the rows that meet a weight, x and the activated features,
    are rounded to integers of 16 bits, with a scale a row, or to integers from -127 to 127, with a
    scale for each 32 of them. 16 bits move a value by at most 1/65278 of the largest of its row,
    and results on normal x by about 5e-5. 8 bits move it by at most 1/254 of the largest of its 32,
    and results by about 1 %: a tenth of what 4-bit weights cost, and twice what 8-bit weights do.

    - 4 bits: 8, where an expert has up to 8 tokens or x is bfloat16 or float16.
    - 8 bits: 16, where an expert has up to 8 tokens or x is bfloat16 or float16. But 8 on a
      processor with AVX-512 VNNI, if x is of a half type and an expert has many tokens: more than
      3 to 6, K / 160 for a depth of K.
    - Else, with more than 8 tokens of float32, or of any type without AVX2, weights are widened in
      cache, which is exact, and products are in fp32.

    So x in float32 is the more accurate way. Sums of integers are exact, others run in fp32 in a
    fixed order: results are bitwise identical every run, with any number of threads.

    On CUDA rows are not rounded to integers: numbers of x's type meet the weights, products are
    summed in fp32, and the scales multiply these sums (float32 x with 4 bits in large calls: the
    weights, in fp32). Formats without kernels of integers do so in calls of up to 64 slots (of T *
    K) per expert, and of any size in the batch-invariant mode; in larger ones, their weights are
    rounded to x's type. Rounded to x's type are also x times `x_scale`, the activated features and
    an expert's output, as by :func:`moe_ffn`.

    Args:
        x: [T, H] tokens; float32, bfloat16 or float16, any strides.
        w_gate_up, w_gate_up_scale: a weight [E, 2I, H] of its format, gate half first; I instead
            of 2I for activations without a gate.
        w_down, w_down_scale: a weight [E, H, I] of its format.
        topk_weights: [T, K] in any float dtype, used in fp32.
        topk_ids: [T, K], int32 or int64. Anything outside [0, E) means "no expert here".
        format: the name of both weights' format, or a name of each.
        x_scale: [H] float32, or None: multiplies x in front of w_gate_up. A quantizer that looks at
            activations divides the columns of w_gate_up by it.
        b_gate_up: [E, 2I] ([E, I]) in x's dtype, or None.
        b_down: [E, H] in x's dtype, or None; multiplied by the routing weight like the rest.
        activation: as for :func:`moe_ffn`.
        interleaved: gate in even, up in odd features of w_gate_up and b_gate_up.
        apply_router_weight_on_input: multiply the token by the routing weight before the experts
            and add their outputs unweighted (Llama 4).
        alpha, limit: of ``"swiglu_oai"``.
        w_gate_up_zero, w_down_zero: zero points of formats that have them, or None.

    Returns:
        [T, H] in x's dtype. A token without any expert gets zeros; T = 0 gives [0, H].

    Raises:
        ValueError: an unknown format or activation; wrong dtype, rank or size.
        NotImplementedError: a gradient of anything but x and topk_weights, or a second derivative.

    Source:
        Integer products on blocks of rounded activations: Gerganov et al., ggml (q8_0, q4_0);
        the activation-aware scale: Lin et al. 2023, arXiv 2306.00978.
    """
    options = options_of(
        b_gate_up, b_down, activation, interleaved, apply_router_weight_on_input, alpha, limit
    )
    weights = (w_gate_up, w_gate_up_scale, w_down, w_down_scale)
    names = joined(format)
    rest = (topk_weights, topk_ids, names, x_scale)
    if w_gate_up_zero is not None or w_down_zero is not None:
        options = (*(options or DEFAULT_OPTIONS), w_gate_up_zero, w_down_zero)
    if x.device.type == "cuda" and not _has_cuda_kernel(names, w_down, topk_ids):
        return _moe_ffn_quantized_fwd(x, *weights, *rest, *options)[0]
    return _moe_ffn_quantized(x, *weights, *rest, *options)


def _has_cuda_kernel(names: str, w_down: Tensor, topk_ids: Tensor) -> bool:
    """Returns whether the kernels read the weights of a call on CUDA as they are stored."""
    return have_kernels(names, 2) or reads_stored(topk_ids.numel(), w_down.shape[0])


def _check_call(
    op: str,
    x: Tensor,
    w_gate_up: Tensor,
    w_gate_up_scale: Tensor,
    w_down: Tensor,
    w_down_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    format: str,
    x_scale: Tensor | None,
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    interleaved: bool,
    apply_router_weight_on_input: bool,
    alpha: float,
    limit: float,
    w_gate_up_zero: Tensor | None,
    w_down_zero: Tensor | None,
) -> None:
    check_activation(op, activation, alpha, limit, False)
    names = check_names(op, "format", format, 2)
    check_index(op, "topk_ids", topk_ids, "[T, K]")
    check_tensor(op, "x", x, NARROW_FLOATS, "[T, H]")
    tokens, hidden = x.shape
    up_depth = check_weight(op, "w_gate_up", w_gate_up, w_gate_up_scale, w_gate_up_zero, names[0])
    num_experts, width, _ = w_gate_up.shape
    check(
        up_depth == hidden,
        f"{op}: w_gate_up must have rows of H = {hidden} weights, got {up_depth} "
        f"(shape {list(w_gate_up.shape)}).",
    )
    intermediate = check_width(op, w_gate_up, activation)
    down_depth = check_weight(op, "w_down", w_down, w_down_scale, w_down_zero, names[1])
    check_size(op, "w_down", w_down, 0, num_experts, "E")
    check_size(op, "w_down", w_down, 1, hidden, "H")
    check(
        down_depth == intermediate,
        f"{op}: w_down must have rows of I = {intermediate} weights, got {down_depth} "
        f"(shape {list(w_down.shape)}).",
    )
    check_routing(op, topk_weights, topk_ids, tokens)
    check_tensor(op, "x_scale", x_scale, (torch.float32,), "[H]", H=hidden)
    check_bias(op, "b_gate_up", b_gate_up, x, num_experts, width)
    check_bias(op, "b_down", b_down, x, num_experts, hidden)
    check_same_device(
        op,
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
        w_gate_up_zero=w_gate_up_zero,
        w_down_zero=w_down_zero,
    )


@register_fake(_OP)
def _(*args: Any) -> Tensor:
    _check_call(_OP, *args)
    return new_like(args[0])


@register_fake(f"{_OP}_fwd")
def _(*args: Any) -> tuple[Tensor, ...]:
    _check_call(_OP, *args)
    x, w_gate_up, topk_ids = args[0], args[1], args[6]
    num_slots = topk_ids.shape[0] * topk_ids.shape[1]
    # On CUDA backward computes the pre-activation again.
    kept = 0 if x.device.type == "cuda" else num_slots
    return (
        new_like(x),
        x.new_empty((kept, w_gate_up.shape[1])),
        x.new_empty((w_gate_up.shape[0] + 1,), dtype=torch.int32),
        x.new_empty((num_slots,), dtype=torch.int32),
        x.new_empty(tuple(topk_ids.shape), dtype=torch.int32),
    )


@register_fake(f"{_OP}_bwd")
def _(grad_y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    op = f"{_OP}_bwd"
    x, *weights, topk_weights, preact, _, _, slot_to_row, format = args[:11]
    *rest, need_x, need_topk_weights = args[11:]
    check: Any = _check_call
    check(op, x, *weights, topk_weights, slot_to_row, format, None, *rest)
    check_dtype(op, "grad_y", grad_y.dtype, (x.dtype,), " like x")
    check_dtype(op, "preact", preact.dtype, (x.dtype,), " like x")
    return (
        new_if(need_x, x),
        new_if(need_topk_weights, x, slot_to_row.shape, torch.float32),
    )


# Positions of tensors without a gradient.
_FROZEN = {
    1: "w_gate_up",
    2: "w_gate_up_scale",
    3: "w_down",
    4: "w_down_scale",
    8: "x_scale",
    9: "b_gate_up",
    10: "b_down",
}


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    needs = needs_input_grad(ctx, len(inputs))
    wanted = [name for i, name in _FROZEN.items() if needs[i]]
    if wanted:
        raise NotImplementedError(
            f"{_OP}: weights, scales and biases have no gradient, and {', '.join(wanted)} requires "
            f"one; detach it, or use moe_ops.reference.{_OP}, which can be differentiated."
        )
    x, *weights, topk_weights, _, format, x_scale, b_gate_up, b_down = inputs[:11]
    _, preact, expert_offsets, row_to_slot, slot_to_row = output
    ctx.mark_non_differentiable(preact, expert_offsets, row_to_slot, slot_to_row)
    ctx.set_materialize_grads(False)
    routing = (preact, expert_offsets, row_to_slot, slot_to_row)
    ctx.save_for_backward(
        x, *weights, topk_weights, *routing, b_gate_up, b_down, *inputs[16:18], x_scale
    )
    ctx.format, ctx.options = format, inputs[11:16]


def _backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Any, ...]:
    count = 18
    needs = needs_input_grad(ctx, count)
    grads: list[Tensor | None] = [None] * count
    if grad_y is None:
        return tuple(grads)
    x, *saved, b_gate_up, b_down, up_zero, down_zero, x_scale = ctx.saved_tensors
    if x_scale is not None:
        x = (x * x_scale).to(x.dtype)
    rest = (ctx.format, b_gate_up, b_down, *ctx.options, up_zero, down_zero)
    grad_x, grad_weights = _moe_ffn_quantized_bwd(grad_y, x, *saved, *rest, needs[0], needs[5])
    if needs[0]:
        grads[0] = grad_x if x_scale is None else (grad_x * x_scale).to(x.dtype)
    if needs[5]:
        grads[5] = grad_weights.to(saved[4].dtype)
    return tuple(grads)


register_autograd(_OP, _backward, _setup, forward=f"{_OP}_fwd")
register_autograd(f"{_OP}_fwd", _backward, _setup)
register_no_double_backward(f"{_OP}_bwd")
register_autocast(_OP, ["x", "b_gate_up", "b_down"])
register_autocast(f"{_OP}_fwd", ["x", "b_gate_up", "b_down"])


# --- CUDA. Calls of many tokens in formats without kernels for them, and all backward passes,
# dequantize some experts at a time into weights of x's type, for moe_ffn: at the sizes that train,
# an expert has enough rows for its products to take longer than that, and no tensor of all weights
# exists. Which experts have rows only the device knows, so all take their turn.

_CHUNK_BYTES = 1 << 27


def _chunks(
    x: Tensor,
    weights: tuple[Any, ...],
    format: str,
    up_zero: Tensor | None,
    down_zero: Tensor | None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Ranges of experts with w_gate_up and w_down of x's type."""
    w_gate_up, gate_up_scale, w_down, down_scale = weights
    names = check_names(_OP, "format", format, 2)
    experts, hidden = w_down.shape[:2]
    size = (w_gate_up.shape[1] + w_gate_up.shape[1] // 2) * hidden * x.element_size()
    step = max(1, _CHUNK_BYTES // max(size, 1))
    exact: Any = {"dtype": torch.float32}
    for first in range(0, experts, step):
        part = slice(first, min(first + step, experts))
        zeros = [None if z is None else z[part] for z in (up_zero, down_zero)]
        up = dequantized(w_gate_up[part], gate_up_scale[part], zeros[0], format=names[0], **exact)
        down = dequantized(w_down[part], down_scale[part], zeros[1], format=names[1], **exact)
        yield part, up.to(x.dtype), down.to(x.dtype)


def _bias(bias: Tensor | None, part: slice) -> Tensor | None:
    return None if bias is None else bias[part]


@register_cuda_formula("moe_ffn_quantized_fwd")
def _(*args: Any) -> tuple[Tensor, ...]:
    x, *weights, topk_weights, topk_ids, format, x_scale, b_gate_up, b_down = args[:11]
    options, zeros = args[11:16], args[16:18]
    ops = torch.ops.moe_ops
    routing = ops.sort_by_expert(topk_ids, weights[2].shape[0])
    preact = x.new_empty((0, weights[0].shape[1]))
    if _has_cuda_kernel(format, weights[2], topk_ids):
        return ops.moe_ffn_quantized(*args), preact, *routing
    scaled = x if x_scale is None else (x * x_scale).to(x.dtype)
    y = x.new_zeros(x.shape, dtype=torch.float32)
    for part, up, down in _chunks(x, tuple(weights), format, *zeros):
        biases = _bias(b_gate_up, part), _bias(b_down, part)
        ids = topk_ids - part.start
        y += ops.moe_ffn(scaled, up, down, topk_weights, ids, *biases, *options, torch.float32)
    return y.to(x.dtype), preact, *routing


@register_cuda_formula("moe_ffn_quantized_bwd")
def _(grad_y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    x, *weights, topk_weights, _preact, _, row_to_slot, slot_to_row = args[:10]
    format, b_gate_up, b_down, *options, up_zero, down_zero, need_x, need_topk_weights = args[10:]
    ops = torch.ops.moe_ops
    # From the routing, which expert a slot has; slots without one keep -1.
    expert_offsets = args[7]
    rows = torch.arange(row_to_slot.numel(), device=x.device, dtype=torch.int32)
    of_row = torch.bucketize(rows, expert_offsets[1:].contiguous(), right=True).int()
    ids = torch.full_like(of_row, -1).scatter_(0, row_to_slot.long(), of_row)
    ids = torch.where(ids < weights[2].shape[0], ids, -1).view(slot_to_row.shape)
    grad_x = x.new_zeros(x.shape, dtype=torch.float32) if need_x else x.new_empty(0)
    grad_weights = x.new_empty(0, dtype=torch.float32)
    if need_topk_weights:
        grad_weights = x.new_zeros(ids.shape, dtype=torch.float32)
    for part, up, down in _chunks(x, tuple(weights), format, up_zero, down_zero):
        biases = _bias(b_gate_up, part), _bias(b_down, part)
        call = (x, up, down, topk_weights)
        here = torch.where(ids < part.stop, ids - part.start, -1)
        _, *saved = ops.moe_ffn_fwd(*call, here, *biases, *options, None)
        needs = (need_x, False, False, need_topk_weights, False, False)
        found = ops.moe_ffn_bwd(grad_y, *call, *saved, biases[1], *options, *needs)
        if need_x:
            grad_x += found[0]
        if need_topk_weights:
            grad_weights += found[3]
    return (grad_x.to(x.dtype) if need_x else grad_x), grad_weights
