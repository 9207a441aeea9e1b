"""Decoder layers of transformers on few tokens, in few calls.

A layer whose layout is known gets a fused class. In inference on few tokens its forward reads the
parameters of its parts and calls the ops itself; otherwise, and where anything would go unnoticed
that way (hooks, adapters in the place of a part, autocast, compilers, caches that are not plain
tensors), it is the forward that the layer had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from moe_ops._private_torch import has_global_hooks
from moe_ops.expert_weights.packing import expert_ffn
from moe_ops.hf import cache_argument
from moe_ops.hf.attention_layout import AttentionLayout, LatentLayout, latent_operands
from moe_ops.hf.attention_widths import PaddedValues
from moe_ops.hf.experts import bank_bias, bank_views
from moe_ops.hf.fused import register_kind, route
from moe_ops.hf.layout import BlockLayout, LayerLayout
from moe_ops.hf.switch import is_quantized
from moe_ops.layers import QuantizedExperts
from moe_ops.layers.linear import dense_operands, in_inference_on_few_rows
from moe_ops.ops import add_rms_norm, attention_step, gated_ffn, latent_attention_step

_TENSORS = (Tensor, nn.Parameter)
# Arguments of a layer beside which others must be None. Outputs are asked for by hooks.
_KNOWN = frozenset(
    (
        cache_argument.NAME,
        cache_argument.OLDER_NAME,
        "attention_mask",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "use_cache",
    )
)
# Room that a growing cache is given at least, and by how much more than it needs.
_LEAST_ROOM, _MORE_ROOM = 64, 1.5
_KEPT = "_moe_ops_kept"
KIND = "layer"

try:  # What transformers' own hooks collect; without it, all hooks count.
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    _active_collector = None  # type: ignore[assignment]


def step_forward(cls: Any) -> Callable[..., Any]:
    """The forward of the fused class of a decoder layer."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layout: LayerLayout = self._moe_ops_fused
        x = hidden_states
        if args or self.training or not _is_step(x) or not _sees_all(self, layout):
            with _fast_attention(layout):
                return cls.forward(self, hidden_states, *args, **kwargs)
        attended = None
        if layout.attention is not None:
            attended = _attend(self, layout, layout.attention, x, kwargs)
            if attended is None and layout.block is None and layout.network is None:
                return cls.forward(self, hidden_states, **kwargs)
        if attended is None:
            y = self.self_attn(hidden_states=self.input_layernorm(x), **kwargs)[0]
            attended = torch.add(x, y, alpha=layout.residual_scale)
        return _through_block(self, layout, attended)

    return forward


def _fast_attention(layout: LayerLayout) -> AbstractContextManager[Any]:
    """Around the layer's own forward."""
    latent = isinstance(layout.attention, LatentLayout)
    return PaddedValues() if latent and not torch.compiler.is_compiling() else nullcontext()


def _is_step(x: Tensor) -> bool:
    return in_inference_on_few_rows(x) and x.dim() == 3


def _sees_all(layer: Any, layout: LayerLayout) -> bool:
    """Whether nobody waits for a call of a part that is passed by."""
    if has_global_hooks():
        return False
    parts = layer._modules
    if layout.attention is not None:
        attention = parts["self_attn"]
        if not _is_silent(attention) or not all(map(_is_silent, attention._modules.values())):
            return False
    if layout.block is not None:
        block = parts[layout.block_name]
        if not _is_silent(block) or not _is_silent(block._modules[layout.block.router]):
            return False
    return _is_silent(parts["input_layernorm"]) and _is_silent(parts["post_attention_layernorm"])


def _is_silent(m: nn.Module) -> bool:
    state = m.__dict__
    if "forward" in state or state["_forward_pre_hooks"]:
        return False
    hooks = state["_forward_hooks"]
    if not hooks:
        return True
    # transformers leaves its hooks behind after a call with output_router_logits, say.
    if _active_collector is None or not all(
        getattr(hook, "__name__", "") == "output_capturing_hook" for hook in hooks.values()
    ):
        return False
    collected = _active_collector.get() or ()
    return "router_logits" not in collected and "attentions" not in collected


