"""mla_decode: the block of multi-head latent attention (MLA) for a few new tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.formulas.attention_block import attend
from moe_ops.formulas.dense_layer import Linear, linear, rms_norm
from moe_ops.formulas.dtypes import accumulate_dtype
from moe_ops.formulas.rotary import turned
from moe_ops.weight_formats import split_formats


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
    formats: str = "float",
    product: Linear = linear,
) -> Tensor:
    """Computes :func:`moe_ops.mla_decode`; writes the new latents and rotated keys.

    All heads form one group that attends to the latents. Projections have inputs and outputs in x's
    dtype. Angles, scores, softmax and weighted sums are computed in float32 (float64 for float64).
    """
    kinds = split_formats(formats, 4 if w_q_a is not None else 3) or ()
    acc = accumulate_dtype(x.dtype)
    end, rank, rope = start + x.shape[1], latents.shape[3], rope_keys.shape[3]
    angles = [f[:, :, None, : rope // 2].to(acc) for f in (cos, sin)]

    def rotated(t: Tensor) -> Tensor:
        """Returns rotated [B, S, heads, d_r], in the order of the cache."""
        t = t.to(acc)
        if interleaved:
            pairs = t.unflatten(-1, (rope // 2, 2)).mT
        else:
            pairs = t.unflatten(-1, (2, rope // 2))
        pairs = turned(pairs, *angles)
        return (pairs.mT if interleaved_keys else pairs).flatten(-2)

    h = rms_norm(x, norm_weight, eps)
    latent, key = product(h, w_kv_a, w_kv_a_scale, b_kv_a, kinds[1]).split((rank, rope), -1)
    latents[:, 0, start:end] = rms_norm(latent, kv_norm, latent_eps)
    rope_keys[:, 0, start:end] = rotated(key.unsqueeze(2)).squeeze(2).to(rope_keys.dtype)
    if w_q_a is not None:
        h = rms_norm(product(h, w_q_a, w_q_a_scale, b_q_a, kinds[3]), q_norm, latent_eps)
    q = product(h, w_q, w_q_scale, b_q, kinds[0]).unflatten(2, (num_heads, -1))
    nope = q.shape[3] - rope

    # q . (w_k c) = (w_k^T q) . c, and a sum of w_v c is w_v times the sum of c. Heads are the batch
    # of these two GEMMs.
    w_k, w_v = w_kv_b.unflatten(0, (num_heads, -1)).tensor_split((nope,), 1)
    taken = q[..., :nope].permute(2, 0, 1, 3).flatten(1, 2) @ w_k  # [n, B S, r]
    taken = taken.unflatten(1, q.shape[:2]).transpose(0, 1).to(acc)  # [B, n, S, r]
    turned_q = rotated(q[..., nope:]).transpose(1, 2)
    c, k = (t[:, 0, :end].to(acc).mT for t in (latents, rope_keys))
    scores = taken.flatten(1, 2) @ c + turned_q.flatten(1, 2) @ k  # [B, n S, L]
    scores = (scores * scale).unflatten(1, taken.shape[1:3]).unsqueeze(1)
    mixed = attend(scores, latents[:, :, :end], mask, start).squeeze(1).to(x.dtype)
    made = mixed.transpose(0, 1).flatten(1, 2) @ w_v.mT  # [n, B S, d_v]
    made = made.unflatten(1, q.shape[:2]).permute(1, 2, 0, 3).flatten(2)
    y = product(made, w_o, w_o_scale, b_o, kinds[2])
    return torch.add(x.to(acc), y, alpha=residual_scale).to(x.dtype)
