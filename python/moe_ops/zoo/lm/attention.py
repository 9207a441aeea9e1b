"""Attention of the zoo's language models: grouped heads, and latent keys and values.

Letters: B batch, S tokens of a sequence, S_kv keys, H hidden size, n heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops.layers import KVCache
from moe_ops.layers.linear import in_inference_on_few_rows
from moe_ops.layers.rotary import Rope, Rotation
from moe_ops.ops import attention_decode, mla_decode
from moe_ops.quant.linear import dense_operands

from .checkpoint import Entry, renamed

# Told of the probabilities [B, n, S, S_kv] of a call.
Watcher = Callable[[Tensor], None]


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    watcher: Watcher | None = None,
) -> Tensor:
    """softmax(scale q k^T) v where the S queries are the last of the S_kv positions.

    Args:
        q: [B, S, n, d]. k: [B, S_kv, m, d] and v: [B, S_kv, m, d'], m a divisor of n; query head h
            reads key-value head h // (n / m).
        scale: None is d ** -0.5.
        mask: for S = 1, bool [1, 1, 1, S_kv], True where the query sees a key; None: everywhere.
        watcher: is given the probabilities, which are then computed once more for it.

    Returns:
        [B, S, n, d'].
    """
    length, keys = q.shape[1], k.shape[1]
    if watcher is not None:
        watcher(attention_probabilities(q, k, scale))
    if 1 < length < keys:
        # torch's is_causal counts from the first key, not from the last.
        mask = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=length > 1 and length == keys,
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


def _is_step(attention: nn.Module, x: Tensor, norm: nn.RMSNorm, cache: KVCache | None) -> bool:
    """Whether x + attention(norm(x)) is a step of decoding that nobody looks into."""
    modules = (norm, attention, *(m for m in attention._modules.values() if m is not None))
    return (
        type(cache) is KVCache
        and in_inference_on_few_rows(x)
        and norm.eps is not None
        and norm.weight.dtype == x.dtype
        and not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    )


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
        mask = None
        if cache is not None:
            k, v = cache.update(k, v)
            mask = cache.mask
        return self.o_proj(causal_attention(q, k, v, mask=mask, watcher=self.watcher).flatten(2))

    def step(
        self, x: Tensor, norm: nn.RMSNorm, rotation: Rotation, cache: KVCache | None
    ) -> Tensor | None:
        """x + forward(norm(x)) in one call; None where that is not what a step of decoding is."""
        if self.rope.interleaved or not _is_step(self, x, norm, cache):
            return None
        parts: dict[str, Any] = self._modules
        q, k, v, o = (dense_operands(parts[f"{n}_proj"], x.dtype) for n in "qkvo")
        if q is None or k is None or v is None or o is None or cache is None or norm.eps is None:
            return None
        batch, length, _ = x.shape
        heads = x.new_empty(()).expand(
            batch, length, k[0].shape[0] // self.head_size, self.head_size
        )
        keys, values = cache.reserve(heads, heads)
        cos, sin = rotation
        y = attention_decode(
            x,
            q[0],
            k[0],
            v[0],
            o[0],
            cos[None],
            sin[None],
            keys,
            values,
            cache.length,
            rotary_size=self.rope.size,
            scale=self.head_size**-0.5,
            norm_weight=norm.weight,
            eps=norm.eps,
            w_q_scale=q[1],
            w_k_scale=k[1],
            w_v_scale=v[1],
            w_o_scale=o[1],
            formats=[part.format for part in (q, k, v, o)],
        )
        cache.length += length
        return y

    def entries(self, ours: str, theirs: str) -> list[Entry]:
        """Keys of a Llama-like checkpoint, given both prefixes."""
        names = [f"{n}_proj.weight" for n in "qkvo"]
        return renamed(ours, theirs, dict(zip(names, names, strict=True)))


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
            y = self._in_latent_space(q_nope, q_rope, latent, k_rope, cache.mask)
        else:
            y = self._by_head(q_nope, q_rope, latent, k_rope)
        return self.o_proj(y.flatten(2))

    def step(
        self, x: Tensor, norm: nn.RMSNorm, rotation: Rotation, cache: KVCache | None
    ) -> Tensor | None:
        """x + forward(norm(x)) in one call; None where that is not what a step of decoding is."""
        if self.watcher is not None or not _is_step(self, x, norm, cache):
            return None
        parts: dict[str, Any] = self._modules
        names = {"q": "q_proj", "kv_a": "kv_a_proj", "o": "o_proj", "kv_b": "kv_b_proj"}
        norms = [self.kv_a_norm]
        if self.q_a_norm is not None:
            names |= {"q": "q_b_proj", "q_a": "q_a_proj"}
            norms.append(self.q_a_norm)
        dense = {n: dense_operands(parts[part], x.dtype) for n, part in names.items()}
        eps = norms[0].eps
        if cache is None or norm.eps is None or eps is None:
            return None
        if any(m.weight.dtype != x.dtype or m.eps != eps for m in norms):
            return None
        options: dict[str, Any] = {"formats": []}
        for name, operands in dense.items():
            if operands is None or (name == "kv_b" and operands[1] is not None):
                return None
            options[f"w_{name}"] = operands[0]
            if name != "kv_b":
                options[f"w_{name}_scale"] = operands[1]
                options["formats"].append(operands.format)
        if self.q_a_norm is not None:
            options["q_norm"] = self.q_a_norm.weight
        batch, length, _ = x.shape
        token = x.new_empty(()).expand(batch, length, 1, self.kv_rank + self.rope_size)
        latents, rope_keys = cache.reserve(*token.split((self.kv_rank, self.rope_size), dim=-1))
        y = mla_decode(
            x,
            kv_norm=self.kv_a_norm.weight,
            cos=rotation.cos[None],
            sin=rotation.sin[None],
            latents=latents,
            rope_keys=rope_keys,
            start=cache.length,
            num_heads=self.num_heads,
            scale=self.scale,
            norm_weight=norm.weight,
            eps=norm.eps,
            latent_eps=eps,
            interleaved=self.rope.interleaved,
            **options,
        )
        cache.length += length
        return y

    def _by_head(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
        kv = self.kv_b_proj(latent).view(*latent.shape[:2], self.num_heads, -1)
        k_nope, v = kv.split((self.nope_size, self.v_size), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, self.num_heads, -1)), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        return causal_attention(q, k, v, scale=self.scale, watcher=self.watcher)

    def _in_latent_space(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None
    ) -> Tensor:
        w = self.kv_b_proj.weight.view(self.num_heads, -1, self.kv_rank)
        w_k, w_v = w.split((self.nope_size, self.v_size), dim=1)
        q = torch.cat((torch.einsum("bsnd,ndr->bsnr", q_nope, w_k), q_rope), dim=-1)
        k = torch.cat((latent, k_rope), dim=-1)
        mixed = causal_attention(q, k, latent, scale=self.scale, mask=mask, watcher=self.watcher)
        return torch.einsum("bsnr,ndr->bsnd", mixed, w_v)

    def entries(self, ours: str, theirs: str) -> list[Entry]:
        """Keys of DeepSeek's checkpoints, given both prefixes."""
        names = {
            "q_proj": "q_proj",
            "q_a_proj": "q_a_proj",
            "q_a_norm": "q_a_layernorm",
            "q_b_proj": "q_b_proj",
            "kv_a_proj": "kv_a_proj_with_mqa",
            "kv_a_norm": "kv_a_layernorm",
            "kv_b_proj": "kv_b_proj",
            "o_proj": "o_proj",
        }
        there = {n: o for n, o in names.items() if getattr(self, n) is not None}
        return renamed(ours, theirs, {f"{n}.weight": f"{o}.weight" for n, o in there.items()})
