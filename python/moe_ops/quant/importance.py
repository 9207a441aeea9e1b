"""Importance of weights: sums of the squares of the inputs that they are multiplied with.

An error in a weight of input k adds that error times x[k] to an output. Summed over the tokens of a
text, its square counts by the sum of x[k]^2: for an expert over the tokens that are routed to it,
each times the square of its routing weight, with which its output is multiplied.

T tokens, H hidden size, I intermediate size, E experts, D input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._eval_mode import call_model, in_eval
from moe_ops.expert_weights import ExpertInputs, ExpertsHook, ExpertWeights
from moe_ops.layers.functional import plain_activation
from moe_ops.ops import gated_act
from moe_ops.ops.gated_act import GATED_ACTIVATIONS

from .bank import find_banks
from .linear import find_linears


@dataclass
class Importance:
    """Sums of squares of the inputs of weights, by the name of their module.

    linears: [D], float64. experts: of "gate", "up" and "down", [E, D], float64.
    """

    linears: dict[str, Tensor] = field(default_factory=dict)
    experts: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@torch.no_grad()
def collect_importance(
    model: nn.Module,
    inputs: Iterable[Any] | Callable[[nn.Module], Any],
    *,
    routing_weights: bool = True,
) -> Importance:
    """Runs a float model and sums up the squares of what its weights are multiplied with.

    Args:
        model: a float model; not changed.
        inputs: see `collect_calibration`.
        routing_weights: multiply the inputs of an expert by the token's routing weight.

    Raises:
        ValueError: no layer of experts and no dense layer.
    """
    found = Importance()
    handles = []

    def of_linear(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            found.linears[name] = found.linears.get(name, 0) + x.double().square().sum(0)

        return hook

    def of_experts(name: str, hook: ExpertsHook) -> Callable[..., None]:
        def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            bank = hook.weights(module)
            assert bank is not None
            sums = found.experts[name]
            call = hook.inputs(module, args, kwargs)
            if not routing_weights:
                call = call._replace(topk_weights=torch.ones_like(call.topk_weights))
            for e, gate_up, down in _squares(bank, call):
                sums["gate"][e] += gate_up
                sums["down"][e] += down

        return called

    for bank in find_banks(model, unsupported="skip", op="collect_importance"):
        shape = (bank.bank.num_experts, bank.bank.hidden_size)
        gate_up = torch.zeros(shape, dtype=torch.float64)
        down = gate_up.new_zeros(shape[0], bank.bank.intermediate_size)
        found.experts[bank.name] = {"gate": gate_up, "up": gate_up, "down": down}
        hook = of_experts(bank.name, bank.hook)
        handles.append(bank.module.register_forward_pre_hook(hook, with_kwargs=True))
        del bank
    for name, layer in find_linears(model).items():
        handles.append(layer.register_forward_pre_hook(of_linear(name)))
    if not handles:
        raise ValueError(
            f"collect_importance: model must hold float experts or dense layers, got "
            f"{type(model).__name__} without any."
        )
    try:
        with in_eval(model):
            if callable(inputs):
                inputs(model)
            else:
                for batch in inputs:
                    call_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _squares(bank: ExpertWeights, inputs: ExpertInputs) -> Any:
    """Yields each expert that is used, with the sums of its inputs' squares, [H] and [I]."""
    for e, tokens in inputs.tokens_by_expert(bank.num_experts):
        here = inputs.take(tokens)
        weight = torch.where(here.topk_ids == e, here.topk_weights.float(), 0).sum(-1, keepdim=True)
        x = here.x.float()
        if inputs.apply_router_weight_on_input:
            x, weight = x * weight, torch.ones_like(weight)
        biases = bank.biases_of(e)
        h = F.linear(x, bank.gate_up_of(e))
        h = h + biases["b_gate_up"] if "b_gate_up" in biases else h
        options = dict(bank.activation)
        activation = options.pop("activation")
        if activation in GATED_ACTIVATIONS:
            h = gated_act(h, activation, **options)
        else:
            h = plain_activation(h, activation)
        scaled = weight.double()
        yield e, (x * scaled).square().sum(0), (h * scaled).square().sum(0)
