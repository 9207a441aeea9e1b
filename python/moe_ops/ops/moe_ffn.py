"""moe_ffn: the complete expert FFN block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops._private_torch import are_functorch_transforms_active
from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import (
    direct_call,
    needs_input_grad,
    only_needed,
    plain_call,
    refuse_tangents,
    register_autograd,
    register_no_double_backward,
    register_not_differentiable,
)
from moe_ops.ops._checks import (
    accumulate_dtype,
    check,
    check_dtype,
    check_float,
    check_index,
    check_like,
    check_result_dtype,
    check_same_device,
    check_size,
    is_stored_transposed,
    new_if,
    new_like,
)
from moe_ops.ops._library import register_fake
from moe_ops.ops.gated_act import GATED_ACTIVATIONS, check_activation

_moe_ffn = direct_call("moe_ffn")
_moe_ffn_bwd = direct_call("moe_ffn_bwd")
_moe_ffn_bwd_accumulate = plain_call("moe_ffn_bwd_accumulate")


def moe_ffn(
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
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Routes each token through its experts' FFNs and sums the results.

    ``y[t] = sum_k topk_weights[t, k] * (w_down[e] @ act(w_gate_up[e] @ x[t] + b_gate_up[e]) +
    b_down[e])`` with ``e = topk_ids[t, k]``. The GEMMs gather, activate and weight rows; there is
    no permuted copy of x. Training saves x, the pre-activation and the routing. Sums run in fp32
    (fp64 for fp64) in a fixed order, so results are bitwise identical for every run and number of
    threads. On CUDA, the pre-activation, the activation, an expert's output and their gradients are
    rounded to x's dtype. In bfloat16, so is the activation on CPUs that multiply pairs of bfloat16,
    with more than a few rows per expert. Experts without tokens cost nothing and have zero
    gradients.

    Args:
        x: [T, H] tokens; float64, float32, bfloat16 or float16, any strides.
        w_gate_up: [E, 2I, H], gate half first, in x's dtype; [E, I, H] for activations without a
            gate. Any strides: a transposed view of a dense [E, H, 2I] tensor is read in place.
        w_down: [E, H, I] in x's dtype, any strides.
        topk_weights: [T, K] in any float dtype, used in fp32. Differentiable.
        topk_ids: [T, K], int32 or int64. Ids outside [0, E) are empty slots, which add nothing even
            if their weight is NaN.
        b_gate_up: [E, 2I] ([E, I]) in x's dtype, or None.
        b_down: [E, H] in x's dtype, or None; multiplied by the routing weight like the rest.
        activation: with a gate ``"swiglu"``, ``"geglu"``, ``"geglu_tanh"``, ``"reglu"``,
            ``"swiglu_oai"`` (see :func:`gated_act`); without ``"silu"``, ``"gelu"``,
            ``"gelu_tanh"``, ``"relu"``, ``"relu2"`` (squared ReLU).
        interleaved: gate in even, up in odd features of w_gate_up and b_gate_up.
        apply_router_weight_on_input: multiply the token by the routing weight before the experts
            and add their outputs unweighted (Llama 4).
        alpha, limit: parameters of ``"swiglu_oai"``.
        main_grads: buffers to which backward adds the gradients of w_gate_up and w_down, each
            shaped like its weight, contiguous (on CUDA also the transposed view of a contiguous [E,
            H, 2I] or [E, I, H]), in fp32 (fp64) or the weight's dtype, or None. Such a weight gets
            no ``.grad``: no gradient tensor of its size is allocated, and bfloat16 training
            accumulates in fp32. Eager mode only.
        out_dtype: dtype of the result and its gradient: x's dtype (None), or float32 for bfloat16
            and float16 x, the unrounded sum over a token's experts, to be added to the sum over
            other experts. Backward rounds the gradient to x's dtype (on the CPU, in bfloat16 only).

    Returns:
        [T, H] in out_dtype. A token without experts gets zeros; T = 0 gives [0, H].

    Raises:
        ValueError: wrong dtype, rank, size or activation (of main_grads: in backward).
        NotImplementedError: on a second derivative.

    Source:
        Shazeer et al. 2017, arXiv 1701.06538; the argument order is that of vLLM and SGLang.
    """
    if (
        main_grads is not None
        and torch.is_grad_enabled()
        and any(g is not None for g in main_grads)
    ):
        if are_functorch_transforms_active():
            raise NotImplementedError(
                "moe_ffn: main_grads cannot be used under torch.func's transforms; pass None."
            )
        arguments = (activation, interleaved, apply_router_weight_on_input, alpha, limit)
        inputs = (x, w_gate_up, w_down, topk_weights, topk_ids, b_gate_up, b_down)
        return _AccumulatingFfn.apply(*inputs, main_grads, arguments, out_dtype)
    options = options_of(
        b_gate_up, b_down, activation, interleaved, apply_router_weight_on_input, alpha, limit
    )
    if out_dtype is not None:
        options = with_out_dtype(options, out_dtype)
    return _moe_ffn(x, w_gate_up, w_down, topk_weights, topk_ids, *options)


