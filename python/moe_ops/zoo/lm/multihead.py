"""Attention of the first transformers: all heads alike, biases, positions added outside of it.

Letters: B batch, S queries, S_kv keys, H hidden size, n heads, d = H / n.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops.layers import KVCache

from .attention import causal_attention
from .checkpoint import Entry, renamed

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class MultiHeadAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v of a sequence with itself or with another one.

    Parameters: q_proj, k_proj, v_proj and out_proj, each weight [H, H] and bias [H].

    Args:
        hidden_size, num_heads: H and n, a divisor of H.

    Source: Vaswani et al. 2017 (arXiv 1706.03762).
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(
                f"MultiHeadAttention: num_heads must divide hidden_size = {hidden_size}, got "
                f"{num_heads}."
            )
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(hidden_size, hidden_size) for _ in _PROJECTIONS
        )

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of a sequence [B, S_kv, H], each [B, S_kv, n, d]."""
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

    def entries(self, ours: str, theirs: str) -> list[Entry]:
        """Keys of fairseq's checkpoints, given both prefixes."""
        names = [f"{name}.{kind}" for name in _PROJECTIONS for kind in ("weight", "bias")]
        return renamed(ours, theirs, dict(zip(names, names, strict=True)))
