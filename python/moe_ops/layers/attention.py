"""Mixture-of-attention experts: per-expert queries and outputs, shared keys and values.

Letters: B batch, S tokens per sequence, T = B * S, H hidden size, E experts, K experts per token, n
key-value heads, d head size, D = n * d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from moe_ops.ops import moa_attention, moe_linear_map, moe_linear_reduce, rotary
from moe_ops.ops._checks import check_positive
from moe_ops.ops.moa_attention import KINDS

from .expert_ops import layers as expert_ops
from .functional import apply_linear
from .inputs import jagged_parts, leaf_of_fx, values_of
from .losses import aux_losses_of, check_aux_losses
from .rotary import Rope
from .router import Router
from .routing import Routing, check_given, drop_masked, given_routing, valid_ids


class KVCache:
    """Keys and values of past tokens, for :class:`AttentionExperts`; for inference.

    Memory doubles when it is full, so most decode steps copy only their own tokens.

    Attributes:
        length: number of stored tokens.
    """

    def __init__(self) -> None:
        self.length = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k and v [B, S, n, d]; returns all of them [B, length, n, d], as views.

        v may have another n and d than k (multi-head latent attention stores a latent vector and a
        rotated key of different sizes).

        Raises:
            ValueError: a batch, number of heads or head size that differs from the stored ones, or
                v with another batch or number of tokens than k.
        """
        start, end = self.length, self.length + k.shape[1]
        if v.shape[:2] != k.shape[:2]:
            raise ValueError(
                f"KVCache: v must have B, S = {list(k.shape[:2])} like k, got shape "
                f"{list(v.shape)}."
            )
        if self._buffers is not None:
            for name, t, held in zip("kv", (k, v), self._buffers, strict=True):
                if (held.shape[0], held.shape[1], held.shape[3]) != (*t.shape[:1], *t.shape[2:]):
                    raise ValueError(
                        f"KVCache: {name} must be [{held.shape[0]}, S, {held.shape[1]}, "
                        f"{held.shape[3]}] like what it holds, got shape {list(t.shape)}."
                    )
        buffers = self.reserve(k, v)
        for buffer, t in zip(buffers, (k, v), strict=True):
            buffer[:, :, start:end] = t.transpose(1, 2)
        self.length = end
        k, v = (buffer[:, :, :end].transpose(1, 2) for buffer in buffers)
        return k, v

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Returns the positions of the next `length` tokens, fp32."""
        start = self.length
        return torch.arange(start, start + length, dtype=torch.float32, device=device)

    def shown(self) -> tuple[Tensor, Tensor]:
        """Returns the stored keys and values, [B, n, length, d], as views."""
        assert self._buffers is not None, "an empty cache"
        k, v = self._buffers
        return k[:, :, : self.length], v[:, :, : self.length]

    def reserve(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the memory [B, n, L, d] of keys and of values, with room for k and v after the
        first `length` tokens. The caller writes them there and increases `length`."""
        start, end = self.length, self.length + k.shape[1]
        if self._buffers is None or end > self._buffers[0].shape[2]:
            capacity = max(end, 2 * start, 64)
            grown = tuple(t.new_empty(len(t), t.shape[2], capacity, t.shape[3]) for t in (k, v))
            if self._buffers is not None:
                for new, old in zip(grown, self._buffers, strict=True):
                    new[:, :, :start] = old[:, :, :start]
            self._buffers = grown[0], grown[1]
        return self._buffers

    def select(self, rows: Tensor) -> None:
        """Keeps these sequences, int64 in [0, B), in this order; sequences may be repeated or
        dropped."""
        if self._buffers is not None:
            k, v = (buffer.index_select(0, rows) for buffer in self._buffers)
            self._buffers = k, v


class AttentionExpertsOutput(NamedTuple):
    """Output of `AttentionExperts` with `return_routing=True`.

    y: [B, S, H] in the dtype of x.
    router_logits: [T, E]; None if both ids and weights were given.
    topk_weights: [T, K] float.
    topk_ids: [T, K] int; -1 marks an empty slot.
    aux_losses: name -> scalar, unscaled and differentiable, for the losses of the layer.
    remainder: [B, S, K, n] with kind="stick_breaking" ([B, S, E, n] with `expert_kv`), else None.
    """

    y: Tensor
    router_logits: Tensor | None
    topk_weights: Tensor
    topk_ids: Tensor
    aux_losses: dict[str, Tensor]
    remainder: Tensor | None

    @property
    def routing(self) -> Routing:
        return Routing(self.router_logits, self.topk_weights, self.topk_ids)


