from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._attention_block import attention_weights, dense, rms_norm, turn
from ._codes import formats_of
from ._common import acc_dtype


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
    """Computes x + residual_scale * latent attention(norm(x)), and writes the latents and rotated
    keys of x into the cache."""
    acc = acc_dtype(x.dtype)
    kinds = formats_of(formats, 4 if w_q_a is not None else 3)
    end = start + x.shape[1]
    rank, rope = latents.shape[3], rope_keys.shape[3]

    def rotated(t: Tensor) -> Tensor:
        """Returns rotated [B, S, heads, d_r], in the order of the cache."""
        if interleaved:
            t = torch.cat((t[..., 0::2], t[..., 1::2]), dim=-1)
        t = turn(t, cos, sin)
        return torch.stack(t.chunk(2, dim=-1), dim=-1).flatten(-2) if interleaved_keys else t

    h = rms_norm(x.to(acc), norm_weight, eps)
    q = h
    if w_q_a is not None:
        q = rms_norm(dense(h, w_q_a, w_q_a_scale, b_q_a, kinds[3]), q_norm, latent_eps)
    q = dense(q, w_q, w_q_scale, b_q, kinds[0]).unflatten(2, (num_heads, -1))
    q_nope, q_rope = q.split((q.shape[-1] - rope, rope), dim=-1)
    latent, k_rope = dense(h, w_kv_a, w_kv_a_scale, b_kv_a, kinds[1]).split((rank, rope), dim=-1)
    latents[:, 0, start:end] = rms_norm(latent, kv_norm, latent_eps).to(latents.dtype)
    rope_keys[:, 0, start:end] = rotated(k_rope[:, :, None])[:, :, 0].to(rope_keys.dtype)

    # q . (w_k c) = (w_k^T q) . c, and a sum of w_v c is w_v times the sum of c.
    w = w_kv_b.to(acc).unflatten(0, (num_heads, -1))
    w_k, w_v = w.split((q_nope.shape[-1], w.shape[1] - q_nope.shape[-1]), dim=1)
    c, k = (t[:, 0, :end].to(acc) for t in (latents, rope_keys))
    scores = torch.einsum("bsnr,btr->bnst", torch.einsum("bsnd,ndr->bsnr", q_nope, w_k), c)
    scores = scores + torch.einsum("bsnr,btr->bnst", rotated(q_rope), k)
    weights = attention_weights(scores * scale, mask, start)
    mixed = torch.einsum("bnsr,ndr->bsnd", torch.einsum("bnst,btr->bnsr", weights, c), w_v)
    y = dense(mixed.flatten(2), w_o, w_o_scale, b_o, kinds[2])
    return (x.to(acc) + residual_scale * y).to(x.dtype)
