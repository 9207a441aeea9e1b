"""Counts the experts of tokens under top-p routing, and holds their number at a target.

Letters: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_ops.layers import TopPRouter
from moe_ops.zoo.lm.losses import Routed


def experts_per_token(routing: Sequence[Routed]) -> dict[str, Tensor]:
    """Layer -> number of experts that each token used, [T] int64."""
    return {r.layer: (r.routing.topk_ids >= 0).sum(-1) for r in routing}


class TopPController:
    """Holds the mean number of experts of a token at a target, by moving every router's `top_p`.

    p is a proportional-integral controller of the error, target minus mean over tokens and layers:
    p = p_0 + proportional * error + integral * (sum of errors), kept in [lowest, highest]. The sum
    stops growing while p is at an end that it would push beyond.

    `top_p` is a number of the module and not a tensor: a compiled model may compile again when it
    moves.

    Args:
        model: a module with `TopPRouter`s.
        target: experts per token.
        proportional, integral: gains; p moves by `integral` a step for an error of one expert.
        lowest, highest: range of p.

    Raises:
        ValueError: no such router, or numbers out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        target: float,
        *,
        proportional: float = 0.02,
        integral: float = 0.01,
        lowest: float = 0.05,
        highest: float = 1.0,
    ) -> None:
        self.routers = [m for m in model.modules() if isinstance(m, TopPRouter)]
        if not self.routers:
            raise ValueError(
                f"TopPController: model must hold a TopPRouter, got a "
                f"{type(model).__name__} without one."
            )
        if target < 1:
            raise ValueError(f"TopPController: target must be at least 1, got {target}.")
        if not 0 < lowest <= highest <= 1:
            raise ValueError(
                f"TopPController: lowest and highest must be 0 < lowest <= highest <= 1, got "
                f"{lowest} and {highest}."
            )
        self.target = target
        self.proportional = proportional
        self.integral = integral
        self.lowest = lowest
        self.highest = highest
        self.start = self.routers[0].top_p
        self.sum = 0.0
        self.mean = float("nan")

    @property
    def top_p(self) -> float:
        return self.routers[0].top_p

    @torch.no_grad()
    def step(self, routing: Sequence[Routed], *, group: Any = None) -> float:
        """One step from the routing of a training step; returns the mean number of experts.

        Counts are summed over the ranks of `group` when torch.distributed is in use, so that all
        move p alike.
        """
        counts = torch.cat(list(experts_per_token(routing).values()))
        both = torch.stack([counts.sum(), torch.full_like(counts.sum(), counts.numel())]).double()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(both, group=group)
        used, tokens = both.tolist()
        self.mean = used / max(tokens, 1.0)
        error = self.target - self.mean
        wanted = self.start + self.proportional * error + self.integral * (self.sum + error)
        if self.lowest < wanted < self.highest or (wanted >= self.highest) == (error < 0):
            self.sum += error
        top_p = min(max(wanted, self.lowest), self.highest)
        for router in self.routers:
            router.top_p = top_p
        return self.mean