class AttentionExperts(nn.Module):
    """Attention layer y = sum_k weight_k * W_output[e_k] attention(W_query[e_k] x, K, V) + bias.

    An expert consists of the query and output projections of n heads. Keys and values belong to the
    layer and are shared by a token's K experts (Mixture of Attention Heads, arXiv 2210.05144;
    JetMoE, arXiv 2404.07413; ModuleFormer, arXiv 2306.04640, with kind="stick_breaking" and no
    RoPE). The router runs once, for both queries and outputs.

    Parameters:
        w_query: [E, D, H]. w_output: [E, H, D].
        kv_proj.weight: [2D, H], keys first ([2ED, H] with `expert_kv`); kv_proj.bias, `kv_bias`.
        bias: [H], with `bias=True`.

    Args:
        router: selects experts; defines hidden_size and num_experts of the layer.
        num_kv_heads: n.
        head_size: d, from 1 to 256; even with `rope_theta`.
        kind: "softmax" or "stick_breaking", see `moe_ops.moa_attention`.
        causal, scale, window, softcap: see `moe_ops.moa_attention`.
        rope_theta: base of the rotary position embeddings of queries and keys (rotated halves, as
            in Llama and JetMoE); None: no position embedding.
        soft_routing: every token uses all experts with weights softmax(router logits) (BAM, arXiv
            2408.08274). The router's selection method is not used.
        expert_kv: every expert has its own keys and values (BAM). All tokens are projected for all
            experts, and attention runs for all experts: intended for soft routing.
        bias: adds an output bias. kv_bias: adds a bias of keys and values.
        aux_losses: losses to compute when routing is returned, see `MoE`.
        device, dtype: of all parameters except the router's.

    Initialization: weights uniform in +-1/sqrt(inputs) like nn.Linear, biases 0.

    Raises:
        ValueError: an invalid size, kind or loss.
    """

    loss_group: Any = None  # Process group of the tokens in `aux_losses`; may be set at any time.

    def __init__(
        self,
        router: Router,
        num_kv_heads: int,
        head_size: int,
        *,
        kind: str = "softmax",
        causal: bool = True,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        rope_theta: float | None = None,
        soft_routing: bool = False,
        expert_kv: bool = False,
        bias: bool = False,
        kv_bias: bool = False,
        aux_losses: Sequence[str] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("AttentionExperts", num_kv_heads=num_kv_heads)
        if not 1 <= head_size <= 256 or (rope_theta is not None and head_size % 2):
            even = " and even with rope_theta" if rope_theta is not None else ""
            raise ValueError(
                f"AttentionExperts: head_size must be from 1 to 256{even}, got {head_size}."
            )
        if kind not in KINDS:
            raise ValueError(
                f'AttentionExperts: kind must be "softmax" or "stick_breaking", got "{kind}".'
            )
        if router.apply_router_weight_on_input:
            raise ValueError(
                "AttentionExperts: router must weight outputs, got apply_router_weight_on_input."
            )
        check_aux_losses("AttentionExperts", aux_losses)
        self.router = router
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.kind = kind
        self.causal = causal
        self.scale = scale
        self.window = window
        self.softcap = softcap
        self.rope_theta = rope_theta
        self.soft_routing = soft_routing
        self.expert_kv = expert_kv
        self.aux_losses = tuple(aux_losses)
        width, hidden, experts = num_kv_heads * head_size, router.hidden_size, router.num_experts
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.w_query = nn.Parameter(torch.empty(experts, width, hidden, **where))
        self.w_output = nn.Parameter(torch.empty(experts, hidden, width, **where))
        kv_width = 2 * width * (experts if expert_kv else 1)
        self.kv_proj = nn.Linear(hidden, kv_width, bias=kv_bias, **where)
        self.bias = nn.Parameter(torch.empty(hidden, **where)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for w in (self.w_query, self.w_output, self.kv_proj.weight):
                bound = w.shape[-1] ** -0.5
                w.uniform_(-bound, bound)
            for b in (self.bias, self.kv_proj.bias):
                if b is not None:
                    b.zero_()

    @leaf_of_fx
    def forward(
        self,
        x: Tensor,
        *,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        topk_ids: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        add_bias: bool = True,
        return_routing: bool = False,
    ) -> Tensor | AttentionExpertsOutput:
        """Computes the layer's output: a tensor, or an AttentionExpertsOutput with
        `return_routing=True`.

        Args:
            x: [B, S, H] in the dtype of the parameters (any under autocast). Jagged [B, j*, H]
                (torch.nested) represents concatenated sequences and their `cu_seqlens`; y and
                remainder are then jagged, and other per-token arguments may be.
            cache: keys and values before x; those of x are appended.
            positions: [S] or [B, S], token positions for RoPE; None: after the cache from 0, and
                from 0 in each sequence of `cu_seqlens`.
            angles: cosines and sines of the angles at these positions, [S, d / 2] or [B, S, d / 2]
                each, which the layers of a model can share; None: computed here. Unused without
                RoPE.
            cu_seqlens: [num_sequences + 1], offsets of concatenated sequences in a batch of 1, see
                `moe_ops.moa_attention`; not with a cache.
            topk_ids: [B, S, K'] or [T, K'] int32 or int64, a selection that replaces the router's;
                ids outside [0, E) contribute nothing. Without `topk_weights`, the router computes
                the weights of these experts (softmax over all with `soft_routing`).
            topk_weights: [B, S, K'] or [T, K'] float, only with `topk_ids`; the router does not
                run.
            expert_mask: [E] bool, True for allowed experts.
            token_mask: bool, one element per token, True if it counts in `aux_losses`.
            add_bias: False lets the caller add `bias`, together with other terms.
            return_routing: return AttentionExpertsOutput and compute `aux_losses`.

        Raises:
            ValueError: `topk_weights` without `topk_ids`, a cache with `cu_seqlens`, or shapes that
                do not match.
        """
        if x.is_nested:
            return self._forward_jagged(
                x,
                cache is None and cu_seqlens is None,
                tokens={
                    "positions": positions,
                    "topk_ids": topk_ids,
                    "topk_weights": topk_weights,
                    "token_mask": token_mask,
                },
                angles=angles,
                expert_mask=expert_mask,
                add_bias=add_bias,
                return_routing=return_routing,
            )
        hidden = self.router.hidden_size
        if x.dim() != 3 or x.shape[-1] != hidden:
            raise ValueError(
                f"AttentionExperts: x must be [B, S, {hidden}], got shape {list(x.shape)}."
            )
        if cache is not None and cu_seqlens is not None:
            raise ValueError("AttentionExperts: cache must be None with cu_seqlens, got one.")
        batch, length, _ = x.shape
        heads, size, experts = self.num_kv_heads, self.head_size, self.router.num_experts
        flat = x.reshape(-1, hidden)
        name = "AttentionExperts"
        topk_ids, topk_weights = check_given(name, topk_ids, topk_weights, flat.shape[0])
        routing = self._route(flat, topk_ids, topk_weights, expert_mask)
        _, slot_weights, slot_ids = routing
        if self.expert_kv:  # Slot e is expert e, so that queries meet their own keys.
            slot_weights, slot_ids = _by_expert(slot_weights, slot_ids, experts)
        slots, kv_heads = slot_ids.shape[1], heads * (experts if self.expert_kv else 1)
        q = moe_linear_map(flat, self.w_query, slot_ids).view(batch, length, slots, heads, size)
        kv = apply_linear(self.kv_proj, flat).view(batch, length, 2, kv_heads, size)
        k, v = kv.unbind(2)
        if self.rope_theta is not None:
            if angles is None:
                if positions is None:
                    positions = _positions(length, cache, cu_seqlens, x.device)
                angles = Rope(size, self.rope_theta).at(positions)
            q, k = rotary(q, *angles), rotary(k, *angles)
        if cache is not None:
            k, v = cache.update(k, v)
        if self.expert_kv:
            q = q.reshape(batch, length, 1, slots * heads, size)
        out = moa_attention(
            q,
            k,
            v,
            kind=self.kind,
            causal=self.causal,
            scale=self.scale,
            window=self.window,
            cu_seqlens=cu_seqlens,
            softcap=self.softcap,
        )
        remainder = None
        if isinstance(out, tuple):
            out, remainder = out
            remainder = remainder.view(batch, length, slots, heads)
        h = out.reshape(-1, slots, heads * size)
        y = moe_linear_reduce(h, self.w_output, slot_weights, slot_ids).view(x.shape)
        if add_bias and self.bias is not None:
            y = y + self.bias.to(y.dtype)
        if not return_routing:
            return y
        aux = aux_losses_of(self.aux_losses, self.router, routing, token_mask, self.loss_group)
        return AttentionExpertsOutput(y, *routing, aux, remainder)

    def _forward_jagged(
        self, x: Tensor, alone: bool, *, tokens: dict[str, Tensor | None], **others: Any
    ) -> Tensor | AttentionExpertsOutput:
        name = "AttentionExperts"
        if not alone:
            raise ValueError(
                f"{name}: cache and cu_seqlens must be None with a jagged x, which has sequences "
                "of its own, got one."
            )
        jagged = jagged_parts(name, x)
        tokens = {what: values_of(name, what, t, x) for what, t in tokens.items()}
        out = self.forward(
            jagged.values[None], cu_seqlens=jagged.offsets, **cast(Any, tokens), **others
        )
        if isinstance(out, Tensor):
            return jagged.like(out[0])
        remainder = out.remainder
        if remainder is not None:
            remainder = jagged.like(remainder[0])
        return out._replace(y=jagged.like(out.y[0]), remainder=remainder)

    def _route(
        self,
        flat: Tensor,
        topk_ids: Tensor | None,
        topk_weights: Tensor | None,
        expert_mask: Tensor | None,
    ) -> Routing:
        if topk_ids is not None and topk_weights is not None:
            return given_routing(topk_ids, topk_weights, expert_mask)
        if not self.soft_routing:
            return self.router(flat, topk_ids=topk_ids, expert_mask=expert_mask)
        logits = self.router.logits(flat)
        scores = logits if logits.dtype == torch.float64 else logits.float()
        if expert_mask is not None:
            scores = scores.masked_fill(~expert_mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        if topk_ids is None:
            ids = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
            topk_ids = ids.expand(logits.shape)
        ids = drop_masked(topk_ids, expert_mask)
        valid, index = valid_ids(ids, logits.shape[1])
        return Routing(logits, weights.gather(1, index).masked_fill(~valid, 0.0), ids)

    # ------------------------------------------------------------------- operations on the experts

    def select(self, ids: Sequence[int] | Tensor, **changes: Any) -> AttentionExperts:
        """Returns a new layer with the experts `ids`, in that order, and the keys and values of
        this one.

        It computes the function of this layer with an `expert_mask` of these experts.

        Args:
            ids: experts to keep, in [0, E), repeats allowed.
            changes: top_k, num_groups, num_topk_groups of the new router.

        Raises:
            ValueError: ids out of range, or fewer experts than the router's top_k.
        """
        return expert_ops.select_attention(self, ids, changes)

    def append(
        self, num: int, *, init: str = "random", router_init: str | None = None, **changes: Any
    ) -> AttentionExperts:
        """Returns a new layer with `num` experts appended.

        Args:
            num: at least 1.
            init: initial values of the experts: "random" (like a new layer), "zero_output" (random,
                with w_output 0: they contribute nothing until trained), "copy" (experts 0, 1, ...
                again) or "mean" (the mean of all experts).
            router_init: initial values of the router's rows: "random", "copy" or "mean"; None is
                `init`, or "random" for "zero_output".
            changes: top_k, num_groups, num_topk_groups of the new router.

        Raises:
            ValueError: an unknown `init`, or a number below 1.
        """
        return expert_ops.append_attention(self, num, init, router_init, changes)

    def config(self) -> dict[str, Any]:
        """Returns the keyword arguments for a layer like this one, without device and dtype."""
        names = ("kind", "causal", "scale", "window", "softcap", "rope_theta", "soft_routing")
        return {
            **{name: getattr(self, name) for name in (*names, "expert_kv", "aux_losses")},
            "bias": self.bias is not None,
            "kv_bias": self.kv_proj.bias is not None,
        }

    def blank(self, router: Router, **changes: Any) -> AttentionExperts:
        """Returns a new layer like this one with another router."""
        config = {**self.config(), **changes}
        return AttentionExperts(router, self.num_kv_heads, self.head_size, **config)

    def extra_repr(self) -> str:
        words = [
            f"num_kv_heads={self.num_kv_heads}, head_size={self.head_size}, kind={self.kind!r}"
        ]
        words += [name for name in ("soft_routing", "expert_kv") if getattr(self, name)]
        words += [
            f"{name}={getattr(self, name)}"
            for name in ("rope_theta", "window", "softcap", "scale")
            if getattr(self, name) is not None
        ]
        return ", ".join(words)


def _by_expert(weights: Tensor, ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Converts the routing to E slots per token: slot e contains e or -1; weights of repeated
    experts are added."""
    valid, index = valid_ids(ids, num_experts)
    zeros = weights.new_zeros(ids.shape[0], num_experts)
    summed = zeros.scatter_add(1, index, weights.masked_fill(~valid, 0.0))
    chosen = torch.zeros_like(zeros, dtype=torch.int32).scatter_add(1, index, valid.int()) > 0
    experts = torch.arange(num_experts, dtype=torch.int32, device=ids.device)
    return summed, torch.where(chosen, experts, -1)


def _positions(
    length: int, cache: KVCache | None, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    positions = torch.arange(length, device=device)
    if cache is not None:
        return positions + cache.length
    if cu_seqlens is not None:
        starts = cu_seqlens.to(positions)
        return positions - starts[torch.bucketize(positions, starts[1:], right=True)]
    return positions
