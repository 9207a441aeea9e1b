"""All known modules of a model, and the reasons for unknown ones."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from moe_ops.hf.decode.fused import kind_of
from moe_ops.hf.decode.known_parts import Inventory, LayerParts
from moe_ops.hf.models.known import Unknown, entry_of, own_class
from moe_ops.hf.models.norms import RmsNorm
from moe_ops.hf.models.routers import TopkRouter


class Stock(NamedTuple):
    """Modules by name.

    norms, routers, layers: the known ones.
    left: names of other modules of these kinds, and of parts of layers -> reason for which they are
    unchanged.
    """

    norms: dict[str, RmsNorm]
    routers: dict[str, TopkRouter]
    layers: dict[str, LayerParts]
    left: dict[str, str]


def take_stock(model: nn.Module) -> Stock:
    """Returns the known modules of a model, except those that already have a fused class."""
    stock = Stock({}, {}, {}, {})
    inventory = Inventory()
    kinds: dict[str, dict[str, Any]] = {"norm": stock.norms, "router": stock.routers}
    for name, module in model.named_modules():
        kind = None if kind_of(module) is not None else _kind(module)
        if kind is None:
            continue
        try:
            if kind == "layer":
                parts = inventory.layer_parts(module)
                stock.layers[name] = parts
                inner = {f"{name}.{part}": reason for part, reason in parts.left.items()}
                stock.left.update(inner)
            else:
                kinds[kind][name] = inventory.find(kind, module).entry
        except Unknown as error:
            stock.left[name] = str(error)
    return stock


_ENDINGS = {"norm": ("Norm", "NormGated"), "router": ("Router", "Gate", "Gating")}


def _kind(module: nn.Module) -> str | None:
    """Returns the kind of a module to look up or to report; None for all others.

    A known class has its kind from the tables. For other classes, the name only determines the kind
    in the report.
    """
    cls = own_class(type(module))
    for kind in (*_ENDINGS, "layer"):
        try:
            entry_of(kind, cls)
        except Unknown:
            continue
        return kind
    if cls.__module__.startswith("torch.") and not cls.__name__.startswith("Parametrized"):
        return None
    parts = module._modules.keys()
    if {"input_layernorm", "self_attn"} <= parts or {"post_attention_layernorm", "mlp"} <= parts:
        return "layer"
    is_leaf = not parts and bool(module._parameters)
    for kind, endings in _ENDINGS.items():
        if is_leaf and cls.__name__.endswith(endings):
            return kind
    return None
