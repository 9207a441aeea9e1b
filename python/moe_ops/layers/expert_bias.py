"""Auxiliary-loss-free load balancing: a bias used only in expert selection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .ranks import sum_counts
from .router import Router
from .router.quantile import solve_bias

RULES = ("sign", "quantile")


@torch.no_grad()
def update_expert_bias(
    target: nn.Module | Tensor,
    tokens_per_expert: Tensor | None = None,
    *,
    rule: str = "sign",
    rate: float | None = None,
    group: Any = None,
) -> None:
    """Updates the bias that balances expert selection without a loss, in place.

    Call it once per optimizer step, after `optimizer.step()`. For a module, it updates all
    `Router`s with an `expert_bias`. Each has counted the slots of its training forwards since the
    last call (including gradient accumulation, and without counting recomputation twice) and
    restarts from zero. If torch.distributed is initialized, counts are first summed over the ranks
    of `group`, in one all-reduce for all routers, so that all ranks make the same update. A layer
    without slots keeps its bias.

    - "sign": expert_bias[e] += rate * sign(mean load - load of e). Balance is reached gradually.
    - "quantile": the bias with which each expert would have received an equal share of the counted
      tokens, at unchanged token thresholds: the K / E quantile, over the tokens, of the (K + 1)-th
      largest biased score minus the expert's score; then minus the mean over experts. A few steps
      balance a layer. Routers must be made with `bias_bins`; the quantile comes from a histogram,
      and its error is the bin width. The bias must not change otherwise between the forwards and
      the call.

    Args:
        target: a module, or the bias itself, [E] float, then with `tokens_per_expert`.
        tokens_per_expert: [E] counts since the last update; only with a bias, and rule "sign".
        rule: see above.
        rate: for "sign", the step size, default 1e-3 (for long runs, DeepSeek-V3; short runs need
            about 1e-2). For "quantile", the step toward the new bias as a fraction in (0, 1],
            default 1; smaller values average over steps with few tokens.
        group: process group to sum over; None is the default group. With pipeline parallelism, use
            the ranks of the stage, because other stages have other routers.

    Raises:
        ValueError: a module without a router with expert_bias, a tensor without counts or with
            another rule than "sign", a module with counts, counts of another shape than the bias,
            an unknown rule, a rate out of range, or "quantile" with a router without histogram.

    Source: Wang et al. 2024 (auxiliary-loss-free load balancing, arXiv 2408.15664); "quantile":
    Moonshot AI 2026 (Kimi K3 technical report, section 2.3.3 and appendix D).
    """
    if rule not in RULES:
        raise ValueError(
            f"update_expert_bias: rule must be one of {', '.join(RULES)}, got {rule!r}."
        )
    if rate is None:
        rate = 1e-3 if rule == "sign" else 1.0
    if rule == "quantile" and not 0 < rate <= 1:
        raise ValueError(
            f"update_expert_bias: rate must be in (0, 1] with rule 'quantile', got {rate}."
        )
    if isinstance(target, Tensor):
        if rule != "sign":
            raise ValueError(
                "update_expert_bias: rule must be 'sign' with a bias tensor (routers keep the "
                f"histograms of the others), got {rule!r}."
            )
        if tokens_per_expert is None or tokens_per_expert.shape != target.shape:
            got = None if tokens_per_expert is None else list(tokens_per_expert.shape)
            raise ValueError(
                f"update_expert_bias: tokens_per_expert must have the bias's shape "
                f"{list(target.shape)}, got {got}."
            )
        counts = tokens_per_expert.clone()
        sum_counts([counts], group)
        _step(target, counts, rate)
        return
    if tokens_per_expert is not None:
        raise ValueError(
            "update_expert_bias: tokens_per_expert goes with a bias tensor (routers count "
            f"themselves), got it with a {type(target).__name__}."
        )
    routers = [m for m in target.modules() if isinstance(m, Router) and m.expert_bias is not None]
    if not routers:
        raise ValueError(
            "update_expert_bias: target must hold a Router with expert_bias=True, got a "
            f"{type(target).__name__} without one."
        )
    histograms: list[Any] = [getattr(router, "bias_histogram", None) for router in routers]
    if rule == "quantile" and any(histogram is None for histogram in histograms):
        raise ValueError(
            "update_expert_bias: every Router with expert_bias=True must have bias_bins > 0 for "
            "rule 'quantile', got one without."
        )
    loads: list[Any] = [router.tokens_per_expert for router in routers]
    sum_counts(histograms if rule == "quantile" else loads, group)
    for router, histogram, load in zip(routers, histograms, loads, strict=True):
        bias = router.expert_bias
        assert bias is not None
        if rule == "quantile":
            bias.lerp_(solve_bias(histogram, bias, router.top_k), rate)
        else:
            _step(bias, load, rate)
        load.zero_()
        if histogram is not None:
            histogram.zero_()


def _step(bias: Tensor, counts: Tensor, rate: float) -> None:
    # sum - E * load has the sign of mean - load, and is exact in integers.
    bias.add_((counts.sum() - counts.numel() * counts).sign().to(bias), alpha=rate)
