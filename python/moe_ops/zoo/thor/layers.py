"""THOR's layers: randomly selected feed-forward experts, without a router, in encoder and decoder.

Letters: B sequences, S tokens of each, T = B * S, H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_ops.layers import Experts, KVCache
from moe_ops.layers.self_attention import MultiHeadAttention

from ..lm.blocks import projection_entries
from ..lm.checkpoint import Entry, renamed


class RandomExperts(nn.Module):
    """Computes y = FFN_e(x), with ReLU and biases, for a given e; without it the mean of all
    experts.

    Args:
        hidden_size, intermediate_size, num_experts: H, I and E. With E = 1 it is a dense network.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int) -> None:
        super().__init__()
        self.experts = Experts(
            num_experts, hidden_size, intermediate_size, activation="relu", bias=True
        )

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Returns a tensor shaped like x [B, S, H].

        Args:
            chosen: int64 in [0, E), [B] for whole sequences or [B, S] for tokens; None: each expert
                computes every token, and their outputs are averaged.
        """
        flat, count = x.reshape(-1, x.shape[-1]), self.experts.num_experts
        if chosen is None or count == 1:
            ids = torch.arange(count, device=x.device).expand(len(flat), -1)
        else:
            per_token = chosen[:, None] if chosen.dim() == 1 else chosen
            ids = per_token.expand(x.shape[:2]).reshape(-1, 1)
        weights = torch.full(ids.shape, 1 / ids.shape[1], device=x.device)
        y: Tensor = self.experts(flat, weights, ids)
        return y.view(x.shape)


class ThorBlock(nn.Module):
    """Computes norm(x + attention(x)), in a decoder with an encoder norm(x + attention(x, memory)),
    then norm(x + ffn(x)): norms after the additions, dropout before them.

    Args:
        config: a `ThorConfig`.
        ffn: `RandomExperts` of this block, or a module called like them.
        decoder: causal.
        cross: reads an encoder's output.
    """

    def __init__(self, config: Any, ffn: nn.Module, *, decoder: bool, cross: bool) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_heads
        self.decoder = decoder
        self.dropout = nn.Dropout(config.dropout)
        self.attention = MultiHeadAttention(hidden, heads)
        self.attention_norm = nn.LayerNorm(hidden)
        self.cross_attention = MultiHeadAttention(hidden, heads) if cross else None
        self.cross_norm = nn.LayerNorm(hidden) if cross else None
        self.ffn: Any = ffn
        self.ffn_norm = nn.LayerNorm(hidden)

    def forward(
        self,
        x: Tensor,
        *,
        chosen: Tensor | None = None,
        seen: Tensor | None = None,
        cache: KVCache | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
        memory_seen: Tensor | None = None,
    ) -> Tensor:
        """Returns a tensor shaped like x [B, S, H].

        Args:
            chosen: see `RandomExperts`.
            seen, memory_seen: bool [B, S] and [B, S'], False at padding.
            cache: of the sequence itself. memory: keys and values of the encoder's output.
        """
        y = self.attention(x, causal=self.decoder, seen=seen, cache=cache)
        x = self.attention_norm(x + self.dropout(y))
        if self.cross_attention is not None:
            assert self.cross_norm is not None
            y = self.cross_attention(x, memory, seen=memory_seen)
            x = self.cross_norm(x + self.dropout(y))
        out: Tensor = self.ffn_norm(x + self.dropout(self.ffn(x, chosen)))
        return out

    def entries(self, ours: str, theirs: str) -> list[Entry]:
        """Returns the keys of published checkpoints, given both prefixes."""
        entries = projection_entries(self.attention, f"{ours}.attention", f"{theirs}.self_attn")
        norms = {"attention_norm": "self_attn_layer_norm", "ffn_norm": "final_layer_norm"}
        if self.cross_attention is not None:
            entries += projection_entries(
                self.cross_attention, f"{ours}.cross_attention", f"{theirs}.encoder_attn"
            )
            norms["cross_norm"] = "encoder_attn_layer_norm"
        for name, key in norms.items():
            entries += renamed(
                f"{ours}.{name}", f"{theirs}.{key}", {n: n for n in ("weight", "bias")}
            )
        count = self.ffn.experts.num_experts
        for layer, kinds in (("fc1", "gate_up"), ("fc2", "down")):
            for kind, letter in (("weight", "w"), ("bias", "b")):
                keys: tuple[str, ...] = (f"{theirs}.{layer}.{kind}",)
                if count > 1:
                    keys = tuple(f"{theirs}.{layer}.{e}.{kind}" for e in range(count))
                entries.append(Entry(f"{ours}.ffn.experts.{letter}_{kinds}", keys, "experts"))
        return entries