# --------------------------------------------------------------------------------------- attention


def _attend(
    layer: Any,
    layout: LayerLayout,
    how: AttentionLayout | LatentLayout,
    x: Tensor,
    kwargs: Mapping[str, Any],
) -> Tensor | None:
    """x + attention; None where the ops cannot do what is asked for."""
    cache = cache_argument.find_cache(kwargs)
    positions = kwargs.get("position_embeddings")
    norm = _vector(layer._modules["input_layernorm"], x)
    if (
        cache is None
        or positions is None
        or norm is None
        or any(kwargs[k] is not None for k in kwargs.keys() - _KNOWN)
    ):
        return None
    options = {"norm_weight": norm, "eps": how.eps, "residual_scale": layout.residual_scale}
    attention, mask = layer._modules["self_attn"], kwargs.get("attention_mask")
    if isinstance(how, LatentLayout):
        return _attend_to_latents(attention, how, x, positions, cache, mask, options)
    return _attend_to_heads(attention, how, x, positions, cache, mask, options)


def _attend_to_heads(
    attention: Any,
    how: AttentionLayout,
    x: Tensor,
    positions: Any,
    cache: Any,
    mask: Any,
    options: Mapping[str, Any],
) -> Tensor | None:
    parts = attention._modules
    q, k, v, o = (
        dense_operands(parts[n], x.dtype) for n in ("q_proj", "k_proj", "v_proj", "o_proj")
    )
    if q is None or k is None or v is None or o is None:
        return None
    q_norm = k_norm = None
    if how.head_eps is not None:
        q_norm, k_norm = _vector(parts["q_norm"], x), _vector(parts["k_norm"], x)
        if q_norm is None or k_norm is None:
            return None
    sinks = attention._parameters.get("sinks")
    if sinks is not None and sinks.dtype != x.dtype:
        return None
    cos, sin = positions
    rotary_size = cos.shape[-1] * (2 if how.one_angle else 1)
    if rotary_size != how.head_size and not (how.partial and rotary_size < how.head_size):
        return None
    heads = k[0].shape[0] // how.head_size
    room = _room(cache, attention.layer_idx, x, mask, heads, (how.head_size, how.head_size))
    if room is None:
        return None
    kept, keys, values, start, mask = room
    y = attention_step(
        x,
        q[0],
        k[0],
        v[0],
        o[0],
        cos,
        sin,
        keys,
        values,
        start,
        rotary_size=rotary_size,
        scale=how.scale,
        b_q=q[2],
        b_k=k[2],
        b_v=v[2],
        b_o=o[2],
        w_q_scale=q[1],
        w_k_scale=k[1],
        w_v_scale=v[1],
        w_o_scale=o[1],
        q_norm=q_norm,
        k_norm=k_norm,
        head_eps=how.head_eps or 0.0,
        mask=mask,
        sinks=sinks,
        **options,
    )
    _note(kept, keys, values, x.shape[1], start + x.shape[1])
    return y


def _attend_to_latents(
    attention: Any,
    how: LatentLayout,
    x: Tensor,
    positions: Any,
    cache: Any,
    mask: Any,
    options: Mapping[str, Any],
) -> Tensor | None:
    """The caches of transformers keep latents in the place of keys, and rotated keys in that of
    values, so that keys and values of heads need not be made."""
    parts: dict[str, Any] = {}
    for name, m in attention._modules.items():
        is_norm = name.endswith("layernorm")
        parts[name] = _vector(m, x) if is_norm else dense_operands(m, x.dtype)
        if parts[name] is None:
            return None
    angles = how.angles(positions)
    if angles is None or parts["kv_b_proj"][1] is not None:
        return None
    room = _room(cache, attention.layer_idx, x, mask, 1, (how.rank, how.rope_size))
    if room is None:
        return None
    kept, latents, rope_keys, start, mask = room
    operands = latent_operands(how, parts)
    y = latent_attention_step(
        x,
        cos=angles[0],
        sin=angles[1],
        latents=latents,
        rope_keys=rope_keys,
        start=start,
        mask=mask,
        **operands,
        **options,
    )
    _note(kept, latents, rope_keys, x.shape[1], start + x.shape[1])
    return y


