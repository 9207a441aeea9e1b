"""fp8 training of experts as in DeepSeek-V3: float8_e4m3fn GEMMs forward and backward, with master
weights in a separate dtype.

Letters: T tokens, H hidden size, I intermediate size, E experts, K experts per token, N = T * K.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from moe_ops._private_torch import are_functorch_transforms_active, len_torch_dispatch_stack
from moe_ops.formulas.codes import round_fp8_blocks
from moe_ops.ops import (
    gated_act,
    grouped_gemm_fp8,
    grouped_gemm_fp8_wgrad,
    grouped_sum,
    moe_ffn_fp8,
    permute,
    quantize_fp8,
    quantize_fp8_columns,
    sort_by_expert,
    unpermute,
)
from moe_ops.ops._autograd import refuse_tangents
from moe_ops.ops._checks import (
    NARROW_FLOATS,
    check_index,
    check_same_device,
    check_tensor,
)
from moe_ops.ops.gated_act import GATED_ACTIVATIONS, check_activation
from moe_ops.ops.moe_ffn import check_bias, check_routing, check_width

from .functional import plain_activation


class Fp8Weight(NamedTuple):
    """A weight [E, O, D] in e4m3, in the layouts of the forward and backward GEMMs."""

    q: Tensor  # [E, O, D], for the forward pass
    scale: Tensor  # [E, ceil(O / 128), ceil(D / 128)]
    q_t: Tensor  # [E, D, O], for the gradient of the input: a view of q on the CPU
    scale_t: Tensor  # [E, ceil(D / 128), ceil(O / 128)]


class _Options(NamedTuple):
    activation: str
    interleaved: bool
    on_input: bool
    alpha: float
    limit: float


def fp8_ffn(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
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
    main_grads: tuple[Tensor | None, Tensor | None] | None = None,
    x_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Computes :func:`moe_ops.moe_ffn` with float8_e4m3fn GEMMs, forward and backward.

    Weights are quantized with one scale per 128 x 128 block, once per version. Their other operands
    (x, the activated features, and in backward the output gradients) have one scale per 128
    elements of a row. Weight gradients are sums over an expert's rows, so both operands have one
    scale per 128 rows of a column. Sums, activation, biases and their derivatives are computed in
    fp32; values between them are rounded to x's dtype. x, the pre-activation, the routing and the
    quantized weights are saved for backward.

    Without gradients, it calls :func:`moe_ops.moe_ffn_fp8`, which does not round the
    pre-activation.

    Args:
        x: [T, H] tokens; float32, bfloat16 or float16, any strides.
        w_gate_up: [E, 2I, H], gate half first ([E, I, H] for activations without a gate); float32,
            bfloat16 or float16, independent of x. Any strides.
        w_down: [E, H, I], with the dtypes and strides of w_gate_up.
        topk_weights: [T, K] in any float dtype, used in fp32. Differentiable.
        topk_ids: [T, K], int32 or int64. Ids outside [0, E) are empty slots.
        b_gate_up, b_down: [E, 2I] ([E, I]) and [E, H] in x's dtype, or None.
        activation, interleaved, apply_router_weight_on_input, alpha, limit: see moe_ffn.
        main_grads: see moe_ffn. Buffers to which backward adds the gradients of w_gate_up and
            w_down, each shaped like its weight, contiguous, in float32, bfloat16 or float16, or
            None. Eager mode only.
        x_scale: scales of x in float8_e4m3fn, see moe_ffn_fp8; only without gradients.
        out_dtype: dtype of the result, see moe_ffn_fp8; with gradients, the result is first rounded
            to x's dtype.

    Returns:
        [T, H] in x's dtype, or out_dtype. T = 0 gives [0, H]. A token with an infinity or a NaN
        gives NaN in its result and in the affected features of its experts' gradients; other tokens
        are unaffected.

    Autocast casts x and the biases, not the weights. A write through ``.data`` does not change a
    weight's version: call :func:`clear_fp8_cache` afterwards.

    Raises:
        ValueError: wrong dtype, rank, size or activation.
        NotImplementedError: under torch.func's transforms. Second derivatives raise RuntimeError.

    Source:
        DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.
    """
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        target = torch.get_autocast_dtype(device)
        x = x if x_scale is not None else x.to(target)
        b_gate_up = None if b_gate_up is None else b_gate_up.to(target)
        b_down = None if b_down is None else b_down.to(target)
    options = _Options(activation, interleaved, apply_router_weight_on_input, alpha, limit)
    inputs = (x, w_gate_up, w_down, topk_weights, b_gate_up, b_down)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if wanted or x_scale is None:
        _check(x, w_gate_up, w_down, topk_weights, topk_ids, b_gate_up, b_down, options)
    up, down = fp8_weight(w_gate_up), fp8_weight(w_down)
    if not wanted:
        return moe_ffn_fp8(
            x,
            *up[:2],
            *down[:2],
            topk_weights,
            topk_ids,
            b_gate_up=b_gate_up,
            b_down=b_down,
            activation=activation,
            interleaved=interleaved,
            apply_router_weight_on_input=apply_router_weight_on_input,
            alpha=alpha,
            limit=limit,
            x_scale=x_scale,
            out_dtype=out_dtype,
        )
    if not torch.compiler.is_compiling() and are_functorch_transforms_active():
        raise NotImplementedError(
            "fp8_ffn: torch.func's transforms are not implemented; use moe_ffn under them."
        )
    function = _Fp8Ffn if torch.compiler.is_compiling() else _EagerFp8Ffn
    y: Tensor = function.apply(*inputs, topk_ids, *up, *down, options, main_grads or (None, None))
    return y if out_dtype is None else y.to(out_dtype)


