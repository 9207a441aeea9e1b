"""Decoder layers of transformers for few tokens, in few calls.

A layer with known submodules gets a fused class. In inference with few tokens, its forward reads
the parameters of its submodules and calls the ops itself. A submodule that no longer matches
(another class, hooks, adapters, other settings) is called instead; if none matches, the layer's own
forward runs. `reason_of` returns the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops import _verify as verify
from moe_ops._private_torch import has_global_hooks
from moe_ops.expert_weights.packing import expert_ffn
from moe_ops.hf.decode.attention_widths import PaddedValues
from moe_ops.hf.decode.cache_room import Room, room
from moe_ops.hf.decode.fused import (
    is_silent,
    kind_of,
    norm_operands,
    register_kind,
    route,
)
from moe_ops.hf.decode.known_parts import Found, LayerParts
from moe_ops.hf.experts.forward import bank_bias, bank_views
from moe_ops.hf.experts.placed import is_placed
from moe_ops.hf.experts.switch import interface_of, is_quantized
from moe_ops.hf.models import cache_argument
from moe_ops.hf.models.attention import (
    HeadAttention,
    LatentAttention,
    implementation_of,
    option_of,
)
from moe_ops.hf.models.gates import fused_activation
from moe_ops.hf.models.layers import DecoderLayer, RoutedBlock
from moe_ops.layers.linear import FEW_ROWS, in_inference_on_few_rows
from moe_ops.numerics import is_batch_invariant_enabled
from moe_ops.ops import add_rms_norm, attention_decode, gated_mlp_decode, mla_decode
from moe_ops.quant import QuantizedExperts
from moe_ops.quant.linear import dense_operands

# Supported arguments of a layer; others must be None. Hooks collect outputs.
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
KIND = "layer"
_REASON = "_moe_ops_reason"


def reason_of(layer: nn.Module) -> str | None:
    """Returns why the last call of a fused layer was not completely fused; None if it was."""
    return layer.__dict__.get(_REASON)


def step_forward(cls: Any) -> Callable[..., Any]:
    """Returns the forward of the fused class of a decoder layer."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        parts: LayerParts = self._moe_ops_fused
        y: Tensor | str | None = _why_not(self, parts, hidden_states, args)
        if y is None:
            y = _step(self, parts, hidden_states, kwargs)
        if not isinstance(y, str):
            return y
        self.__dict__[_REASON] = y
        with _fast_attention(parts):
            return cls.forward(self, hidden_states, *args, **kwargs)

    return forward


def _fast_attention(parts: LayerParts) -> AbstractContextManager[Any]:
    """Returns the context for the layer's own forward."""
    latent = parts.attention is not None and isinstance(parts.attention.entry, LatentAttention)
    return PaddedValues() if latent and not torch.compiler.is_compiling() else nullcontext()


def _why_not(layer: Any, parts: LayerParts, x: Tensor, args: tuple[Any, ...]) -> str | None:
    """Returns why this call cannot be fused at all; None if it can."""
    if args:
        return "it was called with arguments by position"
    if is_batch_invariant_enabled():
        return "in the batch-invariant mode few tokens are computed like many"
    if layer.training:
        return "it is in training mode"
    if x.dim() != 3 or not in_inference_on_few_rows(x):
        return f"it is not inference of at most {FEW_ROWS} tokens in eager code on the CPU"
    if has_global_hooks():
        return "hooks wait for calls of all modules"
    if verify.takes_own_forward():
        return "it is being compared with its own forward"
    return None


def _step(layer: Any, parts: LayerParts, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor | str:
    """Returns the output of the layer, or why nothing of it is fused."""
    form: DecoderLayer = parts.layer.entry
    intact = parts.intact(layer)
    if intact is None:
        return "the code of a class or of a function of its file was replaced"
    scale = form.factor(layer)
    if scale is None or not form.attends(layer):
        return "its settings are not those of the formula"
    attended = _attend(layer, parts, x, scale, kwargs, intact)
    reason = attended if isinstance(attended, str) else None
    operands = _post_norm(layer, parts, form, x.dtype, intact)
    if isinstance(attended, str):
        if isinstance(operands, str):
            return f"{attended}; {operands}"
        y = layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)[0]
        attended = torch.add(x, y, alpha=scale)
    if isinstance(operands, str):
        reason = operands if reason is None else f"{reason}; {operands}"
    layer.__dict__[_REASON] = reason
    return _through_block(layer, parts, form, scale, attended, operands, intact)


# --------------------------------------------------------------------------------------- attention


