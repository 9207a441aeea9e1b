"""What a decoder layer of transformers is made of, found out by what it computes.

A layer is described by the names of its parts and a few numbers. Names alone would not show a
changed formula, so each part is run once with numbers of its own and compared. Layers of a model
that are alike are asked once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_ops._private_torch import disable_modes
from moe_ops.hf.attention_layout import AttentionLayout, LatentLayout, attention_layout
from moe_ops.hf.experts import fused_activation, fused_gate
from moe_ops.hf.fused import call_quietly, close, norm_eps
from moe_ops.hf.probe import numbers, random_copy, shell
from moe_ops.hf.switch import interface_of
from moe_ops.reference import gated_ffn

_BLOCKS = ("mlp", "block_sparse_moe")
_ROUTERS = ("gate", "router")
_SHARED = ("shared_expert", "shared_experts")
_SHARED_GATE = "shared_expert_gate"


class BlockLayout(NamedTuple):
    """A router and `experts`, by the names of the parts.

    eps: of the norm before it.
    router: its name.
    shared: the name of the shared experts; None without.
    shared_activation: of these as arguments of gated_ffn; None where they are to be called.
    gated: whether the sigmoid of `shared_expert_gate` multiplies what these return.
    activation: of experts on transformers' interface, as arguments of moe_ffn; None where the
        experts are to be called.
    """

    eps: float
    router: str
    shared: str | None
    shared_activation: str | None
    gated: bool
    activation: dict[str, Any] | None


class NetworkLayout(NamedTuple):
    """A dense network: gate_proj, up_proj and down_proj.

    eps: of the norm before it.
    activation: as of gated_ffn.
    """

    eps: float
    activation: str


class LayerLayout(NamedTuple):
    """x + residual_scale * attention(norm(x)), and the same of the block.

    attention, block, network: what they are made of; None where that is not known. A block is
        experts or a dense network.
    block_name: of the block in the layer.
    returns_pair: whether the block returns something beside what it adds.
    """

    attention: AttentionLayout | LatentLayout | None
    block: BlockLayout | None
    network: NetworkLayout | None
    block_name: str
    returns_pair: bool
    residual_scale: float


def layout_of(layer: nn.Module, known: dict[Any, LayerLayout | None]) -> LayerLayout | None:
    """What the layer is; None for what is no decoder layer of this form.

    Args:
        known: layers of the same model that were asked before; they are added to.
    """
    parts = layer._modules
    names = [name for name in _BLOCKS if name in parts]
    wanted = {"input_layernorm", "self_attn", "post_attention_layernorm", *names}
    if "forward" in layer.__dict__ or len(names) != 1 or parts.keys() != wanted:
        return None
    key = _signature(layer)
    if key not in known:
        # from_pretrained builds models with "meta" as the default device.
        with disable_modes(), torch.device("cpu"), torch.no_grad():
            known[key] = _layout(layer, names[0])
    return known[key]


def _layout(layer: Any, name: str) -> LayerLayout | None:
    residual_scale = float(getattr(layer, "residual_multiplier", 1.0))
    for pair in (False, True):
        if _adds_up(layer, name, residual_scale, pair):
            break
    else:
        return None
    eps = norm_eps(layer.input_layernorm), norm_eps(layer.post_attention_layernorm)
    attention = None if eps[0] is None else attention_layout(layer.self_attn, eps[0])
    block = network = None
    if eps[1] is not None:
        width = _width(layer.post_attention_layernorm)
        block = _block_layout(getattr(layer, name), eps[1], pair, width)
        activation = None if pair else _network_activation(getattr(layer, name))
        network = None if activation is None else NetworkLayout(eps[1], activation)
    if attention is None and block is None and network is None:
        return None
    return LayerLayout(attention, block, network, name, pair, residual_scale)


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    """Equal for layers of a model that compute the same with other weights."""
    simple = (int, float, str, bool, type(None))
    parts = []
    for name, m in layer.named_modules():
        values = {k: v for k, v in m.__dict__.items() if isinstance(v, simple)}
        for k in ("layer_idx", "training"):
            values.pop(k, None)
        shapes = {k: None if p is None else tuple(p.shape) for k, p in m._parameters.items()}
        parts.append((name, type(m), tuple(values.items()), tuple(shapes.items())))
    return tuple(parts)


def _width(norm: Any) -> int:
    return int(norm.weight.shape[0])


# ------------------------------------------------------------------------------------ whole layers


class _Times(nn.Module):
    """A part that multiplies by a number, in place of one that computes."""

    def __init__(self, factor: float, pair: bool = False) -> None:
        super().__init__()
        self.factor, self.pair = factor, pair

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = hidden_states * self.factor
        return (y, None) if self.pair else y


def _adds_up(layer: Any, block: str, residual_scale: float, pair: bool) -> bool:
    """Whether the layer is norm, attention, sum, norm, block and sum, in this order."""
    probe = shell(
        layer,
        {
            "input_layernorm": _Times(0.5),
            "self_attn": _Times(3.0, True),
            "post_attention_layernorm": _Times(0.75),
            block: _Times(7.0, pair),
        },
    )
    # Three sequences: a tensor of two would be taken for a pair.
    x = numbers(3, 2, _width(layer.input_layernorm))
    y = call_quietly(probe, x, attention_mask=None, cache=None, position_embeddings=None)
    want = x * (1 + residual_scale * 1.5) * (1 + residual_scale * 5.25)
    return isinstance(y, Tensor) and close(y, want)


# -------------------------------------------------------------------------------------- the experts


class _Router(nn.Module):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        return x, x[:, :2].sin(), (x[:, 2:4] * 10).long()


class _Experts(nn.Module):
    def forward(self, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return hidden_states * 2 + (ids * weights).sum(-1, keepdim=True)


class _Gate(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[..., :1] * 0.3


def _block_layout(block: nn.Module, eps: float, pair: bool, width: int) -> BlockLayout | None:
    names = block._modules.keys()
    routers, shared = ([n for n in wanted if n in names] for wanted in (_ROUTERS, _SHARED))
    gated = _SHARED_GATE in names
    if len(routers) != 1 or len(shared) > 1 or gated > len(shared) or "forward" in block.__dict__:
        return None
    parts: dict[str, nn.Module] = {routers[0]: _Router(), "experts": _Experts()}
    if shared:
        parts[shared[0]] = _Times(5.0)
    if gated:
        parts[_SHARED_GATE] = _Gate()
    if names != parts.keys():
        return None
    x = numbers(3, 2, width)
    y = call_quietly(shell(block, parts), x)
    y = y[0] if pair and isinstance(y, tuple) else y
    rows = x.view(-1, width)
    _, weights, ids = _Router()(rows)
    want = _Experts()(rows, ids, weights).view_as(x)
    if shared:
        want = want + 5 * x * (torch.sigmoid(_Gate()(x)) if gated else 1.0)
    if not isinstance(y, Tensor) or not close(y, want):
        return None
    name, activation = None, None
    if shared:
        name = shared[0]
        activation = _network_activation(block._modules[name])
    return BlockLayout(
        eps, routers[0], name, activation, gated, _activation(block._modules["experts"])
    )


def _network_activation(network: Any) -> str | None:
    """Of a dense network of three products and a gate; None for everything else."""
    parts = network._modules
    projections = [parts.get(f"{name}_proj") for name in ("gate", "up", "down")]
    if (
        "forward" in network.__dict__
        or parts.keys() - {"gate_proj", "up_proj", "down_proj", "act_fn"}
        or network._parameters
        or network._buffers
        or not all(isinstance(m, nn.Linear) and m.bias is None for m in projections)
    ):
        return None
    act_fn: Any = getattr(network, "act_fn", None)
    gate = fused_gate(act_fn)
    if gate is None:
        return None
    probe = random_copy(network)
    x = numbers(4, probe.gate_proj.weight.shape[1])
    y = call_quietly(probe, x)
    weights = (probe.gate_proj.weight, probe.up_proj.weight, probe.down_proj.weight)
    known = isinstance(y, Tensor) and close(y, gated_ffn(x, *weights, **gate))
    return gate["activation"] if known else None


def _activation(experts: Any) -> dict[str, Any] | None:
    if interface_of(experts) is None or getattr(experts, "has_post_expert_norm", False):
        return None
    return fused_activation(experts)
