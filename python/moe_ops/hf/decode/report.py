"""Reports of the parts of a model that run on moe_ops."""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_ops.hf.decode.fused import is_intact, kind_of
from moe_ops.hf.decode.known_parts import LayerParts
from moe_ops.hf.decode.step import KIND, reason_of
from moe_ops.hf.decode.stock import take_stock
from moe_ops.hf.experts.cached import cache_of
from moe_ops.hf.experts.streamed import streams_from
from moe_ops.hf.experts.switch import status
from moe_ops.layers.linear import FewRowsLinear
from moe_ops.quant import QuantizedLinear
from moe_ops.quant.stored_linear import StoredLinear


class Report(dict[str, str]):
    """Name of each module that runs on moe_ops -> its implementation.

    Attributes:
        left: name of each norm, router, attention, network, block or layer that transformers runs
            -> reason.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.left: dict[str, str] = {}

    def __str__(self) -> str:
        """Returns one line per module, followed by the reasons."""
        lines = [f"{name}: {how}" for name, how in self.items()]
        return "\n".join(lines + [f"{name}: left alone ({why})" for name, why in self.left.items()])


def report(model: nn.Module) -> Report:
    """Returns the modules of a model that currently run on moe_ops, and the reasons for all others.

    It works before and after :func:`moe_ops.hf.optimize`. After some calls it also states, for a
    layer whose last call was not fused, the reason: a long prompt, hooks, another class of a
    submodule, another kind of cache.

    Args:
        model: a transformers model, or any module with MoE blocks of one.

    Returns:
        The implementation of each module, and the reasons in `left`.
    """
    found = Report(status(model))
    for name in [n for n, state in found.items() if not state.startswith("moe_ops")]:
        found.left[name] = f"its experts run on {found.pop(name)}; see moe_ops.hf.enable"
    for name, module in model.named_modules():
        kind = kind_of(module)
        if name in found and (tokens := streams_from(module)) is not None:
            found[name] += f", streamed to the GPU from {tokens} tokens"
        if name in found and (cache := cache_of(module)) is not None:
            found[name] += f", {cache.num_slots} experts cached on the GPU"
        if kind in ("norm", "router", KIND):
            if is_intact(module):
                found[name] = f"fused {kind}"
            else:
                found.left[name] = "the code of its class was replaced"
        elif isinstance(module, StoredLinear):
            found[name] = module.format.label
        elif isinstance(module, QuantizedLinear):
            found[name] = module.format
        elif isinstance(module, FewRowsLinear):
            found[name] = "few rows"
        if kind == KIND and (reason := reason_of(module)) is not None:
            found.left[name] = f"in its last call: {reason}"
        parts = module.__dict__.get("_moe_ops_fused")
        if isinstance(parts, LayerParts):
            found.left |= {f"{name}.{part}": why for part, why in parts.left.items()}
    stock = take_stock(model)  # A submodule of a fused layer has its reason above.
    for name, why in stock.left.items():
        if name not in found:
            found.left.setdefault(name, why)
    for kind, modules in (
        ("norm", stock.norms),
        ("router", stock.routers),
        ("layer", stock.layers),
    ):
        for name in modules:
            if name not in found:
                found.left.setdefault(name, f"a known {kind}; moe_ops.hf.optimize fuses it")
    return found