def _check(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
    options: _Options,
) -> None:
    op = "fp8_ffn"
    check_activation(op, options.activation, options.alpha, options.limit, False)
    check_index(op, "topk_ids", topk_ids, "[T, K]")
    check_tensor(op, "x", x, NARROW_FLOATS, "[T, H]")
    num_tokens, hidden = x.shape
    shape = "[E, 2I, H]" if options.activation in GATED_ACTIVATIONS else "[E, I, H]"
    check_tensor(op, "w_gate_up", w_gate_up, NARROW_FLOATS, shape, H=hidden)
    num_experts, width, _ = w_gate_up.shape
    sizes = {"E": num_experts, "H": hidden, "I": check_width(op, w_gate_up, options.activation)}
    check_tensor(op, "w_down", w_down, NARROW_FLOATS, "[E, H, I]", **sizes)
    check_routing(op, topk_weights, topk_ids, num_tokens)
    check_bias(op, "b_gate_up", b_gate_up, x, num_experts, width)
    check_bias(op, "b_down", b_down, x, num_experts, hidden)
    check_same_device(
        op,
        x=x,
        w_gate_up=w_gate_up,
        w_down=w_down,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        b_gate_up=b_gate_up,
        b_down=b_down,
    )


class _Fp8Ffn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, w_gate_up, w_down, topk_weights, b_gate_up, b_down, topk_ids, *rest = args
        *codes, options, main_grads = rest
        up, down = Fp8Weight(*codes[:4]), Fp8Weight(*codes[4:])
        offsets, row_to_slot, slot_to_row = sort_by_expert(topk_ids, w_gate_up.shape[0])
        rows = _Rows(topk_ids, topk_weights, row_to_slot)
        q, scale = rows.gather(*quantize_fp8(x))
        if options.on_input:
            scale = scale * rows.weights
        preact = grouped_gemm_fp8(
            q, scale, up.q, up.scale, offsets, bias=b_gate_up, out_dtype=x.dtype
        )
        h = _activate(preact, options)
        q, scale = quantize_fp8(h)
        out = grouped_gemm_fp8(
            q, scale, down.q, down.scale, offsets, bias=b_down, out_dtype=x.dtype
        )
        y = unpermute(out, offsets, slot_to_row, None if options.on_input else topk_weights)
        maps = (offsets, row_to_slot, slot_to_row)
        transposed = (up.q_t, up.scale_t, down.q_t, down.scale_t)
        ctx.save_for_backward(x, topk_weights, topk_ids, preact, b_down, *maps, *transposed)
        ctx.dtypes = (w_gate_up.dtype, w_down.dtype)
        ctx.options, ctx.main_grads = options, main_grads
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        x, topk_weights, topk_ids, preact, b_down, *rest = ctx.saved_tensors
        offsets, row_to_slot, slot_to_row, up_t, up_scale_t, down_t, down_scale_t = rest
        options, (main_up, main_down) = ctx.options, ctx.main_grads
        needs = ctx.needs_input_grad
        need_x, need_up, need_down, need_weights, need_b_up, need_b_down = needs[:6]
        rows = _Rows(topk_ids, topk_weights, row_to_slot)
        grad_x = grad_up = grad_down = grad_weights = grad_b_up = grad_b_down = None

        # Rows of grad_y are tokens, quantized once for all of their experts. The routing weights
        # enter last, in the scales of grad_preact, which needs no extra pass over memory.
        h = _activate(preact, options)
        q, scale = rows.gather(*quantize_fp8(grad_y))
        grad_h = grouped_gemm_fp8(q, scale, down_t, down_scale_t, offsets, out_dtype=x.dtype)
        if need_down:
            columns = (row_to_slot,) if options.on_input else (row_to_slot, topk_weights)
            grad = quantize_fp8_columns(grad_y, offsets, *columns)
            operands = (*grad, *quantize_fp8_columns(h, offsets))
            grad_down = _weight_gradient(operands, offsets, ctx.dtypes[1], main_down)
        if need_b_down:
            grad_rows = permute(grad_y, offsets, row_to_slot)
            grad_b_down = grouped_sum(rows.weigh(grad_rows, options), offsets)
        if need_weights and not options.on_input:
            grad_weights = _dots(h, grad_h)[slot_to_row.long()]
            if b_down is not None:
                grad_weights = grad_weights + _bias_dots(grad_y, b_down, topk_ids)
        need_rows = need_x or (need_weights and options.on_input)
        if need_rows or need_up or need_b_up:
            grad_preact = _activate_bwd(grad_h, preact, options)
        if need_b_up:
            grad_b_up = grouped_sum(rows.weigh(grad_preact, options), offsets)
        if need_up:
            if options.on_input:
                grad = quantize_fp8_columns(grad_preact, offsets)
                of_x = quantize_fp8_columns(x, offsets, row_to_slot, topk_weights)
            else:
                grad = quantize_fp8_columns(grad_preact, offsets, *rows.as_slots())
                of_x = quantize_fp8_columns(x, offsets, row_to_slot)
            grad_up = _weight_gradient((*grad, *of_x), offsets, ctx.dtypes[0], main_up)
        if need_rows:
            q, scale = quantize_fp8(grad_preact)
            if not options.on_input:
                scale = scale * rows.weights
            grad_rows = grouped_gemm_fp8(q, scale, up_t, up_scale_t, offsets, out_dtype=x.dtype)
            if options.on_input:
                grad_weights = _dots(x[rows.token], grad_rows)[slot_to_row.long()]
                grad_rows = (grad_rows * rows.weights).to(x.dtype)
            grad_x = torch.ops.moe_ops.permute_bwd(grad_rows, offsets, row_to_slot, x.shape[0])
        if grad_weights is not None:
            grad_weights = grad_weights.to(topk_weights.dtype) if need_weights else None
        grads = (grad_x, grad_up, grad_down, grad_weights, grad_b_up, grad_b_down)
        return *grads, *(None,) * (len(needs) - len(grads))


