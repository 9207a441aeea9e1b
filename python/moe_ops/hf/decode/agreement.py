"""Checks that a module agrees with the formula of its class.

A class is identified by its code; these comparisons on a few inputs can only reject it. Inputs have
magnitudes from 1e-3 to 1e4, which reveals a clamp or a threshold, and parameters are those of the
module, in fp32 on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops._private_torch import disable_modes
from moe_ops.hf.models.attention import HeadAttention, LatentAttention
from moe_ops.hf.models.cache_argument import cache_name
from moe_ops.hf.models.layers import DecoderLayer, RoutedBlock
from moe_ops.hf.models.norms import epsilon_of
from moe_ops.ops import (
    add_rms_norm,
    attention_decode,
    gated_mlp_decode,
    mla_decode,
    router_linear,
    topk_router,
)
from moe_ops.quant.linear import DenseOperands, QuantizedLinear
from moe_ops.quant.stored_linear import StoredLinear

_SIZES = (1e-3, 1.0, 30.0, 1e4)
_TOLERANCE = 1e-5
# Attention scores are sums of large values that cancel.
_ATTENTION_TOLERANCE = 1e-4


def why_not(kind: str, module: nn.Module, entry: Any) -> str | None:
    """Returns why a module does not agree with an entry of its kind; None if it does, or if its
    parameters have no values."""
    if any(p.device.type == "meta" for p in module.parameters()):
        return None
    # from_pretrained builds models with "meta" as the default device.
    with disable_modes(), torch.device("cpu"), torch.no_grad():
        try:
            size = _CHECKS[kind](module, entry)
        # The module's own code may raise any exception for these inputs.
        except Exception as error:
            return f"a call of it to compare with the formula ended in {type(error).__name__}"
    if size is None:
        return None
    return f"it differs from the formula of its class on inputs of size {size:g}"


def _numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def shell(module: nn.Module, parts: dict[str, nn.Module]) -> Any:
    """Returns the module in eval mode, without hooks and with other submodules."""
    probe = type(module).__new__(type(module))
    probe.__dict__.update(module.__dict__)
    probe.__dict__.update({k: type(v)() for k, v in module.__dict__.items() if k.endswith("hooks")})
    probe.__dict__.update(_modules=dict(parts), training=False)
    return probe


def float_copy(module: nn.Module) -> Any:
    """Returns a copy of the module and its submodules in eval mode, in fp32 on the CPU, without
    hooks. fp32 tensors share memory. Quantized linear layers become float ones: their tokens would
    be rounded, and formulas are compared to more digits."""
    if isinstance(module, QuantizedLinear | StoredLinear):
        return _float_linear(module)
    parts = {name: float_copy(m) for name, m in module._modules.items() if m is not None}
    probe = shell(module, parts)
    for kind in ("_parameters", "_buffers"):
        tensors = {}
        for name, t in getattr(module, kind).items():
            if t is not None and t.is_floating_point():
                values = t.detach().to("cpu", torch.float32)
                t = nn.Parameter(values, requires_grad=False) if kind == "_parameters" else values
            tensors[name] = t
        probe.__dict__[kind] = tensors
    return probe


def _float_linear(layer: QuantizedLinear | StoredLinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    weight = layer.weight.as_subclass(Tensor).to("cpu", torch.float32)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        bias = layer.bias.detach().to("cpu", torch.float32)
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _first_difference(
    compute: Callable[[float], tuple[Any, Tensor]], tolerance: float = _TOLERANCE
) -> float | None:
    """Returns the first input magnitude at which both results of `compute` differ; None if there is
    none."""
    for size in _SIZES:
        actual, expected = compute(size)
        if not isinstance(actual, Tensor) or actual.shape != expected.shape:
            return size
        error = (actual.double() - expected.double()).norm()
        if not bool(error <= tolerance * expected.double().norm()):
            return size
    return None


def _norm(module: nn.Module, entry: Any) -> float | None:
    norm = float_copy(module)
    x, eps = _numbers(4, norm.weight.numel()), entry.epsilon(norm)

    def compute(size: float) -> tuple[Any, Tensor]:
        return norm(x * size), add_rms_norm(x * size, norm.weight, eps=eps)[0]

    return _first_difference(compute)


def _router(module: nn.Module, entry: Any) -> float | None:
    router = float_copy(module)
    arguments = entry.arguments(router)
    weight = router.weight
    # Logits of several magnitudes: if all scores are 0 or 1, rounding determines the selection.
    x = _numbers(64, weight.shape[1])
    x = x / (x @ weight.T).std().clamp(min=1e-30)
    for size in (1e-2, 1.0, 6.0):
        logits = router_linear(x * size, weight, router.bias if entry.bias else None)
        weights, ids = topk_router(logits, **arguments)
        actual = router(x * size)
        if not (isinstance(actual, tuple) and len(actual) == 3):
            return size
        mine = torch.zeros_like(logits).scatter(1, ids.long(), weights)
        other = torch.zeros_like(logits).scatter(1, actual[2].long(), actual[1].float())
        error = (mine - other).norm(dim=1) > 1e-3 * mine.norm(dim=1)
        same_logits = (actual[0] - logits).norm() <= 1e-4 * logits.norm()
        # Two experts whose scores differ only by rounding may be swapped.
        if not bool(same_logits) or int(error.sum()) > 3:
            return size
    return None


def _network(module: nn.Module, entry: Any) -> float | None:
    network = float_copy(module)
    x, activation = _numbers(4, network.gate_proj.weight.shape[1]), entry.activation(module)
    weights = [network._modules[f"{n}_proj"].weight for n in ("gate", "up", "down")]
    return _first_difference(
        lambda size: (
            network(x * size),
            gated_mlp_decode(x * size, *weights, activation=activation),
        ),
        _ATTENTION_TOLERANCE,
    )


# --------------------------------------------------------------------------------------- attention


class _Cache:
    """Cache for one call."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.tensors = keys, values
        return self.tensors


