"""`moe_ops.layers.Experts` for the quantiser.

Letters: E experts.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_ops.layers import Experts, QuantizedExperts

from .bank import BankInputs, FloatBank, register_adapter, replace_module
from .convert import check_sizes


class _ExpertsAdapter:
    def bank(self, module: nn.Module) -> FloatBank | None:
        if not isinstance(module, Experts) or module.output_size != module.hidden_size:
            return None
        names = ("activation", "interleaved", "alpha", "limit")
        return FloatBank(
            (module.w_gate_up,),
            module.w_down,
            module.b_gate_up,
            module.b_down,
            {name: getattr(module, name) for name in names},
        )

    def inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BankInputs:
        names = ("x", "topk_weights", "topk_ids")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return BankInputs(**given)

    def new(self, bank: FloatBank, **config: Any) -> QuantizedExperts:
        return new_quantized(QuantizedExperts, bank, **config)

    def install(self, root: nn.Module, module: nn.Module, experts: QuantizedExperts) -> nn.Module:
        return replace_module(root, module, experts)


def new_quantized(
    cls: type[QuantizedExperts], bank: FloatBank, *, format: str, **config: Any
) -> QuantizedExperts:
    """A layer of the sizes of `bank`; raises ValueError for sizes that the groups do not divide."""
    check_sizes("", bank, config.get("group_size"))
    return cls(
        bank.num_experts,
        bank.hidden_size,
        bank.intermediate_size,
        format=format,
        bias=bank.b_down is not None,
        device=bank.down.device,
        dtype=None if bank.b_down is None else bank.b_down.dtype,
        **config,
        **bank.activation,
    )


register_adapter(_ExpertsAdapter())