def options_of(
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    interleaved: bool,
    apply_router_weight_on_input: bool,
    alpha: float,
    limit: float,
) -> tuple[Any, ...]:
    """Returns the trailing arguments of moe_ffn and related ops for a call, or none if all are
    defaults: the dispatcher takes half a microsecond to read the seven."""
    if (
        activation == "swiglu"
        and b_gate_up is None
        and b_down is None
        and interleaved is False
        and apply_router_weight_on_input is False
        and alpha == 1.702
        and limit == 7.0
    ):
        return ()
    return b_gate_up, b_down, activation, interleaved, apply_router_weight_on_input, alpha, limit


def with_out_dtype(options: tuple[Any, ...], out_dtype: torch.dtype | None) -> tuple[Any, ...]:
    """Returns the arguments of `options_of`, followed by out_dtype."""
    return *(options or DEFAULT_OPTIONS), out_dtype


DEFAULT_OPTIONS = (None, None, "swiglu", False, False, 1.702, 7.0)


def check_routing(op: str, topk_weights: Tensor, topk_ids: Tensor, num_tokens: int) -> None:
    """Checks topk_weights and the number of tokens, for topk_ids that are known to be [T, K]."""
    sizes = {"T": num_tokens, "K": topk_ids.shape[1]}
    check_float(op, "topk_weights", topk_weights, "[T, K]", **sizes)
    check_size(op, "topk_ids", topk_ids, 0, num_tokens, "T")


def check_bias(
    op: str, name: str, bias: Tensor | None, x: Tensor, num_experts: int, features: int
) -> None:
    if bias is not None:
        check_like(op, name, bias, "x", x, "[E, features]", E=num_experts)
        check_size(op, name, bias, 1, features, "the number of features")


def check_width(op: str, w_gate_up: Tensor, activation: str) -> int:
    """Returns the intermediate size I for the rows of w_gate_up."""
    width = w_gate_up.shape[1]
    if activation not in GATED_ACTIVATIONS:
        return width
    check(
        width % 2 == 0,
        f"{op}: w_gate_up must have an even number 2I of features, "
        f"got shape {list(w_gate_up.shape)}.",
    )
    return width // 2


def check_call(
    op: str,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    interleaved: bool,
    apply_router_weight_on_input: bool,
    alpha: float,
    limit: float,
) -> None:
    check_activation(op, activation, alpha, limit, False)
    gated = activation in GATED_ACTIVATIONS
    check_index(op, "topk_ids", topk_ids, "[T, K]")
    check_float(op, "x", x, "[T, H]")
    num_tokens, hidden = x.shape
    shape = "[E, 2I, H]" if gated else "[E, I, H]"
    check_like(op, "w_gate_up", w_gate_up, "x", x, shape, H=hidden)
    num_experts, width, _ = w_gate_up.shape
    sizes = {"E": num_experts, "H": hidden, "I": check_width(op, w_gate_up, activation)}
    check_like(op, "w_down", w_down, "x", x, "[E, H, I]", **sizes)
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


@register_fake("moe_ffn_fwd")
def _fake_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *call, out_dtype = args
    check_call("moe_ffn", *call)
    x, w_gate_up, _, _, topk_ids, *_ = args
    if out_dtype is not None:
        check_result_dtype("moe_ffn", "out_dtype", out_dtype, x)
    num_experts, width, _ = w_gate_up.shape
    num_slots = topk_ids.shape[0] * topk_ids.shape[1]
    return (
        new_like(x, out_dtype),
        x.new_empty((num_slots, width)),
        x.new_empty((num_experts + 1,), dtype=torch.int32),
        x.new_empty((num_slots,), dtype=torch.int32),
        x.new_empty(tuple(topk_ids.shape), dtype=torch.int32),
    )


@register_fake("moe_ffn")
def _(*args: Any) -> Tensor:
    return _fake_fwd(*args)[0]


@register_fake("moe_ffn_bwd_accumulate")
def _(*args: Any) -> tuple[Tensor, ...]:
    *arguments, main_w_gate_up, main_w_down = args
    need_w_gate_up, need_w_down = 16, 17  # Positions of these flags
    arguments[need_w_gate_up] &= main_w_gate_up is None
    arguments[need_w_down] &= main_w_down is None
    return _fake_bwd(*arguments)


def _weight_gradient(needed: bool, w: Tensor) -> Tensor:
    if needed and is_stored_transposed(w):
        return new_like(w.mT).mT
    return new_if(needed, w)


