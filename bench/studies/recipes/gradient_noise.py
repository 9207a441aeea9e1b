"""Gradient noise: normal noise of a falling deviation on every gradient.

Source: Neelakantan et al. 2015 (Adding Gradient Noise Improves Learning for Very Deep Networks,
arXiv 1511.06807).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class GradientNoise:
    """Adds N(0, eta / (1 + t)^gamma) to the gradients of step t = 0, 1, ...

    To be called between `backward` and the optimizer's step, after gradients are clipped: clipping
    afterwards would take the noise out again.

    Args:
        parameters: of a model. One whose gradient is None at a step is left alone.
        eta: variance of the first step; 0.01, 0.3 and 1 in the paper. 0 adds nothing.
        gamma: how fast the variance falls.
        generator: on the parameters' device; None draws from torch's own.

    Raises:
        ValueError: eta or gamma is negative.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        eta: float = 0.3,
        gamma: float = 0.55,
        generator: torch.Generator | None = None,
    ) -> None:
        if eta < 0 or gamma < 0:
            raise ValueError(
                f"GradientNoise: eta and gamma must be at least 0, got {eta} and {gamma}."
            )
        self.parameters = list(parameters)
        self.eta, self.gamma, self.generator = eta, gamma, generator
        self.steps = 0

    @property
    def deviation(self) -> float:
        """Returns the standard deviation of the next call: the root of the variance above."""
        return float((self.eta / (1 + self.steps) ** self.gamma) ** 0.5)

    @torch.no_grad()
    def add(self) -> None:
        """Adds the noise of this step to `.grad` of the parameters, in place."""
        for p in self.parameters:
            if p.grad is not None and self.eta:
                noise = torch.empty_like(p.grad).normal_(generator=self.generator)
                p.grad.add_(noise, alpha=self.deviation)
        self.steps += 1

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]
