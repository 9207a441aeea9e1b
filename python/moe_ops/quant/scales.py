"""Scales of input channels that take the size of the activations into account.

An error in a weight counts by the activation it meets. Multiplying the weights of a channel by s
and its activations by 1 / s changes nothing before rounding, but moves channels with large
activations to where the grid is finer for them. s = (mean |x|)^a, and the exponent a is found by
trying: AWQ (Lin et al. 2023, arXiv 2306.00978), with one s for all experts of a bank, since they
share x.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moe_ops.expert_weights import ExpertInputs, ExpertWeights

from .formats import dequantize_weight, quantize_weight

GRID = 10


class ScaleChoice(NamedTuple):
    """x_scale [H] fp32, what x is multiplied by; errors: (exponent, squared error) as tried."""

    x_scale: Tensor
    exponent: float
    errors: list[tuple[float, float]]


def find_x_scale(
    bank: ExpertWeights,
    inputs: ExpertInputs,
    format: str,
    *,
    grid: int = GRID,
) -> ScaleChoice:
    """Tries the exponents 0, 1 / grid, ..., 1 and keeps the one with the smallest error.

    The error is that of the bank's output with w_gate_up rounded and everything else exact, squared
    and summed over experts and tokens, as if experts of one token erred independently. The exponent
    0 is no scale at all, so the result is never worse than none on `inputs`.

    Args:
        bank: the weights.
        inputs: tokens that the bank has seen; none gives ones.
        format: of the rounding, as `quantize_weight` takes it.
        grid: number of steps; the time is about `grid` times that of quantizing plus running.
    """
    candidates = [i / grid for i in range(grid + 1)]
    used = (inputs.topk_ids >= 0) & (inputs.topk_ids < bank.num_experts)
    x = inputs.x[used.any(-1)].float()
    if not x.shape[0] or not bool(x.any()):
        return ScaleChoice(x.new_ones(bank.hidden_size), 0.0, [])
    size = x.abs().mean(0)
    # Channels that are always 0 must neither divide by 0 nor set the scale of all others.
    size = size.clamp(min=1e-4 * float(size.max()))
    scales = []
    for exponent in candidates:
        s = size**exponent
        scales.append((s.max() * s.min()).sqrt() / s)  # 1 / s, normalized as AWQ does.
    errors = [0.0] * len(candidates)
    for expert, tokens in inputs.tokens_by_expert(bank.num_experts):
        here = inputs.take(tokens)
        weight = bank.gate_up_of(expert)
        exact = bank.run_expert(expert, here, weight)
        for i, x_scale in enumerate(scales):
            rounded = dequantize_weight(*quantize_weight(weight / x_scale, format), format)
            # The same product as with x * x_scale, whatever on_input and biases do.
            y = bank.run_expert(expert, here, rounded * x_scale)
            errors[i] += float((y - exact).double().square().sum())
    best = min(range(len(errors)), key=errors.__getitem__)
    return ScaleChoice(scales[best], candidates[best], list(zip(candidates, errors, strict=True)))