def _attend(
    layer: Any,
    parts: LayerParts,
    x: Tensor,
    scale: float,
    kwargs: Mapping[str, Any],
    intact: Collection[type],
) -> Tensor | str:
    """Returns x + scale * attention, or why it is not fused."""
    found = parts.attention
    if found is None:
        return parts.left.get("self_attn", "its attention is not known")
    modules = layer._modules
    attention = modules["self_attn"]
    if not found.is_still(attention):
        return "self_attn has another class"
    if not is_silent(attention) or not all(map(is_silent, attention._modules.values())):
        return "self_attn or a part of it has hooks or a forward of its own"
    entry: Any = found.entry
    if (why := entry.why_not_now(attention)) is not None:
        return f"self_attn: {why}"
    norm = norm_operands(modules["input_layernorm"], x.dtype, intact)
    if norm is None:
        return "input_layernorm is to be called"
    cache = cache_argument.find_cache(kwargs)
    positions = kwargs.get("position_embeddings")
    if cache is None or positions is None:
        return "it was called without a cache or without positions"
    if any(kwargs[k] is not None for k in kwargs.keys() - _KNOWN):
        unknown = next(k for k in kwargs.keys() - _KNOWN if kwargs[k] is not None)
        return f"it was called with {unknown}"
    options: dict[str, Any] = {"norm_weight": norm[0], "eps": norm[1], "residual_scale": scale}
    own = None
    if verify.is_due(attention):
        own = _own_attention(layer, x, scale, kwargs, attention.layer_idx)
    attend = _attend_to_latents if isinstance(entry, LatentAttention) else _attend_to_heads
    given = cache, kwargs.get("attention_mask"), positions
    y = attend(attention, entry, x, given, options, intact)
    if own is not None and isinstance(y, Tensor):
        quantized = any(t.dtype in (torch.int8, torch.uint8) for t in attention.buffers())
        verify.compare(attention, "attention", y, own, quantized=quantized)
    return y