def _vector(norm: nn.Module, x: Tensor) -> Tensor | None:
    weight: Any = norm._parameters["weight"]
    return weight if type(weight) in _TENSORS and weight.dtype == x.dtype else None


def _room(
    cache: Any, index: int, x: Tensor, mask: Any, heads: int, sizes: tuple[int, int]
) -> tuple[Any, Tensor, Tensor, int, Tensor | None] | None:
    """The cache of a layer, keys and values of `sizes` features with room for those of x, how many
    there are, and the mask of all of them; None where a cache or a mask is of another kind."""
    found = _memory(cache, index, x, heads, sizes)
    if found is None or mask is None:
        return None if found is None else (*found, None)
    end = found[3] + x.shape[1]
    if type(mask) is not Tensor or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] < end:
        return None
    return (*found, mask if mask.shape[3] == end else mask[..., :end])


def _memory(
    cache: Any, index: int, x: Tensor, heads: int, sizes: tuple[int, int]
) -> tuple[Any, Tensor, Tensor, int] | None:
    """Of `_room`, without the mask. A growing cache gets buffers that it fills: what it shows as
    keys and values are views of them. It is given new ones whenever these views are not what was
    put there."""
    layers = getattr(cache, "layers", None)
    if layers is None or getattr(cache, "offloading", True) or index >= len(layers):
        return None
    kept: Any = layers[index]
    batch, length, _ = x.shape
    if type(kept) is StaticLayer:
        if not kept.is_initialized:
            return None
        own: Any = kept.keys, kept.values
        start = int(kept.cumulative_length)
        if start + length > kept.max_cache_len or not _fits(own[0], x, batch):
            return None
        return kept, *own, start
    if type(kept) is DynamicSlidingWindowLayer:
        if kept.record_past:
            return None
    elif type(kept) is not DynamicLayer:
        return None
    if not kept.is_initialized:
        kept.lazy_initialization(x, x)
    empty = kept.keys.dim() != 4
    start = 0 if empty else kept.keys.shape[2]
    own = kept.__dict__.get(_KEPT)
    if own is not None and own[0] is kept.keys and own[1] is kept.values:
        keys, values = own[2], own[3]
        if start + length <= keys.shape[2] and _fits(keys, x, batch):
            return kept, keys, values, start
    if not empty and not (_fits(kept.keys, x, batch) and kept.keys.shape[1] == heads):
        return None
    most = max(_LEAST_ROOM, int((start + length) * _MORE_ROOM))
    keys, values = (x.new_empty(batch, heads, most, size) for size in sizes)
    if start:
        keys[:, :, :start] = kept.keys
        values[:, :, :start] = kept.values
    return kept, keys, values, start


def _note(kept: Any, keys: Tensor, values: Tensor, length: int, end: int) -> None:
    """Says in a cache that `length` more tokens are there, and `end` in keys and values."""
    if type(kept) is StaticLayer:
        kept.cumulative_length.add_(length)
        return
    first = 0
    if type(kept) is DynamicSlidingWindowLayer:
        kept.cumulative_length += length
        first = max(0, end - kept.sliding_window + 1)
    if first:
        rest = keys.shape[2] - first
        keys, values = keys.narrow(2, first, rest), values.narrow(2, first, rest)
    kept.keys, kept.values = keys.narrow(2, 0, end - first), values.narrow(2, 0, end - first)
    setattr(kept, _KEPT, (kept.keys, kept.values, keys, values))


