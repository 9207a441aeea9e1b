"""gated_mlp_decode: a dense gated MLP for a few tokens, with the norm before and the residual after
it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moe_ops.formulas.gated_mlp_decode import gated_mlp_decode as _formula
from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import direct_call, register_no_gradient
from moe_ops.ops._checks import (
    check,
    check_choice,
    check_float,
    check_like,
    check_same_device,
)
from moe_ops.ops._library import Signature, register_cuda_formula, register_fake
from moe_ops.ops._quantized import check_dense, check_names, joined, stored_linear

_OP = "gated_mlp_decode"
_ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "reglu")
_gated_mlp_decode = direct_call(_OP)


def gated_mlp_decode(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    w_gate_scale: Tensor | None = None,
    w_up_scale: Tensor | None = None,
    w_down_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    output_gate: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    activation: str = "swiglu",
    formats: str | Sequence[str] = "float",
) -> Tensor:
    """Computes a dense gated MLP, or shared experts, in a decode step.

    ``y = residual + residual_scale * g * w_down @ (act(w_gate @ h) * (w_up @ h))`` with ``h =
    norm(x)`` and ``g = sigmoid(output_gate @ h)``; terms of omitted arguments are dropped. On the
    CPU its GEMMs share one parallel region; it is meant for a few tokens. On CUDA tensors the
    formula is composed of torch operations, whose GEMMs have inputs and outputs in x's dtype. There
    is no gradient.

    Args:
        x: [T, H]; float64, float32, bfloat16 or float16, any strides.
        w_gate, w_up: [I, H], each of its format.
        w_down: [O, I], of its format.
        w_gate_scale, w_up_scale, w_down_scale: of quantized weights, otherwise None.
        norm_weight: [H] in x's dtype, weight of an RMS norm before the GEMMs, or None.
        eps: of that norm, at least 0.
        output_gate: [H] in x's dtype, or None.
        residual: [T, O] in x's dtype, or None.
        residual_scale: finite.
        activation: of the gate: "swiglu" (silu), "geglu", "geglu_tanh" or "reglu".
        formats: of w_gate, w_up and w_down: one name for all, or one of each.
            "float" is x's dtype; "int8", "int4 g32", "int4 g64" or "int4 g128" as of
            :func:`moe_ffn_quantized` have scales.

    Returns:
        y [T, O] in x's dtype, summed in fp32 (fp64 for fp64).

    Raises:
        ValueError: wrong dtype, rank or size, numbers out of range, an unknown activation.
        NotImplementedError: if a gradient is needed.

    Source:
        Shazeer 2020, GLU Variants Improve Transformer, arXiv 2002.05202.
    """
    return _gated_mlp_decode(
        x,
        w_gate,
        w_up,
        w_down,
        w_gate_scale,
        w_up_scale,
        w_down_scale,
        norm_weight,
        eps,
        output_gate,
        residual,
        residual_scale,
        activation,
        joined(formats),
    )


_names = Signature(_OP).names


@register_fake(_OP)
def _(*row: Any) -> Tensor:
    args = dict(zip(_names, row, strict=True))
    x = args["x"]
    check_float(_OP, "x", x, "[T, H]")
    tokens, hidden = x.shape
    check_choice(_OP, "activation", args["activation"], _ACTIVATIONS)
    names = check_names(_OP, "formats", args["formats"], 3)
    check_dense(_OP, args, "gate", names[0], x, None, hidden)
    width, features = args["w_gate"].shape[0], args["w_down"].shape[0]
    check_dense(_OP, args, "up", names[1], x, width, hidden)
    check_dense(_OP, args, "down", names[2], x, None, width)
    for name in ("norm_weight", "output_gate"):
        check_like(_OP, name, args[name], "x", x, "[H]", H=hidden)
    check_like(_OP, "residual", args["residual"], "x", x, "[T, O]", T=tokens, O=features)
    check(args["eps"] >= 0, f"{_OP}: eps must be at least 0, got {args['eps']}.")
    scale = args["residual_scale"]
    check(math.isfinite(scale), f"{_OP}: residual_scale must be finite, got {scale}.")
    check_same_device(_OP, **{n: t for n, t in args.items() if isinstance(t, Tensor)})
    return x.new_empty((tokens, features))


@register_cuda_formula("gated_mlp_decode")
def _(*row: Any) -> Tensor:
    rest = dict(zip(_names[4:], row[4:], strict=True))
    return _formula(*row[:4], **rest, product=stored_linear)


register_no_gradient(_OP, "use the modules that it stands for")
register_autocast(_OP, ["x", "w_gate", "w_up", "w_down", "norm_weight", "output_gate", "residual"])
