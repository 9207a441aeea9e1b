"""Dense networks of transformers that `gated_mlp_decode` computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from moe_ops.hf.models.gates import fused_gate
from moe_ops.hf.models.known import add_table, register, unexpected_parts


@dataclass(frozen=True)
class GatedNetwork:
    """Network down_proj(act_fn(gate_proj(x)) * up_proj(x)), without biases.

    limit: name of a bound of gate and up, which must be None.
    """

    limit: str | None = None

    def why_not(self, network: nn.Module) -> str | None:
        """Returns why this module does not compute the formula; None if it does."""
        names = {f"{name}_proj" for name in ("gate", "up", "down")}
        reason = unexpected_parts(network, names, {"act_fn"})
        if reason is not None:
            return reason
        if self.limit is not None and network.__dict__.get(self.limit) is not None:
            return "its gate and up must have no bounds"
        for name in sorted(names):
            part: Any = network._modules[name]
            if not isinstance(part, nn.Linear) or part.bias is not None:
                return f"{name} must be a linear layer without a bias"
        if self.activation(network) is None:
            return "its activation is none that gated_mlp_decode has"
        return None

    def activation(self, network: Any) -> str | None:
        """Returns the name in gated_mlp_decode of the current activation; None if it has none."""
        gate = fused_gate(network._modules.get("act_fn") or network.__dict__.get("act_fn"))
        return None if gate is None else gate["activation"]


add_table(
    "network",
    {
        # Nearly all families with such a network.
        "1513f7d96870": GatedNetwork(),
        # Bailing from transformers 5.25 on
        "8ea3ecd56bb7": GatedNetwork("limit"),
    },
)


def register_network(cls: type[nn.Module]) -> None:
    """Registers a class as a gated network: down_proj(act_fn(gate_proj(x)) * up_proj(x)).

    Args:
        cls: a class of modules with these four submodules and no biases.

    Raises:
        TypeError: `cls` is not a class of modules.
    """
    register("network", cls, GatedNetwork())
