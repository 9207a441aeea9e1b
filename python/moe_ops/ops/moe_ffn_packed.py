"""moe_ffn_packed: moe_ffn with packed copies of the weights, in the order that kernels read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops import _library
from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import direct_call, plain_call, register_gradient_of
from moe_ops.ops._checks import (
    check,
    check_float,
    check_result_dtype,
    check_same_device,
    dtype_name,
    new_like,
)
from moe_ops.ops._library import register_cuda_formula, register_fake
from moe_ops.ops.gated_act import GATED_ACTIVATIONS
from moe_ops.ops.moe_ffn import check_call, options_of, with_out_dtype

_pack_experts = plain_call("pack_experts")
_moe_ffn_packed = direct_call("moe_ffn_packed")


def pack_experts(w: Tensor, *, halves: bool = False) -> Tensor:
    """Packs expert weights into the order in which this machine's kernels read them.

    The layout depends on the processor and on the release, so a copy is valid only in this process:
    do not save it. :meth:`moe_ops.layers.Experts.pack_weights` manages copies and drops outdated
    ones. CUDA kernels read unpacked weights: their copies are empty.

    Args:
        w: [E, O, K]; float64, float32, bfloat16 or float16, any strides.
        halves: True if the features are a gate half and an up half (w_gate_up of an activation with
            a gate, unless interleaved). O must then be even.

    Returns:
        uint8, one dimension, with about the number of bytes of w (O, or each of its halves, is
        rounded up to full vectors; for half-precision dtypes also K); empty for CUDA weights. It
        has no gradient.

    Raises:
        ValueError: wrong dtype or rank, or halves of an odd O.
    """
    return _pack_experts(w, halves)


def moe_ffn_packed(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    packed_gate_up: Tensor,
    packed_down: Tensor,
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
    out_dtype: torch.dtype | None = None,
    packed_only: bool = False,
) -> Tensor:
    """Computes moe_ffn for inference, with packed copies of the weights.

    Sums run in another order than in moe_ffn, so results differ by rounding (in bfloat16 also of
    the activation, on CPUs that multiply pairs of bfloat16). The original weights are
    authoritative: for every expert with tokens, 20 elements of each weight (different ones at each
    call) are compared with the copy, and if one differs, that weight is read instead of its copy.
    This detects replaced, trained or loaded weights; it may miss a write to a few elements, after
    which the caller must pack again. If a gradient is needed, and on CUDA tensors, moe_ffn runs and
    the copies are ignored.

    Args:
        x, w_gate_up, w_down: [T, H], [E, 2I, H] ([E, I, H]) and [E, H, I], see :func:`moe_ffn`.
        packed_gate_up: ``pack_experts(w_gate_up, halves=h)``, with h true for an activation with a
            gate that is not `interleaved`.
        packed_down: ``pack_experts(w_down)``.
        topk_weights, topk_ids, b_gate_up, b_down: see :func:`moe_ffn`.
        activation, interleaved, apply_router_weight_on_input: see :func:`moe_ffn`.
        alpha, limit: parameters of ``"swiglu_oai"``.
        out_dtype: see :func:`moe_ffn`.
        packed_only: True if the copies are all there is of the weights, so that a server keeps them
            in memory once. Only the shapes and the dtype of w_gate_up and w_down are used then, for
            example ``w.new_empty(1).expand(w.shape)``, and nothing is compared.

    Returns:
        [T, H] in out_dtype. A token without experts gets zeros; T = 0 gives [0, H].

    Raises:
        NotImplementedError: with packed_only, a gradient or CUDA tensors.
        ValueError: arguments that :func:`moe_ffn` rejects, or a copy with another size than that
            from pack_experts (on CUDA, copies made on the CPU are accepted). Autocast casts weights
            as in moe_ffn, and also in pack_experts: pack and call in the same autocast state.
    """
    options = options_of(
        b_gate_up, b_down, activation, interleaved, apply_router_weight_on_input, alpha, limit
    )
    if packed_only:
        options = (*with_out_dtype(options, out_dtype), True)
    elif out_dtype is not None:
        options = with_out_dtype(options, out_dtype)
    return _moe_ffn_packed(
        x, w_gate_up, w_down, packed_gate_up, packed_down, topk_weights, topk_ids, *options
    )


def _without_copies(*args: Any) -> Tensor:
    x, w_gate_up, w_down, _packed_gate_up, _packed_down, *rest, packed_only = args
    if packed_only:
        raise NotImplementedError(
            "moe_ffn_packed: packed_only must be False for gradients and on CUDA, got True; these "
            "read the weights themselves."
        )
    return torch.ops.moe_ops.moe_ffn(x, w_gate_up, w_down, *rest)


def packed_bytes_of(w: Tensor, halves: bool) -> int:
    """Returns the size of ``pack_experts(w, halves=halves)``."""
    return 0 if w.is_cuda else _panel_bytes(w, halves)


def _panel_bytes(w: Tensor, halves: bool) -> int:
    """Returns the size of a copy for the CPU."""
    num_experts, out_features, in_features = (int(n) for n in w.shape)
    name = dtype_name(w.dtype)
    return num_experts * _library.packed_expert_bytes(name, out_features, in_features, halves)


@register_fake("pack_experts")
def _unread_copy(w: Tensor, halves: bool) -> Tensor:
    op = "pack_experts"
    check_float(op, "w", w, "[E, O, K]")
    check(
        not halves or w.shape[1] % 2 == 0,
        f"{op}: w must have an even number of features to have halves, got shape {list(w.shape)}.",
    )
    return w.new_empty((packed_bytes_of(w, halves),), dtype=torch.uint8)


@register_fake("moe_ffn_packed")
def _(*args: Any) -> Tensor:
    op = "moe_ffn_packed"
    x, w_gate_up, w_down, packed_gate_up, packed_down, *rest, out_dtype, _packed_only = args
    check_call(op, x, w_gate_up, w_down, *rest)
    if out_dtype is not None:
        check_result_dtype(op, "out_dtype", out_dtype, x)
    _weights, _ids, _b_gate_up, _b_down, activation, interleaved, *_ = rest
    halves = activation in GATED_ACTIVATIONS and not interleaved
    for name, packed, w, has_halves in (
        ("packed_gate_up", packed_gate_up, w_gate_up, halves),
        ("packed_down", packed_down, w_down, False),
    ):
        size = packed_bytes_of(w, has_halves)
        sizes = (size, _panel_bytes(w, has_halves)) if w.is_cuda else (size,)
        check(
            packed.dtype == torch.uint8 and packed.dim() == 1 and packed.shape[0] in sizes,
            f"{op}: {name} must be what pack_experts makes of this weight on this machine, uint8 "
            f"[{size}], got {dtype_name(packed.dtype)} of shape {list(packed.shape)}.",
        )
    check_same_device(op, x=x, packed_gate_up=packed_gate_up, packed_down=packed_down)
    return new_like(x, out_dtype)


register_gradient_of("moe_ffn_packed", _without_copies)
register_cuda_formula("moe_ffn_packed")(_without_copies)
register_cuda_formula("pack_experts")(_unread_copy)
register_autocast("moe_ffn_packed", ["x", "w_gate_up", "w_down", "b_gate_up", "b_down"])
register_autocast("pack_experts", ["w"])
