"""JetMoE's attention experts on moe_ops.

B batch, S tokens, H hidden size, E experts, K top-k, n key-value heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.jetmoe.modeling_jetmoe import (
    JetMoeAttention,
    eager_attention_forward,
)

from moe_ops.hf.experts.forward import cast_like
from moe_ops.hf.experts.jetmoe import MoeOpsJetMoeTopKGating
from moe_ops.hf.models.cache_argument import OLDER_NAME
from moe_ops.ops import moa_attention, moe_linear_map, moe_linear_reduce, rotary

_KNOWN = "_moe_ops_is_causal"


class MoeOpsJetMoeAttention(JetMoeAttention):
    """JetMoeAttention with another forward.

    Projections are moe_linear_map and moe_linear_reduce; the attention between them is
    moa_attention if it is only causal, without padding and dropout. Otherwise the model's own
    attention function runs on repeated keys and values.
    """

    replaces = JetMoeAttention

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        if cache is None:
            cache = kwargs.pop(OLDER_NAME, None)
        assert position_embeddings is not None
        experts = self.experts
        batch, length, hidden_size = hidden_states.shape
        heads, size = self.num_key_value_heads, self.head_dim
        x = hidden_states.reshape(-1, hidden_size)
        topk_ids, _, topk_weights, _, router_logits = experts.router(x)
        w_query, w_output = experts.input_linear.weight, experts.output_linear.weight

        q = moe_linear_map(cast_like(x, w_query), w_query, topk_ids)
        q = q.view(batch, length, self.top_k, heads, size)
        k, v = self.kv_proj(hidden_states).view(batch, length, 2, heads, size).unbind(2)
        cos, sin = position_embeddings
        # transformers repeats the angles of the first half of the features, and has one row for a
        # batch with equal positions.
        cos, sin = cos[..., : size // 2], sin[..., : size // 2]
        if cos.shape[0] == 1:
            cos, sin = cos[0], sin[0]
        q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            assert self.layer_idx is not None
            k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)

        weights = None
        if self._is_plain(attention_mask, q, k, kwargs):
            out = moa_attention(
                q, k.transpose(1, 2), v.transpose(1, 2), kind="softmax", scale=self.scaling
            )
            assert isinstance(out, Tensor)  # No remainder with softmax.
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            out, weights = attend(
                self,
                q.flatten(2, 3).transpose(1, 2),
                k.repeat(1, self.top_k, 1, 1),
                v.repeat(1, self.top_k, 1, 1),
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                **kwargs,
            )
        h = out.reshape(-1, self.top_k, heads * size)
        y = moe_linear_reduce(cast_like(h, w_output), w_output, topk_weights, topk_ids)
        y = y.to(hidden_states.dtype) + experts.bias
        return y.view(batch, length, hidden_size), weights, router_logits

    def _is_plain(self, mask: Tensor | None, q: Tensor, k: Tensor, kwargs: dict[str, Any]) -> bool:
        if not self.is_causal or kwargs.get("output_attentions"):
            return False
        if (self.training and self.attention_dropout > 0) or k.shape[2] < q.shape[1]:
            return False
        if mask is None:
            # Without a mask, torch's attention aligns the queries with the first keys,
            # moa_attention with the last.
            return k.shape[2] == q.shape[1] or q.shape[1] == 1
        return _is_causal(mask, k.shape[2])


def _is_causal(mask: Tensor, num_keys: int) -> bool:
    """Returns whether a mask [B, 1, S, S_kv], bool or added to logits, hides the keys after each
    query and nothing else. The result is cached on the mask for other layers."""
    if torch.compiler.is_compiling() or not isinstance(mask, Tensor) or mask.dim() != 4:
        return False
    known = getattr(mask, _KNOWN, None)
    state = (mask._version, num_keys)
    if known is not None and known[0] == state:
        return known[1]
    length = mask.shape[2]
    answer = mask.shape[3] == num_keys
    if answer:
        seen = torch.ones(length, num_keys, dtype=torch.bool, device=mask.device)
        seen = seen.tril(num_keys - length)
        visible = mask if mask.dtype == torch.bool else mask == 0
        answer = bool((visible == seen).all())
        if answer and mask.dtype != torch.bool:
            lowest = torch.finfo(mask.dtype).min
            answer = bool((mask.masked_fill(seen, lowest) <= lowest / 2).all())
    setattr(mask, _KNOWN, (state, answer))
    return answer


Block = MoeOpsJetMoeAttention
PARTS = {"experts.router": MoeOpsJetMoeTopKGating}