def _fits(keys: Tensor, x: Tensor, batch: int) -> bool:
    return keys.dtype == x.dtype and keys.device == x.device and keys.shape[0] == batch


# --------------------------------------------------------------------------------------- the block


def _through_block(layer: Any, layout: LayerLayout, x: Tensor) -> Tensor:
    """x + block(norm(x))."""
    parts = layer._modules
    norm, block = parts["post_attention_layernorm"], parts[layout.block_name]
    weight, scale = _vector(norm, x), layout.residual_scale
    rows = x.reshape(-1, x.shape[2])
    if layout.network is not None and weight is not None:
        operands = _network_operands(block, x.dtype)
        if operands is not None:
            how: dict[str, Any] = {**operands, **layout.network._asdict(), "residual_scale": scale}
            return gated_ffn(rows, norm_weight=weight, residual=rows, **how).view(x.shape)
    if layout.block is not None and weight is not None:
        y = _routed(block, layout.block, add_rms_norm(rows, weight, eps=layout.block.eps)[0])
        return torch.add(rows, y, alpha=scale).view(x.shape)
    y = block(norm(x))
    return torch.add(x, y[0] if layout.returns_pair else y, alpha=scale)


def _routed(block: Any, how: BlockLayout, y: Tensor) -> Tensor:
    parts: dict[str, Any] = block._modules
    router = parts[how.router]
    is_fused = getattr(type(router), "_moe_ops_kind", None) == "router"
    chosen = route(router, y, exact=True) if is_fused else None
    _, weights, ids = router(y) if chosen is None else chosen
    out = _through_experts(parts["experts"], how, y, ids, weights)
    if how.shared is None:
        return out
    gate = parts["shared_expert_gate"] if how.gated else None
    if how.shared_activation is not None:
        operands = _network_operands(parts[how.shared], y.dtype)
        weight = None
        if gate is not None:
            dense = dense_operands(gate, y.dtype) if _is_silent(gate) else None
            weight = None if dense is None or dense[1:] != (None, None) else dense[0][0]
        if operands is not None and (gate is None or weight is not None):
            activation = how.shared_activation
            return gated_ffn(y, output_gate=weight, residual=out, activation=activation, **operands)
    shared: Tensor = parts[how.shared](y)
    return out + (shared if gate is None else shared * torch.sigmoid(gate(y)))


def _network_operands(network: Any, dtype: torch.dtype) -> dict[str, Any] | None:
    """Weights and scales of a dense network for gated_ffn; None where it is to be called."""
    parts = network._modules
    operands: dict[str, Any] = {}
    for name in ("gate", "up", "down"):
        layer = parts[f"{name}_proj"]
        dense = dense_operands(layer, dtype) if _is_silent(layer) else None
        if dense is None or dense[2] is not None:
            return None
        operands[f"w_{name}"], operands[f"w_{name}_scale"], _ = dense
    return operands if _is_silent(network) else None


def _through_experts(
    experts: Any, how: BlockLayout, y: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """experts(y, ids, weights), without what only finds out what is known here."""
    if is_quantized(experts) and isinstance(experts, QuantizedExperts):
        if experts.dispatcher is None and _is_silent(experts):
            return experts.run(y, weights, ids)
    elif (
        how.activation is not None
        and "dispatcher" not in experts.__dict__
        and _is_silent(experts)
        and _is_enabled(experts)
    ):
        w_up, w_down = bank_views(experts)
        if w_up.dtype == w_down.dtype == y.dtype:
            b_up, b_down = bank_bias(experts)
            bias: dict[str, Any] = {"b_gate_up": b_up, "b_down": b_down}
            return expert_ffn(experts, y, w_up, w_down, weights, ids, **bias, **how.activation)
    out: Tensor = experts(y, ids, weights)
    return out


def _is_enabled(experts: nn.Module) -> bool:
    config = experts.__dict__.get("config")
    return getattr(config, "__dict__", {}).get("_experts_implementation_internal") == "moe_ops"


register_kind(KIND, step_forward)
