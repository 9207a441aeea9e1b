"""Experts from dense feed-forward networks: copies, slices, partly reinitialized neurons.

Letters: T tokens, H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops.layers import Experts, SharedExperts

# Classes of activation functions, in torch and transformers -> activations of `Experts`.
_GATED = {
    "SiLU": "swiglu",
    "SiLUActivation": "swiglu",
    "GELU": "geglu",
    "GELUActivation": "geglu",
    "GELUTanh": "geglu_tanh",
    "ReLU": "reglu",
}
_PLAIN = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
}


def experts_from_dense(ffns: nn.Module | Sequence[nn.Module]) -> Experts:
    """Creates one expert per dense network, in the dtype and on the device of the first.

    Args:
        ffns: networks of equal shapes. Supported are `SharedExperts`, `Experts` (all of its
            experts), and modules with linear maps `gate_proj`, `up_proj` and `down_proj` without
            biases and a function `act_fn`, like Llama's in transformers, or with `fc1`, `fc2`, both
            with or without biases, and `activation_fn`, like the decoder layers of DETR in
            transformers.

    Returns:
        An `Experts` with its own parameters.

    Raises:
        ValueError: no network, an unsupported one, or networks that do not match.
    """
    modules = [ffns] if isinstance(ffns, nn.Module) else list(ffns)
    if not modules:
        raise ValueError("experts_from_dense: ffns must hold at least one network, got none.")
    bank = _bank_of(modules[0])
    for module in modules[1:]:
        bank = bank.append(_bank_of(module))
    return bank


def _bank_of(module: nn.Module) -> Experts:
    if isinstance(module, Experts):
        return module.select(range(module.num_experts))
    if isinstance(module, SharedExperts):
        options = {name: getattr(module, name) for name in ("activation", "alpha", "limit")}
        return _one_expert(module.w_gate_up, module.w_down, options)
    plain = _plain_bank_of(module)
    if plain is not None:
        return plain
    parts: list[Any] = [getattr(module, f"{n}_proj", None) for n in ("gate", "up", "down")]
    kind = type(getattr(module, "act_fn", None)).__name__
    linear = all(isinstance(part, nn.Linear) and part.bias is None for part in parts)
    if not linear or kind not in _GATED:
        raise ValueError(
            "experts_from_dense: ffns must be SharedExperts, Experts, or modules with gate_proj, "
            f"up_proj and down_proj without biases and an act_fn of {', '.join(_GATED)}, or with "
            f"fc1, fc2 and an activation_fn of {', '.join(_PLAIN)}, got {type(module).__name__} "
            f"with {kind}."
        )
    gate_up = torch.cat([parts[0].weight, parts[1].weight])
    return _one_expert(gate_up, parts[2].weight, {"activation": _GATED[kind]})


def _plain_bank_of(module: nn.Module) -> Experts | None:
    """Returns experts from a network with two linear maps; None for another one."""
    first, second = (getattr(module, name, None) for name in ("fc1", "fc2"))
    if not isinstance(first, nn.Linear) or not isinstance(second, nn.Linear):
        return None
    kind = type(getattr(module, "activation_fn", None)).__name__
    if kind not in _PLAIN or (first.bias is None) != (second.bias is None):
        return None
    bias = first.bias is not None
    bank = _one_expert(first.weight, second.weight, {"activation": _PLAIN[kind], "bias": bias})
    for name, value in (("b_gate_up", first.bias), ("b_down", second.bias)):
        if value is not None:
            setattr(bank, name, nn.Parameter(value.detach()[None].clone()))
    return bank


def _one_expert(w_gate_up: Tensor, w_down: Tensor, options: dict[str, Any]) -> Experts:
    hidden, size = w_down.shape
    bank = Experts(1, hidden, size, device="meta", **options)
    for name, weight in (("w_gate_up", w_gate_up), ("w_down", w_down)):
        setattr(bank, name, nn.Parameter(weight.detach()[None].clone()))
    return bank


@torch.no_grad()
def copy_experts(
    bank: Experts,
    num_experts: int,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Experts:
    """Returns `num_experts` experts, with an equal number of adjacent copies of each expert.

    Args:
        bank: n experts.
        num_experts: a multiple of n.
        noise: every weight is multiplied by 1 + noise * (a standard normal number); 0 or more.
        generator: of the noise.

    Raises:
        ValueError: a number that is not a multiple, or a negative noise.

    Source: Komatsuzaki et al. 2022 (sparse upcycling, arXiv 2212.05055).
    """
    number = bank.num_experts
    if num_experts < 1 or num_experts % number:
        raise ValueError(
            f"copy_experts: num_experts must be a multiple of {number}, got {num_experts}."
        )
    if noise < 0:
        raise ValueError(f"copy_experts: noise must be 0 or more, got {noise}.")
    result = bank.select([e for e in range(number) for _ in range(num_experts // number)])
    if noise:
        for weight in (result.w_gate_up, result.w_down):
            weight.mul_(1 + noise * _normal(weight, generator))
    return result


@torch.no_grad()
def reinitialize(
    bank: Experts, ratio: float, *, generator: torch.Generator | None = None
) -> Experts:
    """Reinitializes different hidden neurons in each expert (Drop-Upcycling).

    The weights of a neuron (its row of gate and up, its column of the down projection) are drawn
    from a normal distribution with the mean and the standard deviation of the selected neurons in
    that matrix of that expert. Biases are unchanged.

    Args:
        bank: the experts.
        ratio: fraction of the neurons, in [0, 1]; 0.5 in the paper.
        generator: of the selection and the weights.

    Returns:
        New experts; with ratio 0, equal ones.

    Raises:
        ValueError: a ratio out of range.

    Source: Nakamura et al. 2025 (Drop-Upcycling, arXiv 2502.19261).
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"reinitialize: ratio must be in [0, 1], got {ratio}.")
    result = bank.select(range(bank.num_experts))
    size = bank.intermediate_size
    number = round(ratio * size)
    if not number:
        return result
    for expert in range(bank.num_experts):
        chosen = torch.randperm(size, generator=generator)[:number].to(bank.w_down.device)
        for matrix in neuron_matrices(result, expert):
            old = matrix[chosen].float()
            fresh = _normal(old, generator) * old.std(correction=0) + old.mean()
            matrix[chosen] = fresh.to(matrix.dtype)
    return result