@register_fake("moe_ffn_bwd")
def _fake_bwd(grad_y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    op = "moe_ffn_bwd"
    x, w_gate_up, w_down, topk_weights, preact, _, _, slot_to_row, b_down, *rest = args
    options, needs = rest[:5], rest[5:]
    check_call(op, x, w_gate_up, w_down, topk_weights, slot_to_row, None, b_down, *options)
    check_result_dtype(op, "grad_y", grad_y.dtype, x)
    check_dtype(op, "preact", preact.dtype, (x.dtype,), " like x")
    need_x, need_w_gate_up, need_w_down, need_topk_weights, need_b_gate_up, need_b_down = needs
    return (
        new_if(need_x, x),
        _weight_gradient(need_w_gate_up, w_gate_up),
        _weight_gradient(need_w_down, w_down),
        new_if(need_topk_weights, x, slot_to_row.shape, accumulate_dtype(x.dtype)),
        new_if(need_b_gate_up, x, w_gate_up.shape[:2]),
        new_if(need_b_down, x, w_down.shape[:2]),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_gate_up, w_down, topk_weights, _, _, b_down, *arguments, _out_dtype = inputs
    _, preact, expert_offsets, row_to_slot, slot_to_row = output
    ctx.mark_non_differentiable(preact, expert_offsets, row_to_slot, slot_to_row)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x, w_gate_up, w_down, topk_weights, preact, expert_offsets, row_to_slot, slot_to_row, b_down
    )
    ctx.arguments = arguments


def _backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Any, ...]:
    rest = (None,) * (len(ctx.arguments) + 1)  # Arguments that are not tensors, including out_dtype
    needs = needs_input_grad(ctx, 7 + len(rest))
    if grad_y is None:
        return (None,) * len(needs)
    saved = ctx.saved_tensors
    topk_weights = saved[3]
    # x, w_gate_up, w_down, topk_weights, b_gate_up, b_down; topk_ids (4) has no gradient.
    wanted = [needs[0], needs[1], needs[2], needs[3], needs[5], needs[6]]
    grads = _moe_ffn_bwd(grad_y, *saved, *ctx.arguments, *wanted)
    gx, gw_gate_up, gw_down, gw, gb_gate_up, gb_down = only_needed(grads, wanted)
    if gw is not None:
        gw = gw.to(topk_weights.dtype)
    return gx, gw_gate_up, gw_down, gw, None, gb_gate_up, gb_down, *rest


class _AccumulatingFfn(torch.autograd.Function):
    """Autograd function of moe_ffn whose backward adds weight gradients to given buffers."""

    jvp = staticmethod(refuse_tangents("moe_ffn"))

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        b_gate_up: Tensor | None,
        b_down: Tensor | None,
        main_grads: tuple[Tensor | None, Tensor | None],
        arguments: tuple[Any, ...],
        out_dtype: torch.dtype | None,
    ) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            # Not before this Function: the gradient of a cast weight would bypass its buffer.
            target = torch.get_autocast_dtype(device)
            x, w_gate_up, w_down = (t.to(target) for t in (x, w_gate_up, w_down))
            b_gate_up = None if b_gate_up is None else b_gate_up.to(target)
            b_down = None if b_down is None else b_down.to(target)
        inputs = (x, w_gate_up, w_down, topk_weights, topk_ids, b_gate_up, b_down)
        y, *saved = torch.ops.moe_ops.moe_ffn_fwd(*inputs, *arguments, out_dtype)
        ctx.save_for_backward(x, w_gate_up, w_down, topk_weights, *saved, b_down)
        ctx.main_grads = main_grads
        ctx.arguments = arguments
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        wanted = [needs[0], needs[1], needs[2], needs[3], needs[5], needs[6]]
        main = [g if need else None for g, need in zip(ctx.main_grads, needs[1:3], strict=True)]
        saved = ctx.saved_tensors
        grads = _moe_ffn_bwd_accumulate(grad_y, *saved, *ctx.arguments, *wanted, *main)
        # A weight whose gradient was added to its buffer returns none.
        given = [need and g is None for g, need in zip(main, wanted[1:3], strict=True)]
        returned = [wanted[0], *given, *wanted[3:]]
        gx, gw_gate_up, gw_down, gw, gb_gate_up, gb_down = only_needed(grads, returned)
        if gw is not None:
            gw = gw.to(saved[3].dtype)
        return gx, gw_gate_up, gw_down, gw, None, gb_gate_up, gb_down, None, None, None


register_autograd("moe_ffn", _backward, _setup, forward="moe_ffn_fwd")
register_autograd("moe_ffn_fwd", _backward, _setup)
register_no_double_backward("moe_ffn_bwd")
register_not_differentiable("moe_ffn_bwd_accumulate")
register_autocast("moe_ffn", ["x", "w_gate_up", "w_down", "b_gate_up", "b_down"])
