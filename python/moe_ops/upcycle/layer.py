"""A mixture-of-experts layer initialized from a dense network.

Letters: H hidden size, I intermediate size, E experts, K experts per token, N slices per copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops.layers import MoE, Router, TopKRouter

from .experts import copy_experts, experts_from_dense, reinitialize, slice_experts


@torch.no_grad()
def paired_router(
    hidden_size: int,
    num_experts: int,
    top_k: int,
    *,
    num_slices: int = 1,
    std: float = 0.02,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Router:
    """Creates a router with which copies, or sliced copies, compute the function of the dense
    network.

    Weights are a softmax over the K selected experts (they sum to 1), times N. If N divides K, each
    row is drawn once and repeated for the N adjacent slices of a copy: the slices of a copy tie, so
    the K best are K / N whole copies, each with equal weights on its slices. If N does not divide
    K, all rows are drawn, and the layer's output is N times a weighted mean of K slices.

    Args:
        hidden_size, num_experts, top_k: H, E and K.
        num_slices: N, a divisor of E.
        std: standard deviation of the normally distributed rows.
        generator: of the rows.
        options: of `Router`.

    Raises:
        ValueError: N that does not divide E.

    Source of the repeated rows: He et al. 2024 (virtual group initialization, arXiv 2410.07524).
    """
    if num_slices < 1 or num_experts % num_slices:
        raise ValueError(
            f"paired_router: num_slices must divide num_experts = {num_experts}, got {num_slices}."
        )
    router = TopKRouter(
        hidden_size,
        num_experts,
        top_k,
        renormalize=True,
        routed_scaling_factor=float(num_slices),
        device=device,
        dtype=dtype,
        **options,
    )
    repeat = num_slices if top_k % num_slices == 0 else 1
    rows = torch.randn(num_experts // repeat, hidden_size, generator=generator) * std
    router.weight.copy_(rows.repeat_interleave(repeat, dim=0))
    return router


def preserves(
    num_sources: int, top_k: int, *, num_slices: int = 1, noise: float = 0.0, ratio: float = 0.0
) -> bool:
    """Returns whether `upcycle_ffn` with these arguments initially equals the dense network, up to
    rounding."""
    return num_sources == 1 and not noise and not ratio and top_k % num_slices == 0


def upcycle_ffn(
    ffns: nn.Module | Sequence[nn.Module],
    num_experts: int,
    top_k: int,
    *,
    num_slices: int = 1,
    order: Tensor | None = None,
    noise: float = 0.0,
    ratio: float = 0.0,
    router_std: float = 0.02,
    generator: torch.Generator | None = None,
    **router_options: Any,
) -> MoE:
    """Creates a `MoE` whose experts are initialized from dense networks.

    The networks are copied E / N times in total (several networks equally often), some neurons of
    the copies are reinitialized, and each copy is cut into N slices. With one network, no noise,
    ratio 0 and N a divisor of K, the layer computes the function of the network, up to rounding.

    Args:
        ffns: one network or several, such as specialists from one seed (branch-train-mix), see
            `experts_from_dense`.
        num_experts, top_k: E and K; E is a multiple of N times the number of networks.
        num_slices: N, a divisor of I; experts have I / N neurons.
        order: [number of networks, I], the neurons' order before slicing, see `slice_experts`.
        noise: see `copy_experts`. ratio: see `reinitialize`.
        router_std, router_options: see `paired_router`.
        generator: of all random numbers.

    Raises:
        ValueError: numbers that do not divide, or networks that do not match.

    Source: Komatsuzaki et al. 2022 (arXiv 2212.05055); Sukhbaatar et al. 2024 (Branch-Train-MiX,
    arXiv 2403.07816); Nakamura et al. 2025 (Drop-Upcycling, arXiv 2502.19261); He et al. 2024
    (fine-grained upcycling, arXiv 2410.07524).
    """
    bank = experts_from_dense(ffns)
    each = num_slices * bank.num_experts
    if num_slices < 1 or num_experts < 1 or num_experts % each:
        raise ValueError(
            f"upcycle_ffn: num_experts must be a multiple of num_slices = {num_slices} times the "
            f"{bank.num_experts} networks, got {num_experts}."
        )
    if order is not None:
        order = order.repeat_interleave(num_experts // each, dim=0)
    bank = copy_experts(bank, num_experts // num_slices, noise=noise, generator=generator)
    bank = slice_experts(reinitialize(bank, ratio, generator=generator), num_slices, order=order)
    router = paired_router(
        bank.hidden_size,
        num_experts,
        top_k,
        num_slices=num_slices,
        std=router_std,
        generator=generator,
        device=bank.w_down.device,
        dtype=bank.w_down.dtype,
        **router_options,
    )
    return MoE(router, bank)
