"""attention_decode: the attention block of a decoder layer for a few new tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_ops._private_torch import has_kernel
from moe_ops.formulas.attention_decode import attention_decode as _formula
from moe_ops.ops._attention_block import check_block, check_kept
from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import direct_call, register_no_gradient
from moe_ops.ops._checks import check, check_like, check_size, new_like
from moe_ops.ops._library import Signature, register_cuda_formula, register_fake
from moe_ops.ops._quantized import check_dense, check_names, joined, stored_linear

_OP = "attention_decode"
# Of the CUDA kernel: tokens of a sequence per call, and features of a head
# (csrc/include/moe_ops/attend_decode.h).
_MAX_TOKENS = 16
_MAX_HEAD_SIZE = 512
_attention_decode = direct_call(_OP)


def attention_decode(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    *,
    rotary_size: int,
    scale: float,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    b_o: Tensor | None = None,
    w_q_scale: Tensor | None = None,
    w_k_scale: Tensor | None = None,
    w_v_scale: Tensor | None = None,
    w_o_scale: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    head_eps: float = 1e-6,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    residual_scale: float = 1.0,
    formats: str | Sequence[str] = "float",
) -> Tensor:
    """Computes an attention block for S new tokens of sequences with a KV cache.

    ``y = x + residual_scale * w_o @ attention(q, k, v)`` with q, k and v projections of
    ``norm(x)``, q and k normalized and rotated. The keys and values of x are first written into
    `keys` and `values` at position `start`; a query attends to positions up to its own. This is a
    layer's attention in a decode step, in one call; on the CPU its GEMMs share one parallel region.
    It is meant for a few tokens: scores [B, n, S, start + S] are held at once.

    A query's output does not depend bitwise on the contents of masked positions (later tokens
    without a mask; otherwise False or -inf in the mask), including infinities and NaN, whether
    these are cached positions or tokens of the call. On CUDA tensors torch operations
    compute the projections, with inputs and outputs in x's dtype, and three kernels what is between
    them, for up to 16 tokens per sequence and d up to 512; torch operations otherwise. There is no
    gradient.

    Args:
        x: [B, S, H]; float64, float32, bfloat16 or float16, any strides.
        w_q, w_k, w_v: [n d, H], [m d, H] and [m d, H], m a divisor of n; each of its format.
        w_o: [H, n d], of its format.
        cos, sin: [B or 1, S, r] of one float dtype, r at least rotary_size / 2; the first
            rotary_size / 2 of a row are for the angles of the pairs (i, i + rotary_size / 2).
        keys, values: [B, m, L, d] in x's dtype, contiguous in the last dimension, other strides
            free, L at least start + S. Positions start .. start + S - 1 are written.
        start: number of tokens before x, at least 0, equal for all sequences.
        rotary_size: number of rotated features per head, even, from 0 to d.
        scale: factor of the scores.
        norm_weight: [H] in x's dtype, weight of the RMS norm before the projections; None: no norm.
        eps: of that norm, at least 0.
        b_q, b_k, b_v, b_o: in x's dtype, or None.
        w_q_scale, w_k_scale, w_v_scale, w_o_scale: of quantized weights, otherwise None.
        q_norm, k_norm: weights of RMS norms of q and k in x's dtype, both or neither: [d] per head,
            or [n d] and [m d] per token.
        head_eps: of these norms.
        mask: [B or 1, 1, S, start + S] bool, True if a query attends to a key, or float, added to
            scores. It replaces the causal mask: a query can attend to later tokens. None: a query
            attends to its own token and earlier ones. A query whose keys are all masked attends to
            nothing.
        sinks: [n] in x's dtype, a score per head that takes part in softmax and has no value.
        residual_scale: as above.
        formats: of w_q, w_k, w_v and w_o: one name for all, or one of each.
            "float" is x's dtype; "int8", "int4 g32", "int4 g64" or "int4 g128" as of
            :func:`moe_ffn_quantized` have scales.

    Returns:
        y [B, S, H] in x's dtype, summed in fp32 (fp64 for fp64).

    Raises:
        ValueError: wrong dtype, rank or size, numbers out of range, keys or values that cannot be
            written in place.
        NotImplementedError: if a gradient is needed.

    Source:
        Ainslie et al. 2023, GQA: Training Generalized Multi-Query Transformer Models, arXiv
        2305.13245; Xiao et al. 2023 for sinks, arXiv 2309.17453.
    """
    return _attention_decode(
        x,
        w_q,
        w_k,
        w_v,
        w_o,
        cos,
        sin,
        keys,
        values,
        start,
        rotary_size,
        scale,
        norm_weight,
        eps,
        b_q,
        b_k,
        b_v,
        b_o,
        w_q_scale,
        w_k_scale,
        w_v_scale,
        w_o_scale,
        q_norm,
        k_norm,
        head_eps,
        mask,
        sinks,
        residual_scale,
        joined(formats),
    )


_names = Signature(_OP).names


@register_fake(_OP)
def _(*row: Any) -> Tensor:
    args = dict(zip(_names, row, strict=True))
    x, keys, values = (args[n] for n in ("x", "keys", "values"))
    check_kept(_OP, args, "keys", "values")
    hidden = x.shape[2]
    _, kv_heads, _, size = keys.shape
    check_size(_OP, "values", values, 1, kv_heads, "m")
    check_size(_OP, "values", values, 3, size, "d")
    check(
        kv_heads >= 1 and size >= 1,
        f"{_OP}: keys must have at least one head of at least one feature, got shape "
        f"{list(keys.shape)}.",
    )
    kv_width, q_width = kv_heads * size, args["w_q"].shape[0]
    names = check_names(_OP, "formats", args["formats"], 4)
    check_dense(_OP, args, "q", names[0], x, None, hidden)
    check(
        q_width > 0 and q_width % kv_width == 0,
        f"{_OP}: w_q must have a multiple of m d = {kv_width} features, got shape "
        f"{list(args['w_q'].shape)}.",
    )
    check_dense(_OP, args, "k", names[1], x, kv_width, hidden)
    check_dense(_OP, args, "v", names[2], x, kv_width, hidden)
    check_dense(_OP, args, "o", names[3], x, hidden, q_width)
    q_norm, k_norm = args["q_norm"], args["k_norm"]
    check(
        (q_norm is None) == (k_norm is None),
        f"{_OP}: q_norm and k_norm must be given together, got one.",
    )
    if q_norm is not None:
        of_heads = q_norm.dim() != 1 or q_norm.shape[0] == size
        for name, t, width in (("q_norm", q_norm, q_width), ("k_norm", k_norm, kv_width)):
            check_like(_OP, name, t, "x", x, "[d]", d=size if of_heads else width)
    rotary_size = args["rotary_size"]
    check(
        0 <= rotary_size <= size and rotary_size % 2 == 0,
        f"{_OP}: rotary_size must be even and from 0 to d = {size}, got {rotary_size}.",
    )
    check_like(_OP, "sinks", args["sinks"], "x", x, "[n]", n=q_width // size)
    check_block(_OP, args, rotary_size, "head_eps")
    return new_like(x)


@register_cuda_formula("attention_decode")
def _(*row: Any) -> Tensor:
    args = dict(zip(_names, row, strict=True))
    kernel = _attend_kernel(args["x"], args["keys"])
    rest = dict(zip(_names[10:], row[10:], strict=True))
    return _formula(*row[:10], **rest, attend_heads=kernel, product=stored_linear)


def _attend_kernel(x: Tensor, keys: Tensor) -> Callable[..., Tensor] | None:
    """Returns the kernel that attends, None where torch operations do: in a library without CUDA
    kernels, for large heads, and for many tokens, of which GEMMs read a key once."""
    if x.shape[1] > _MAX_TOKENS or keys.shape[3] > _MAX_HEAD_SIZE:
        return None
    if not hasattr(torch.ops.moe_ops_cuda, "attend_decode"):
        return None
    if not has_kernel("moe_ops_cuda::attend_decode", x.device.type):
        return None
    kernel: Callable[..., Tensor] = torch.ops.moe_ops_cuda.attend_decode.default
    return kernel


register_no_gradient(_OP, "use the modules that it stands for")
register_autocast(_OP)
