"""mla_decode: the block of multi-head latent attention (MLA) for a few new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moe_ops.formulas.mla_decode import mla_decode as _formula
from moe_ops.ops._attention_block import check_block, check_kept
from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import direct_call, register_no_gradient
from moe_ops.ops._checks import check, check_like, check_size, new_like
from moe_ops.ops._library import Signature, register_cuda_formula, register_fake
from moe_ops.ops._quantized import check_dense, check_names, joined, stored_linear

_OP = "mla_decode"
_mla_decode = direct_call(_OP)


def mla_decode(
    x: Tensor,
    w_q: Tensor,
    w_kv_a: Tensor,
    kv_norm: Tensor,
    w_kv_b: Tensor,
    w_o: Tensor,
    cos: Tensor,
    sin: Tensor,
    latents: Tensor,
    rope_keys: Tensor,
    start: int,
    *,
    num_heads: int,
    scale: float,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    w_q_a: Tensor | None = None,
    q_norm: Tensor | None = None,
    latent_eps: float = 1e-6,
    b_q: Tensor | None = None,
    b_q_a: Tensor | None = None,
    b_kv_a: Tensor | None = None,
    b_o: Tensor | None = None,
    w_q_scale: Tensor | None = None,
    w_q_a_scale: Tensor | None = None,
    w_kv_a_scale: Tensor | None = None,
    w_o_scale: Tensor | None = None,
    interleaved: bool = False,
    interleaved_keys: bool = False,
    mask: Tensor | None = None,
    residual_scale: float = 1.0,
    formats: str | Sequence[str] = "float",
) -> Tensor:
    """Computes a block of multi-head latent attention (MLA) for S new tokens of sequences with
    cached latents.

    ``c, k_r = w_kv_a @ norm(x)``: a latent with r features, normalized, and a rotated key with d_r
    features, which all heads share. Both are first written into `latents` and `rope_keys` at
    position `start`. Head h has the keys ``(w_kv_b[h, :d_n] @ c, k_r)`` and the values ``w_kv_b[h,
    d_n:] @ c``, and a query of d_n features and d_r rotated ones; ``y = x + residual_scale * w_o @
    attention``. A query attends to tokens up to its own.

    Per-head keys and values are never computed: queries are projected into the latent space, and
    their weighted sums out of it. It is meant for a few tokens: scores [B, n, S, start + S] are
    held at once, twice. A query's output does not depend bitwise on the contents of masked
    positions, as in :func:`attention_decode`. On CUDA tensors the formula is composed of torch
    operations, whose projections have inputs and outputs in x's dtype. There is no gradient.

    Args:
        x: [B, S, H]; float64, float32, bfloat16 or float16, any strides.
        w_q: [n (d_n + d_r), H], or [n (d_n + d_r), r_q] with `w_q_a`; of its format, like every
            weight except `w_kv_b`.
        w_kv_a: [r + d_r, H].
        kv_norm: [r] in x's dtype, weight of the RMS norm of latents.
        w_kv_b: [n (d_n + d_v), r] in x's dtype, for each head keys first.
        w_o: [H, n d_v].
        cos, sin: [B or 1, S, a] of one float dtype, a at least d_r / 2; the first d_r / 2 of a row
            are for the angles of the pairs.
        latents, rope_keys: [B, 1, L, r] and [B, 1, L, d_r] in x's dtype, contiguous in the last
            dimension, other strides free, L at least start + S; d_r is even and at least 2.
            Positions start .. start + S - 1 are written.
        start: number of tokens before x, at least 0, equal for all sequences.
        num_heads: n.
        scale: factor of the scores.
        norm_weight: [H] in x's dtype, weight of the RMS norm before the projections; None: no norm.
        eps: of that norm, at least 0.
        w_q_a: [r_q, H], down projection of low-rank queries, or None.
        q_norm: [r_q] in x's dtype, weight of an RMS norm after w_q_a, or None.
        latent_eps: of kv_norm and q_norm, at least 0.
        b_q, b_q_a, b_kv_a, b_o: in x's dtype, or None.
        w_q_scale, w_q_a_scale, w_kv_a_scale, w_o_scale: of quantized weights, otherwise None.
        interleaved: if True, rotated pairs are (2 i, 2 i + 1) in the outputs of `w_q` and `w_kv_a`;
            otherwise (i, i + d_r / 2).
        interleaved_keys: like interleaved, for `rope_keys`.
        mask: [B or 1, 1, S, start + S] bool, True if a query attends to a key, or float, added to
            scores. It replaces the causal mask: a query can attend to later tokens. None: a query
            attends to its own token and earlier ones. A query whose keys are all masked attends to
            nothing.
        residual_scale: as above.
        formats: of w_q, w_kv_a, w_o and, if given, w_q_a: one name for all, or one of each.
            "float" is x's dtype; "int8", "int4 g32", "int4 g64" or "int4 g128" as of
            :func:`moe_ffn_quantized` have scales.

    Returns:
        y [B, S, H] in x's dtype, summed in fp32 (fp64 for fp64).

    Raises:
        ValueError: wrong dtype, rank or size, numbers out of range, latents or rope_keys that
            cannot be written in place.
        NotImplementedError: if a gradient is needed.

    Source:
        DeepSeek-AI 2024, DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C.
    """
    return _mla_decode(
        x,
        w_q,
        w_kv_a,
        kv_norm,
        w_kv_b,
        w_o,
        cos,
        sin,
        latents,
        rope_keys,
        start,
        num_heads,
        scale,
        norm_weight,
        eps,
        w_q_a,
        q_norm,
        latent_eps,
        b_q,
        b_q_a,
        b_kv_a,
        b_o,
        w_q_scale,
        w_q_a_scale,
        w_kv_a_scale,
        w_o_scale,
        interleaved,
        interleaved_keys,
        mask,
        residual_scale,
        joined(formats),
    )


_names = Signature(_OP).names


@register_fake(_OP)
def _(*row: Any) -> Tensor:
    args = dict(zip(_names, row, strict=True))
    x, latents, rope_keys, heads = (args[n] for n in ("x", "latents", "rope_keys", "num_heads"))
    check_kept(_OP, args, "latents", "rope_keys")
    hidden, rank, rope = x.shape[2], latents.shape[3], rope_keys.shape[3]
    for name in ("latents", "rope_keys"):
        check_size(_OP, name, args[name], 1, 1, "the heads")
    check(
        rank >= 1,
        f"{_OP}: latents must have at least one feature, got shape {list(latents.shape)}.",
    )
    check(
        rope >= 2 and rope % 2 == 0,
        f"{_OP}: rope_keys must have an even number of features, at least 2, got shape "
        f"{list(rope_keys.shape)}.",
    )
    check(heads >= 1, f"{_OP}: num_heads must be from 1 to 2^31 - 1, got {heads}.")
    depth = hidden
    count = 3 if args["w_q_a"] is None else 4
    names = check_names(_OP, "formats", args["formats"], count)
    if args["w_q_a"] is not None:
        check_dense(_OP, args, "q_a", names[3], x, None, hidden)
        depth = args["w_q_a"].shape[0]
        check(
            depth >= 1,
            f"{_OP}: w_q_a must have at least one feature, got shape {list(args['w_q_a'].shape)}.",
        )
        check_like(_OP, "q_norm", args["q_norm"], "x", x, "[r_q]", r_q=depth)
    else:
        check(
            all(args[n] is None for n in ("q_norm", "b_q_a", "w_q_a_scale")),
            f"{_OP}: q_norm, b_q_a and w_q_a_scale must be None without w_q_a, got one.",
        )
    check_dense(_OP, args, "q", names[0], x, None, depth)
    width = args["w_q"].shape[0]
    nope = width // heads - rope
    check(
        nope >= 1 and width % heads == 0,
        f"{_OP}: w_q must have more than {rope} features for each of num_heads = {heads} heads, "
        f"got shape {list(args['w_q'].shape)}.",
    )
    check_dense(_OP, args, "kv_a", names[1], x, rank + rope, hidden)
    check_like(_OP, "kv_norm", args["kv_norm"], "x", x, "[r]", r=rank)
    w_kv_b = args["w_kv_b"]
    check_like(_OP, "w_kv_b", w_kv_b, "x", x, "[O, K]", K=rank)
    value = w_kv_b.shape[0] // heads - nope
    check(
        value >= 1 and w_kv_b.shape[0] % heads == 0,
        f"{_OP}: w_kv_b must have more than {nope} features for each of num_heads = {heads} "
        f"heads, got shape {list(w_kv_b.shape)}.",
    )
    check_dense(_OP, args, "o", names[2], x, hidden, heads * value)
    check_block(_OP, args, rope, "latent_eps")
    return new_like(x)


@register_cuda_formula("mla_decode")
def _(*row: Any) -> Tensor:
    rest = dict(zip(_names[11:], row[11:], strict=True))
    return _formula(*row[:11], **rest, product=stored_linear)


register_no_gradient(_OP, "use the modules that it stands for")
register_autocast(_OP)
