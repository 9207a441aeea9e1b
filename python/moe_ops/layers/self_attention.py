"""Attention of all tokens, without experts: grouped heads, latent keys and values, and the heads of
the first transformers.

Letters: B batch, S tokens of a sequence, S_kv keys, H hidden size, n heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._fields import check_divides

from .attention import KVCache
from .rotary import Rope, Rotation

# Told of the probabilities [B, n, S, S_kv] of a call.
Watcher = Callable[[Tensor], None]


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    watcher: Watcher | None = None,
) -> Tensor:
    """softmax(scale q k^T) v where the S queries are the last of the S_kv positions.

    Args:
        q: [B, S, n, d]. k: [B, S_kv, m, d] and v: [B, S_kv, m, d'], m a divisor of n; query head h
            reads key-value head h // (n / m).
        scale: None is d ** -0.5.
        window: number of positions that a query attends to, its own included; None is all.
        watcher: is given the probabilities, which are then computed once more for it.

    Returns:
        [B, S, n, d'].
    """
    length, keys = q.shape[1], k.shape[1]
    if watcher is not None:
        watcher(attention_probabilities(q, k, scale))
    mask = None
    windowed = window is not None and keys > window
    if 1 < length < keys or windowed:
        # torch's is_causal counts from the first key, not from the last.
        mask = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
        if window is not None:
            mask = mask.triu(keys - length - window + 1)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=length > 1 and mask is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)


def attention_probabilities(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """The softmax of `causal_attention`, [B, n, S, S_kv] fp32."""
    length, keys = q.shape[1], k.shape[1]
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bsnd,btnd->bnst", q.float(), k.float())
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


class Attention(nn.Module):
    """Causal attention with RoPE, as in Llama.

    Parameters: q_proj [n d, H], k_proj and v_proj [m d, H], o_proj [H, n d], no biases.

    Args:
        hidden_size, num_heads, head_size: H, n, d.
        rope: positions; its size is d.
        num_kv_heads: m, a divisor of n; None is n.
    """

    watcher: Watcher | None = None  # Of its probabilities; may be set any time.

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_size: int,
        rope: Rope,
        *,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                f"Attention: num_kv_heads must divide num_heads = {num_heads}, got {num_kv_heads}."
            )
        self.head_size = head_size
        self.rope = rope
        self.q_proj = nn.Linear(hidden_size, num_heads * head_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_size, bias=False)
        self.o_proj = nn.Linear(num_heads * head_size, hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, cache: KVCache | None = None) -> Tensor:
        """x [B, S, H] to [B, S, H]; keys and values of x are appended to the cache."""
        heads = (*x.shape[:2], -1, self.head_size)
        q, k, v = (p(x).view(heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rope.rotate(q, rotation), self.rope.rotate(k, rotation)
        if cache is not None:
            k, v = cache.update(k, v)
        return self.o_proj(causal_attention(q, k, v, watcher=self.watcher).flatten(2))


class LatentAttention(nn.Module):
    """Multi-head latent attention: keys and values of all heads from one small vector a token.

    c = norm(W_a x) [r] and a rotated key k_r [d_r], shared by the heads, are all that the cache
    holds. Head h has the key (W_k^h c, k_r) and the value W_v^h c; queries have a part for each.
    A step of decoding is computed in the space of c: W_k^h goes to the query and W_v^h to the
    output, and no key or value is made.

    Parameters: q_proj, or q_a_proj, q_a_norm and q_b_proj with `q_rank`; kv_a_proj [r + d_r, H],
    kv_a_norm [r], kv_b_proj [n (d_n + d_v), r] (of each head keys first), o_proj [H, n d_v].

    Args:
        hidden_size, num_heads: H, n.
        q_rank: width of the queries' own bottleneck, None for none.
        kv_rank: r.
        nope_size, rope_size, v_size: d_n and d_r, features of a key without and with position, and
            d_v.
        rope: its size is d_r; its `yarn` also scales the softmax.

    Source: DeepSeek-AI 2024 (DeepSeek-V2, arXiv 2405.04434), section 2.1.
    """

    watcher: Watcher | None = None  # Of its probabilities; may be set any time.

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        q_rank: int | None,
        kv_rank: int,
        nope_size: int,
        rope_size: int,
        v_size: int,
        rope: Rope,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.nope_size = nope_size
        self.rope_size = rope_size
        self.v_size = v_size
        self.kv_rank = kv_rank
        self.rope = rope
        self.scale = (nope_size + rope_size) ** -0.5
        if rope.yarn is not None:
            self.scale *= rope.yarn.softmax_factor()
        q_width = num_heads * (nope_size + rope_size)
        self.q_proj: nn.Linear | None = None
        self.q_a_proj: nn.Linear | None = None
        self.q_a_norm: nn.RMSNorm | None = None
        self.q_b_proj: nn.Linear | None = None
        if q_rank is None:
            self.q_proj = nn.Linear(hidden_size, q_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_rank, bias=False)
            self.q_a_norm = nn.RMSNorm(q_rank, eps=eps)
            self.q_b_proj = nn.Linear(q_rank, q_width, bias=False)
        self.kv_a_proj = nn.Linear(hidden_size, kv_rank + rope_size, bias=False)
        self.kv_a_norm = nn.RMSNorm(kv_rank, eps=eps)
        self.kv_b_proj = nn.Linear(kv_rank, num_heads * (nope_size + v_size), bias=False)
        self.o_proj = nn.Linear(num_heads * v_size, hidden_size, bias=False)

    @classmethod
    def of(cls, config: Any, rope: Rope) -> LatentAttention:
        """From the fields of a config that are called like the arguments."""
        names = ("q_rank", "kv_rank", "nope_size", "rope_size", "v_size")
        sizes = {name: getattr(config, name) for name in names}
        return cls(config.hidden_size, config.num_heads, rope=rope, **sizes)

    def forward(self, x: Tensor, rotation: Rotation, cache: KVCache | None = None) -> Tensor:
        """x [B, S, H] to [B, S, H]; c and k_r of x are appended to the cache."""
        batch, length, _ = x.shape
        if self.q_proj is not None:
            q = self.q_proj(x)
        else:
            assert self.q_a_proj is not None
            assert self.q_a_norm is not None and self.q_b_proj is not None
            q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q = q.view(batch, length, self.num_heads, -1)
        q_nope, q_rope = q.split((self.nope_size, self.rope_size), dim=-1)
        q_rope = self.rope.rotate(q_rope, rotation)
        latent, k_rope = self.kv_a_proj(x).split((self.kv_rank, self.rope_size), dim=-1)
        latent = self.kv_a_norm(latent).unsqueeze(2)
        k_rope = self.rope.rotate(k_rope.unsqueeze(2), rotation)
        if cache is not None:
            latent, k_rope = cache.update(latent, k_rope)
        if cache is not None and length == 1:
            y = self._in_latent_space(q_nope, q_rope, latent, k_rope)
        else:
            y = self._by_head(q_nope, q_rope, latent, k_rope)
        return self.o_proj(y.flatten(2))

    def _by_head(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
        kv = self.kv_b_proj(latent).view(*latent.shape[:2], self.num_heads, -1)
        k_nope, v = kv.split((self.nope_size, self.v_size), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, self.num_heads, -1)), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        return causal_attention(q, k, v, scale=self.scale, watcher=self.watcher)

    def _in_latent_space(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor
    ) -> Tensor:
        w = self.kv_b_proj.weight.view(self.num_heads, -1, self.kv_rank)
        w_k, w_v = w.split((self.nope_size, self.v_size), dim=1)
        q = torch.cat((torch.einsum("bsnd,ndr->bsnr", q_nope, w_k), q_rope), dim=-1)
        k = torch.cat((latent, k_rope), dim=-1)
        mixed = causal_attention(q, k, latent, scale=self.scale, watcher=self.watcher)
        return torch.einsum("bsnr,ndr->bsnd", mixed, w_v)


class MultiHeadAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v of a sequence with itself or with another one.

    Parameters: q_proj, k_proj, v_proj and out_proj, each weight [H, H] and bias [H].

    Args:
        hidden_size, num_heads: H and n, a divisor of H.

    Source: Vaswani et al. 2017 (arXiv 1706.03762).
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        check_divides("MultiHeadAttention", "num_heads", num_heads, "hidden_size", hidden_size)
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(hidden_size, hidden_size) for _ in range(4)
        )

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values of a sequence [B, S_kv, H], each [B, S_kv, n, d]."""
        k, v = self.k_proj(x), self.v_proj(x)
        return k.unflatten(-1, (self.num_heads, -1)), v.unflatten(-1, (self.num_heads, -1))

    def forward(
        self,
        x: Tensor,
        keys_values: tuple[Tensor, Tensor] | None = None,
        *,
        causal: bool = False,
        seen: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x [B, S, H] to [B, S, H].

        Args:
            keys_values: of another sequence; None: of x.
            causal: the S queries are the last of the S_kv positions, and see none after them.
            seen: bool [B, S_kv], True where a key may be seen: in every row one or more. Padding
                at the end of a causal sequence needs none.
            cache: keys and values of x are appended to it, and all it holds are seen.
        """
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1))
        k, v = self.keys_values(x) if keys_values is None else keys_values
        if cache is not None:
            k, v = cache.update(k, v)
        if causal:
            y = causal_attention(q, k, v)
        else:
            mask = None if seen is None else seen[:, None, None]
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        out: Tensor = self.out_proj(y.flatten(2))
        return out


class JointAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v of a sequence with itself, with q, k and v of one product.

    Parameters: qkv [3 n d, H], with a bias if there is one, and out, likewise, [H, n d].

    Args:
        hidden_size, num_heads: H and n.
        head_size: d; None is H / n.
        bias, out_bias: of the two maps.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_size: int | None = None,
        *,
        bias: bool = False,
        out_bias: bool = True,
    ) -> None:
        super().__init__()
        inner = num_heads * (head_size or hidden_size // num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * inner, bias=bias)
        self.out = nn.Linear(inner, hidden_size, bias=out_bias)

    def forward(self, x: Tensor, *, causal: bool = False, dropout: float = 0.0) -> Tensor:
        """x [B, S, H] to [B, S, H]; dropout is of the softmax, whether training or not."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out