class _EagerFp8Ffn(_Fp8Ffn):
    """Subclass with a jvp that raises; the compiler traces no Function that has a jvp."""

    jvp = staticmethod(refuse_tangents("fp8_ffn", "use moe_ffn under it"))


class _Rows:
    """Source of the experts' rows: `token` [N] int64, and their routing weights."""

    def __init__(self, topk_ids: Tensor, topk_weights: Tensor, row_to_slot: Tensor) -> None:
        slot = row_to_slot.long()
        self.token = slot // max(topk_ids.shape[1], 1)
        self._slot, self._weights = slot, topk_weights

    def gather(self, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Gathers quantized values and scales of tokens, by rows."""
        return q.view(torch.uint8)[self.token].view(q.dtype), scale[self.token]

    @property
    def weights(self) -> Tensor:
        """Returns the routing weight of each row, [N, 1] fp32."""
        return self._weights.float().reshape(-1)[self._slot, None]

    def as_slots(self) -> tuple[Tensor, Tensor]:
        """Returns the arguments of quantize_fp8_columns for tensors that are already in row
        order."""
        return torch.arange(self._slot.shape[0], device=self._slot.device), self.weights

    def weigh(self, t: Tensor, options: _Options) -> Tensor:
        return t if options.on_input else (t * self.weights).to(t.dtype)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Computes <a[r], b[r]> in fp32; products in float16 could overflow."""
    if a.dtype == torch.float16:
        a, b = a.float(), b.float()
    return (a * b).sum(1, dtype=torch.float32)


def _weight_gradient(
    operands: tuple[Tensor, ...], offsets: Tensor, dtype: torch.dtype, main: Tensor | None
) -> Tensor | None:
    grad, grad_scale, a, a_scale = operands
    if main is None:
        return grouped_gemm_fp8_wgrad(grad, grad_scale, a, a_scale, offsets, out_dtype=dtype)
    grouped_gemm_fp8_wgrad(grad, grad_scale, a, a_scale, offsets, main_grad=main)
    return None


def _bias_dots(grad_y: Tensor, b_down: Tensor, topk_ids: Tensor) -> Tensor:
    """Computes <b_down[e], grad_y[t]> for each slot, [T, K] fp32."""
    num_experts = b_down.shape[0]
    dots = grad_y.float() @ b_down.float().T
    ids = topk_ids.long()
    here = (ids >= 0) & (ids < num_experts)
    return torch.where(here, dots.gather(1, torch.where(here, ids, 0)), 0)


def _activate(preact: Tensor, o: _Options) -> Tensor:
    if o.activation not in GATED_ACTIVATIONS:
        return plain_activation(preact, o.activation)
    return gated_act(preact, o.activation, interleaved=o.interleaved, alpha=o.alpha, limit=o.limit)


def _activate_bwd(grad_h: Tensor, preact: Tensor, o: _Options) -> Tensor:
    aten, activation = torch.ops.aten, o.activation
    if activation in GATED_ACTIVATIONS:
        layout = (o.interleaved, o.alpha, o.limit)
        return torch.ops.moe_ops.gated_act_bwd(grad_h, preact, activation, *layout)
    if activation == "relu":
        return aten.threshold_backward(grad_h, preact, 0)
    if activation == "relu2":
        return grad_h * F.relu(preact) * 2
    if activation == "silu":
        return aten.silu_backward(grad_h, preact)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return aten.gelu_backward(grad_h, preact, approximate=approximate)


# ----------------------------------------------------------------------------- quantized weights

_kept: Any = WeakTensorKeyDictionary()  # weight -> (its identity, its Fp8Weight)
_watching = False


def fp8_weight(w: Tensor) -> Fp8Weight:
    """Returns the quantized weight [E, O, D], cached until the weight changes.

    The cache entry depends on the weight's storage, version, shape, strides and dtype, which every
    call compares. It is also dropped with the weight, and at a step of an optimizer with the
    weight, because fused optimizers change weights without a new version. Under a compiler or CUDA
    graph capture, quantization is part of the graph. It takes two bytes per weight on CUDA, one on
    the CPU, whose kernels read one copy in both orders.
    """
    if _is_recorded(w):
        return _make(w)
    identity = (w.untyped_storage()._cdata, w.data_ptr(), w._version, w.dtype, w.shape, w.stride())
    kept = _kept.get(w)
    if kept is not None and kept[0] == identity:
        codes: Fp8Weight = kept[1]
        return codes
    _watch_optimizers()
    codes = _make(w)
    _kept[w] = (identity, codes)
    return codes


def clear_fp8_cache(module: torch.nn.Module | None = None) -> None:
    """Drops cached quantized weights of a module, or of all modules if it is None.

    It is needed after writes that do not change a version, through ``.data`` or a NumPy view.
    """
    if module is None:
        _kept.clear()
        return
    for w in module.parameters():
        _kept.pop(w, None)


def _is_recorded(w: Tensor) -> bool:
    """Returns whether a cached copy would become a constant in a graph, or w has no version
    counter."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or len_torch_dispatch_stack() > 0
        or w.is_inference()
        or (w.device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )


@torch.no_grad()
def _make(w: Tensor) -> Fp8Weight:
    q, scale = round_fp8_blocks(w)
    q_t = q.transpose(1, 2)
    if w.device.type != "cpu":
        q_t = q_t.view(torch.uint8).contiguous().view(q.dtype)
    return Fp8Weight(q, scale, q_t, scale.transpose(1, 2).contiguous())


def _watch_optimizers() -> None:
    global _watching
    if not _watching:
        _watching = True
        register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    if len(_kept):
        for group in optimizer.param_groups:
            for p in group["params"]:
                _kept.pop(p, None)