def slice_experts(bank: Experts, num_slices: int, *, order: Tensor | None = None) -> Experts:
    """Slices each expert into `num_slices` experts with I / num_slices neurons, which add up to it.

    Args:
        bank: the experts.
        num_slices: a divisor of I.
        order: [E, I] integers, each row a permutation: neuron j of expert e is taken from order[e,
            j] before slicing, so that runs of I / num_slices are the slices. None: no reordering.
            `k_means_order` and `coactivation_order` compute orders.

    Raises:
        ValueError: a number that does not divide I, or rows that are not permutations.

    Source: Dai et al. 2024 (DeepSeekMoE, arXiv 2401.06066); Zhang et al. 2022 (MoEfication, arXiv
    2110.01786) for clusters.
    """
    if order is not None:
        groups = [[e] for e in range(bank.num_experts)]
        bank = bank.merge(groups, mode="mean", neuron_order=order)
    return bank.split(factor=num_slices, mode="slice")


def neuron_matrices(bank: Experts, expert: int) -> list[Tensor]:
    """Returns views [I, H] of an expert's matrices by neuron: gate and up (or a single one), and
    down."""
    w = bank.w_gate_up[expert]
    up: Sequence[Tensor] = (w,)
    if bank.gated:
        up = (w[0::2], w[1::2]) if bank.interleaved else w.chunk(2)
    return [*up, bank.w_down[expert].t()]


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws normal numbers with a given shape and dtype on the generator's device, equal on all
    devices."""
    device = torch.device("cpu") if generator is None else generator.device
    drawn = torch.randn(like.shape, generator=generator, device=device)
    return drawn.to(like)