def _padded_mask() -> Tensor:
    """Returns the mask of two sequences of three tokens; the second begins with padding."""
    mask = torch.full((2, 1, 3, 3), -1e9, dtype=torch.float32).triu(1)
    mask[1, :, 1:, 0] = -1e9
    return mask


def _call(attention: Any, x: Tensor, positions: Any, cache: Any) -> Tensor:
    attention.config = copy.copy(attention.config)
    attention.config.__dict__["_attn_implementation_internal"] = "eager"
    y = attention(
        hidden_states=x,
        position_embeddings=positions,
        attention_mask=_padded_mask(),
        position_ids=None,
        **{cache_name(type(attention).forward): cache},
    )
    result: Tensor = y[0]
    return result


def _attention(module: nn.Module, entry: Any) -> float | None:
    attention = float_copy(module)
    if isinstance(entry, LatentAttention):
        return _latents(attention, entry)
    sizes = [attention.head_dim]
    if entry.partial:
        sizes.append(attention.head_dim // 2)
    return next((s for n in sizes if (s := _heads(attention, entry, n)) is not None), None)


def _heads(attention: Any, entry: HeadAttention, rotary_size: int) -> float | None:
    projections = {name: attention._modules[f"{name}_proj"] for name in "qkvo"}
    x = _numbers(2, 3, projections["q"].weight.shape[1])
    angles = _numbers(2, 3, rotary_size // 2).repeat(1, 1, 1 if entry.one_angle else 2)
    options: dict[str, Any] = {f"w_{name}": m.weight for name, m in projections.items()}
    options |= {f"b_{name}": m.bias for name, m in projections.items()}
    if entry.has_norms(attention):
        options |= {"q_norm": attention.q_norm.weight, "k_norm": attention.k_norm.weight}
        options["head_eps"] = epsilon_of(attention.q_norm)
    heads = projections["k"].weight.shape[0] // attention.head_dim

    def compute(size: float) -> tuple[Any, Tensor]:
        kept = torch.zeros(2, 2, heads, 3, attention.head_dim, dtype=torch.float32)
        total = attention_decode(
            x * size,
            cos=angles.cos(),
            sin=angles.sin(),
            keys=kept[0],
            values=kept[1],
            start=0,
            rotary_size=rotary_size,
            scale=attention.scaling,
            mask=_padded_mask(),
            sinks=attention._parameters.get("sinks"),
            residual_scale=1.0,
            **options,
        )
        y = _call(attention, x * size, (angles.cos(), angles.sin()), None)
        return y + x * size, total

    return _first_difference(compute, _ATTENTION_TOLERANCE)


def _latents(attention: Any, entry: LatentAttention) -> float | None:
    parts, rope_size = attention._modules, attention.qk_rope_head_dim
    x = _numbers(2, 3, parts["kv_a_proj_with_mqa"].weight.shape[1])
    angles = _numbers(2, 3, rope_size // 2)
    positions: Any = angles.repeat(1, 1, 2).cos(), angles.repeat(1, 1, 2).sin()
    if entry.complex_angles:
        positions = torch.polar(torch.ones_like(angles), angles)
    operands = entry.operands(
        attention,
        {
            name: DenseOperands(m.weight, None, m.bias, "float")
            if isinstance(m, nn.Linear)
            else m.weight
            for name, m in parts.items()
        },
    )
    operands["latent_eps"] = epsilon_of(parts["kv_a_layernorm"])

    def compute(size: float) -> tuple[Any, Tensor]:
        kept = _Cache()
        y = _call(attention, x * size, positions, kept)
        widths = (attention.kv_lora_rank, rope_size)
        own = [torch.zeros(2, 1, 3, width, dtype=torch.float32) for width in widths]
        total = mla_decode(
            x * size,
            cos=angles.cos(),
            sin=angles.sin(),
            latents=own[0],
            rope_keys=own[1],
            start=0,
            mask=_padded_mask(),
            **operands,
        )
        ours = torch.cat([total.flatten(), own[0].flatten(), own[1].flatten()])
        theirs = [y + x * size, *kept.tensors]
        return torch.cat([t.flatten() for t in theirs]), ours

    return _first_difference(compute, _ATTENTION_TOLERANCE)


# ------------------------------------------------------------------------------- blocks and layers


class _Times(nn.Module):
    """Multiplies by a constant, in place of a computing submodule."""

    def __init__(self, factor: float, pair: bool = False) -> None:
        super().__init__()
        self.factor, self.pair = factor, pair

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = hidden_states * self.factor
        return (y, None) if self.pair else y


class _Router(nn.Module):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        return x, x[:, :2].sin(), (x[:, 2:4].cos() * 10).long()


class _Experts(nn.Module):
    def forward(self, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return hidden_states * 2 + (ids * weights).sum(-1, keepdim=True)


class _Gate(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[..., :1].sin()


def _block(module: nn.Module, entry: RoutedBlock) -> float | None:
    parts: dict[str, nn.Module] = {entry.router: _Router(), "experts": _Experts()}
    shared = entry.shared_of(module)
    if shared is not None:
        parts[shared] = _Times(5.0)
    if entry.gate is not None:
        parts[entry.gate] = _Gate()
    if entry.optional and entry.shared is not None and shared is None:
        parts[entry.shared] = None  # type: ignore[assignment]
    block = shell(module, parts)
    widths = [p.shape[-1] for n, p in module.named_parameters() if n.endswith("gate_up_proj")]
    width = getattr(module, "hidden_dim", None) or getattr(module, "input_size", None)
    x = _numbers(3, 2, width if isinstance(width, int) else widths[0] if widths else 8)

    def compute(size: float) -> tuple[Any, Tensor]:
        y = block(x * size)
        rows = (x * size).view(-1, x.shape[-1])
        _, weights, ids = _Router()(rows)
        want = _Experts()(rows, ids, weights).view_as(x)
        if shared is not None:
            want = want + 5 * x * size * (torch.sigmoid(_Gate()(x * size)) if entry.gate else 1.0)
        return (y[0] if entry.pair else y), want

    return _first_difference(compute)


def _layer(module: nn.Module, entry: DecoderLayer) -> float | None:
    layer = shell(
        module,
        {
            "input_layernorm": _Times(0.5),
            "self_attn": _Times(3.0, True),
            "post_attention_layernorm": _Times(0.75),
            entry.block: _Times(7.0, entry.pair),
        },
    )
    factor = entry.factor(module) or 0.0
    # Three sequences: a tensor of two could be unpacked as a pair.
    x = _numbers(3, 2, 8)

    def compute(size: float) -> tuple[Any, Tensor]:
        y = layer(x * size, attention_mask=None, cache=None, position_embeddings=None)
        return y, x * size * (1 + factor * 1.5) * (1 + factor * 5.25)

    return _first_difference(compute)


_CHECKS: dict[str, Callable[[nn.Module, Any], float | None]] = {
    "norm": _norm,
    "router": _router,
    "network": _network,
    "attention": _attention,
    "block": _block,
    "layer": _layer,
}
