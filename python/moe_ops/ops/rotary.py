"""rotary: rotary position embeddings of queries or keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_ops.formulas.rotary import rotary as _formula
from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import direct_call, register_autograd
from moe_ops.ops._checks import check, check_float, check_same_device, check_shape, new_like
from moe_ops.ops._library import register_cuda_formula, register_fake

_rotary = direct_call("rotary")


def rotary(t: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotates the pairs of features i and i + d / 2 of each head by the angles of their token.

    ``out[i] = t[i] cos[i] - t[i + d / 2] sin[i]`` and ``out[i + d / 2] = t[i + d / 2] cos[i] + t[i]
    sin[i]``: rotated halves, as in Llama and JetMoE. On CUDA tensors the formula is composed of
    torch operations, which a compiler fuses. Compiled CPU code calls the op, because fused code
    would recompute the angles for every head.

    Args:
        t: [B, S, ..., d], d even; float64, float32, bfloat16 or float16, any strides. Tokens that
            are dense, as in a view of stored keys and values, are read in place.
        cos, sin: of the angles, [S, d / 2] or [B, S, d / 2] in any float dtype; used in fp32 (fp64
            for fp64), without a gradient.
        inverse: rotate by minus the angles, as the gradient does.

    Returns:
        Like t, contiguous, computed in fp32 (fp64 for fp64). Differentiable any number of times.

    Raises:
        ValueError: wrong dtype, rank or size.

    Source:
        Su et al. 2021, RoFormer, arXiv 2104.09864.
    """
    if t.is_cuda:
        _check("rotary", t, cos, sin)
        return _formula(t, cos, sin, inverse=inverse)
    return _rotary(t, cos, sin, inverse)


def _check(op: str, t: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_float(op, "t", t)
    check(
        t.dim() >= 3 and t.shape[-1] % 2 == 0,
        f"{op}: t must be [B, S, ..., d] with an even d, got shape {list(t.shape)}.",
    )
    for name, f in (("cos", cos), ("sin", sin)):
        check_float(op, name, f)
        check(
            f.dim() in (2, 3),
            f"{op}: {name} must be [S, d / 2] or [B, S, d / 2], got shape {list(f.shape)}.",
        )
        sizes = {"S": t.shape[1], "d / 2": t.shape[-1] // 2}
        if f.dim() == 2:
            check_shape(op, name, f, "[S, d / 2]", **sizes)
        else:
            check_shape(op, name, f, "[B, S, d / 2]", B=t.shape[0], **sizes)
    check(
        sin.dim() == cos.dim(),
        f"{op}: sin must be like cos ({cos.dim()} dimensions), got shape {list(sin.shape)}.",
    )
    check_same_device(op, t=t, cos=cos, sin=sin)


@register_fake("rotary")
def _(t: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    _check("rotary", t, cos, sin)
    return new_like(t)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, inverse = inputs
    ctx.save_for_backward(cos, sin)
    ctx.inverse = inverse


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    cos, sin = ctx.saved_tensors
    return _rotary(grad, cos, sin, not ctx.inverse), None, None, None


register_autograd("rotary", _backward, _setup)
register_autocast("rotary")


@register_cuda_formula("rotary")
def _(t: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return _formula(t, cos, sin, inverse=inverse)
