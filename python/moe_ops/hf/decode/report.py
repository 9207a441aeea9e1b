"""Reports of which parts of a model run on moe_ops."""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_ops.hf.decode.fused import is_intact, kind_of
from moe_ops.hf.decode.known_parts import LayerParts
from moe_ops.hf.decode.step import KIND, reason_of
from moe_ops.hf.decode.stock import take_stock
from moe_ops.hf.experts.switch import status
from moe_ops.layers.linear import FewRowsLinear
from moe_ops.quant import QuantizedLinear


class Report(dict[str, str]):
    """Name of each module that runs on moe_ops -> what it is.

    Attributes:
        left: name of each norm, router, attention, network, block or layer that is left as
            transformers has it -> why.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.left: dict[str, str] = {}

    def __str__(self) -> str:
        """Returns a line a module, the reasons behind them."""
        lines = [f"{name}: {how}" for name, how in self.items()]
        return "\n".join(lines + [f"{name}: left alone ({why})" for name, why in self.left.items()])


def report(model: nn.Module) -> Report:
    """Returns what runs on moe_ops in a model now, and why the rest does not.

    Works before and after :func:`moe_ops.hf.optimize`. After some use it also says, for a layer
    whose last call was not computed in a few calls, why that was so: a long prompt, hooks, another
    class in the place of a part, a cache of another kind.

    Args:
        model: a transformers model, or any module that holds MoE blocks of one.

    Returns:
        What each module is, and in `left` the reasons.
    """
    found = Report(status(model))
    for name in [n for n, state in found.items() if not state.startswith("moe_ops")]:
        found.left[name] = f"its experts run on {found.pop(name)}; see moe_ops.hf.enable"
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind in ("norm", "router", KIND):
            if is_intact(module):
                found[name] = f"fused {kind}"
            else:
                found.left[name] = "the code of its class was replaced"
        elif isinstance(module, QuantizedLinear):
            found[name] = module.format
        elif isinstance(module, FewRowsLinear):
            found[name] = "few rows"
        if kind == KIND and (reason := reason_of(module)) is not None:
            found.left[name] = f"in its last call: {reason}"
        parts = module.__dict__.get("_moe_ops_fused")
        if isinstance(parts, LayerParts):
            found.left |= {f"{name}.{part}": why for part, why in parts.left.items()}
    stock = take_stock(model)  # A part of a fused layer has its reason above.
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