def _attend_to_heads(
    attention: Any,
    entry: HeadAttention,
    x: Tensor,
    given: tuple[Any, Any, Any],
    options: dict[str, Any],
    intact: Collection[type],
) -> Tensor | str:
    cache, mask, positions = given
    modules, size, dtype = attention._modules, attention.head_dim, x.dtype
    q, k = dense_operands(modules["q_proj"], dtype), dense_operands(modules["k_proj"], dtype)
    v, o = dense_operands(modules["v_proj"], dtype), dense_operands(modules["o_proj"], dtype)
    if q is None or k is None or v is None or o is None:
        return "a projection of self_attn is no plain linear layer of the type of the tokens"
    if entry.has_norms(attention):
        q_norm = norm_operands(modules["q_norm"], dtype, intact)
        k_norm = norm_operands(modules["k_norm"], dtype, intact)
        if q_norm is None or k_norm is None or q_norm[1] != k_norm[1]:
            return "q_norm and k_norm are to be called"
        options |= {"q_norm": q_norm[0], "k_norm": k_norm[0], "head_eps": q_norm[1]}
    sinks = attention._parameters.get("sinks")
    if (sinks is not None) != entry.sinks or (sinks is not None and sinks.dtype != dtype):
        return "sinks of self_attn have another type than tokens"
    if not isinstance(positions, tuple) or len(positions) != 2:
        return "positions are not cos and sin"
    cos, sin = positions
    rotary_size = cos.shape[-1] * (2 if entry.one_angle else 1)
    if rotary_size != size and not (entry.partial and rotary_size < size):
        return f"positions are for {rotary_size} features, and a head has {size}"
    found = _room(cache, attention, x, mask, k[0].shape[0] // size, (size, size))
    if isinstance(found, str):
        return found
    where, mask = found
    y = attention_decode(
        x,
        q[0],
        k[0],
        v[0],
        o[0],
        cos,
        sin,
        where.keys,
        where.values,
        where.start,
        rotary_size=rotary_size,
        scale=attention.scaling,
        b_q=q[2],
        b_k=k[2],
        b_v=v[2],
        b_o=o[2],
        w_q_scale=q[1],
        w_k_scale=k[1],
        w_v_scale=v[1],
        w_o_scale=o[1],
        formats=[part.format for part in (q, k, v, o)],
        mask=mask,
        sinks=sinks,
        **options,
    )
    where.note(x.shape[1])
    return y


def _attend_to_latents(
    attention: Any,
    entry: LatentAttention,
    x: Tensor,
    given: tuple[Any, Any, Any],
    options: dict[str, Any],
    intact: Collection[type],
) -> Tensor | str:
    # The caches of transformers store latents in place of keys, and rotated keys in place of
    # values, so per-head keys and values are not needed.
    cache, mask, positions = given
    parts: dict[str, Any] = {}
    for name, m in attention._modules.items():
        if name.endswith("layernorm"):
            norm = norm_operands(m, x.dtype, intact)
            if norm is None or options.setdefault("latent_eps", norm[1]) != norm[1]:
                return f"{name} of self_attn is to be called"
            parts[name] = norm[0]
        else:
            parts[name] = dense_operands(m, x.dtype)
            if parts[name] is None:
                return f"{name} of self_attn is no plain linear layer of the type of the tokens"
    rope_size = attention.qk_rope_head_dim
    angles = entry.angles(positions, rope_size)
    if angles is None:
        return "positions are not those of latent attention"
    if parts["kv_b_proj"][1] is not None:
        return "kv_b_proj is quantized"
    found = _room(cache, attention, x, mask, 1, (attention.kv_lora_rank, rope_size))
    if isinstance(found, str):
        return found
    where, mask = found
    y = mla_decode(
        x,
        cos=angles[0],
        sin=angles[1],
        latents=where.keys,
        rope_keys=where.values,
        start=where.start,
        mask=mask,
        **entry.operands(attention, parts),
        **options,
    )
    where.note(x.shape[1])
    return y


def _room(
    cache: Any, attention: Any, x: Tensor, mask: Any, heads: int, sizes: tuple[int, int]
) -> tuple[Room, Tensor | None] | str:
    """Returns room in the cache and the mask of all its tokens, or why an op cannot use them."""
    length = x.shape[1]
    if mask is not None and (type(mask) is not Tensor or mask.dim() != 4 or mask.shape[1] != 1):
        return "the mask is not one tensor for all heads"
    if mask is None and length > 1 and implementation_of(attention) != "sdpa":
        return "without a mask its attention sees later tokens too"
    found = room(cache, attention.layer_idx, x, heads, sizes)
    if isinstance(found, str):
        return found
    end = found.start + length
    if mask is None:
        # torch's attention without a mask aligns queries with the first key.
        if length > 1 and found.start:
            return "without a mask later parts of a prompt see other keys"
        return found, None
    if mask.shape[3] < end:
        return "the mask has fewer keys than the cache"
    return found, mask if mask.shape[3] == end else mask[..., :end]


def _own_attention(
    layer: Any, x: Tensor, scale: float, kwargs: Mapping[str, Any], index: int
) -> Callable[[], Tensor]:
    """Returns a call of the layer's own attention on the cache in its current state."""
    before = dict(kwargs)
    for name in (cache_argument.NAME, cache_argument.OLDER_NAME):
        if before.get(name) is not None:
            cache = before[name] = copy.copy(before[name])
            cache.layers = list(cache.layers)
            kept = cache.layers[index] = copy.copy(cache.layers[index])
            for key, value in kept.__dict__.items():
                if isinstance(value, Tensor):
                    kept.__dict__[key] = value.clone()

    def own() -> Tensor:
        y = layer.self_attn(hidden_states=layer.input_layernorm(x), **before)[0]
        return torch.add(x, y, alpha=scale)

    return own


# --------------------------------------------------------------------------------------- the block


def _post_norm(
    layer: Any,
    parts: LayerParts,
    form: DecoderLayer,
    dtype: torch.dtype,
    intact: Collection[type],
) -> tuple[Tensor, float] | str:
    """Returns weight and epsilon of the norm before the block, or why the layer must call the block
    itself."""
    found = parts.block or parts.network
    if found is None:
        return parts.left.get(form.block, "its block is not known")
    block = layer._modules[form.block]
    if not found.is_still(block):
        return f"{form.block} has another class"
    if not is_silent(block):
        return f"{form.block} has hooks or a forward of its own"
    norm = norm_operands(layer._modules["post_attention_layernorm"], dtype, intact)
    return "post_attention_layernorm is to be called" if norm is None else norm


def _through_block(
    layer: Any,
    parts: LayerParts,
    form: DecoderLayer,
    scale: float,
    x: Tensor,
    norm: tuple[Tensor, float] | str,
    intact: Collection[type],
) -> Tensor:
    """Returns x + scale * block(norm(x))."""
    block = layer._modules[form.block]
    if not isinstance(norm, str):
        weight, eps = norm
        rows = x.reshape(-1, x.shape[2])
        if parts.network is not None:
            operands = _network_operands(parts.network, block, x.dtype)
            if operands is not None:
                options: dict[str, Any] = {"norm_weight": weight, "eps": eps, "residual": rows}
                y = gated_mlp_decode(rows, residual_scale=scale, **options, **operands).view(
                    x.shape
                )
                if verify.is_due(block):
                    _verify_network(layer, block, operands, x, y, scale)
                return y
        if parts.block is not None:
            normed = add_rms_norm(rows, weight, eps=eps)[0]
            y = _routed(block, parts, parts.block.entry, normed, intact)
            return torch.add(rows, y, alpha=scale).view(x.shape)
    out = block(layer._modules["post_attention_layernorm"](x))
    return torch.add(x, out[0] if form.pair else out, alpha=scale)


def _verify_network(
    layer: Any, block: Any, operands: dict[str, Any], x: Tensor, y: Tensor, scale: float
) -> None:
    def own() -> Tensor:
        return torch.add(x, block(layer._modules["post_attention_layernorm"](x)), alpha=scale)

    quantized = operands["w_up_scale"] is not None
    verify.compare(block, "dense network", y, own, quantized=quantized)


def _routed(
    block: Any, parts: LayerParts, entry: RoutedBlock, y: Tensor, intact: Collection[type]
) -> Tensor:
    """Returns the output of a block of experts for normalized tokens [T, H]."""
    modules: dict[str, Any] = block._modules
    router = modules[entry.router]
    chosen = None
    if kind_of(router) == "router" and is_silent(router):
        chosen = route(router, y, exact=True, intact=intact)
    _, weights, ids = router(y) if chosen is None else chosen
    out = _through_experts(modules["experts"], y, ids, weights)
    name = entry.shared_of(block)
    if name is None:
        return out
    network = modules[name]
    gate = modules[entry.gate] if entry.gate is not None else None
    operands = None
    if parts.shared is not None:
        operands = _network_operands(parts.shared, network, y.dtype)
    if operands is not None:
        if verify.is_due(network):
            quantized = operands["w_up_scale"] is not None
            alone = gated_mlp_decode(y, **operands)
            verify.compare(
                network, "shared experts", alone, lambda: network(y), quantized=quantized
            )
        weight = None
        if gate is not None:
            dense = dense_operands(gate, y.dtype) if is_silent(gate) else None
            weight = None if dense is None or dense[1:3] != (None, None) else dense[0][0]
        if gate is None or weight is not None:
            return gated_mlp_decode(y, output_gate=weight, residual=out, **operands)
    shared: Tensor = network(y)
    return out + (shared if gate is None else shared * torch.sigmoid(gate(y)))


def _network_operands(found: Found, network: Any, dtype: torch.dtype) -> dict[str, Any] | None:
    """Returns weights, scales and activation of a dense network for gated_mlp_decode; None if it
    must be called."""
    if not found.is_still(network) or not is_silent(network):
        return None
    activation = found.entry.activation(network)
    if activation is None:
        return None
    operands: dict[str, Any] = {"activation": activation, "formats": []}
    modules = network._modules
    for name in ("gate", "up", "down"):
        layer = modules[f"{name}_proj"]
        dense = dense_operands(layer, dtype) if is_silent(layer) else None
        if dense is None or dense[2] is not None:
            return None
        operands[f"w_{name}"], operands[f"w_{name}_scale"], _, format = dense
        operands["formats"].append(format)
    return operands


def _through_experts(experts: Any, y: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Returns experts(y, ids, weights), skipping checks whose results are known here."""
    if verify.is_active() or is_placed(experts):
        pass  # Its forward compares, or crosses to the CPU.
    elif is_quantized(experts) and isinstance(experts, QuantizedExperts):
        if experts.dispatcher is None and is_silent(experts):
            return experts.run(y, weights, ids)
    elif (
        "dispatcher" not in experts.__dict__
        and is_silent(experts)
        and _is_enabled(experts)
        and interface_of(experts) is not None
        and not getattr(experts, "has_post_expert_norm", False)
    ):
        activation = fused_activation(experts)
        if activation is not None:
            w_up, w_down = bank_views(experts)
            if w_up.dtype == w_down.dtype == y.dtype:
                b_up, b_down = bank_bias(experts)
                bias: dict[str, Any] = {"b_gate_up": b_up, "b_down": b_down}
                return expert_ffn(experts, y, w_up, w_down, weights, ids, **bias, **activation)
    out: Tensor = experts(y, ids, weights)
    return out


def _is_enabled(experts: nn.Module) -> bool:
    return option_of(experts, "_experts_implementation_internal") == "moe_ops"


register_kind(KIND, step_forward)
