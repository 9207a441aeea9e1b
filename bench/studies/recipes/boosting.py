"""Gradient-boosted networks: small networks are trained one after the other, each on what those
before it left over, and are then one wide network.

Letters: N examples, D features, O outputs, J hidden units of a stage.

Source: Emami and Martinez-Munoz 2023 (Sequential Training of Neural Networks With Gradient
Boosting, IEEE Access, arXiv 1909.12098).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._fields import check_choice

LOSSES = ("squared", "logistic", "softmax")


class BoostedNetwork(nn.Module):
    """F(x) = F_0 + sum over stages of rho_t f_t(x), f_t a network of J hidden units.

    Args:
        loss: "squared" (targets [N, O] floats); "logistic" (targets [N] of 0 and 1, O = 1; the
            probability is sigmoid(2 F)); "softmax" (targets [N] of classes below O).
        in_size, out_size: D and O.
        units: J. rate: of each stage, times its Newton step.
        subsample: share of the examples that a stage is fitted to.
        decay: of the squared weights of a stage, in its fit.
        activation: of the hidden units.
    """

    start: Tensor

    def __init__(
        self,
        loss: str,
        in_size: int,
        out_size: int = 1,
        *,
        units: int = 1,
        rate: float = 1.0,
        subsample: float = 0.5,
        decay: float = 1e-4,
        activation: Callable[[], nn.Module] = nn.Tanh,
    ) -> None:
        super().__init__()
        check_choice("BoostedNetwork", "loss", loss, LOSSES)
        if units < 1 or not 0 < subsample <= 1:
            raise ValueError(
                f"BoostedNetwork: units must be at least 1 and subsample in (0, 1], got {units} "
                f"and {subsample}."
            )
        self.loss, self.in_size, self.out_size = loss, in_size, out_size
        self.units, self.rate, self.subsample, self.decay = units, rate, subsample, decay
        self.activation = activation
        self.register_buffer("start", torch.zeros(out_size))
        self.stages = nn.ModuleList()
        self.steps: list[float] = []

    def fit(
        self, x: Tensor, y: Tensor, stages: int, *, iterations: int = 50, seed: int = 0
    ) -> list[float]:
        """Adds stages, each fitted to the residuals by L-BFGS.

        Args:
            x: [N, D]. y: as the loss says.
            stages: to add. iterations: of L-BFGS in each.
            seed: of initial weights and subsamples.

        Returns:
            The mean loss after each.
        """
        generator = torch.Generator().manual_seed(seed)
        if not self.stages:
            self.start.copy_(self._best_constant(y))
        with torch.no_grad():
            total = self(x)
        history = []
        for _ in range(stages):
            residual = self._residual(total, y)
            stage = self._new_stage(generator)
            count = max(1, round(self.subsample * len(x)))
            rows = torch.randperm(len(x), generator=generator)[:count].to(x.device)
            self._fit_stage(stage.to(x), x[rows], residual[rows], iterations)
            with torch.no_grad():
                f = stage(x)
                step = self.rate * self._newton(f[rows], total[rows], residual[rows])
                total = total + step * f
            self.stages.append(stage.requires_grad_(False))
            self.steps.append(step)
            history.append(float(self.mean_loss(total, y)))
        return history

    def mean_loss(self, scores: Tensor, y: Tensor) -> Tensor:
        """Returns the mean loss of F [N, O]: half the squared error, log(1 + exp(-2 y F)) with y =
        -1 or 1, or cross-entropy."""
        if self.loss == "squared":
            return 0.5 * F.mse_loss(scores, y.reshape(scores.shape).to(scores.dtype))
        if self.loss == "logistic":
            return F.softplus(-2 * _signs(y) * scores[:, 0]).mean()
        return F.cross_entropy(scores, y)

    def forward(self, x: Tensor, stages: int | None = None) -> Tensor:
        """F [N, O] after so many stages, or after all."""
        total = self.start.to(x.dtype).expand(x.shape[0], -1)
        for stage, step in list(zip(self.stages, self.steps, strict=True))[:stages]:
            total = total + step * stage(x)
        return total

    def merged(self, stages: int | None = None) -> nn.Sequential:
        """One network of J units a stage with the same outputs: input weights side by side, output
        weights times their steps, biases summed."""
        chosen = list(zip(self.stages, self.steps, strict=True))[:stages]
        wide: Any = nn.Sequential(
            nn.Linear(self.in_size, self.units * len(chosen)),
            self.activation(),
            nn.Linear(self.units * len(chosen), self.out_size),
        ).to(self.start)
        parts: list[Any] = [stage for stage, _ in chosen]
        steps = [step for _, step in chosen]
        with torch.no_grad():
            wide[2].bias.copy_(self.start)
            if parts:
                wide[0].weight.copy_(torch.cat([p[0].weight for p in parts]))
                wide[0].bias.copy_(torch.cat([p[0].bias for p in parts]))
                last = [s * p[2].weight for s, p in zip(steps, parts, strict=True)]
                wide[2].weight.copy_(torch.cat(last, dim=1))
                for s, p in zip(steps, parts, strict=True):
                    wide[2].bias.add_(p[2].bias, alpha=s)
        return wide

    # ------------------------------------------------------------------------------------ stages

    def _best_constant(self, y: Tensor) -> Tensor:
        if self.loss == "squared":
            return y.reshape(len(y), -1).to(self.start).mean(0)
        if self.loss == "logistic":
            share = y.to(self.start).mean().clamp(1e-6, 1 - 1e-6)
            return share.logit()[None] / 2
        return torch.zeros_like(self.start)

    def _residual(self, scores: Tensor, y: Tensor) -> Tensor:
        """-dL/dF of each example, [N, O]."""
        if self.loss == "squared":
            return y.reshape(scores.shape).to(scores.dtype) - scores
        if self.loss == "logistic":
            signs = _signs(y)[:, None]
            return 2 * signs * torch.sigmoid(-2 * signs * scores)
        return F.one_hot(y, self.out_size).to(scores.dtype) - scores.softmax(1)

    def _newton(self, f: Tensor, scores: Tensor, residual: Tensor) -> float:
        """sum f r / sum f^T H f, the best step along f by the second derivatives H; 0 where f gives
        nothing."""
        if self.loss == "squared":
            below = f.square()
        elif self.loss == "logistic":
            below = f.square() * residual.abs() * (2 - residual.abs())
        else:
            p = scores.softmax(1)
            below = (p * f.square()).sum(1) - (p * f).sum(1).square()
        total = float(below.sum())
        return float((f * residual).sum()) / total if total > 1e-30 else 0.0

    def _new_stage(self, generator: torch.Generator) -> nn.Sequential:
        stage: Any = nn.Sequential(
            nn.Linear(self.in_size, self.units),
            self.activation(),
            nn.Linear(self.units, self.out_size),
        )
        with torch.no_grad():
            for linear in (stage[0], stage[2]):
                bound = linear.in_features**-0.5
                linear.weight.uniform_(-bound, bound, generator=generator)
                linear.bias.uniform_(-bound, bound, generator=generator)
        return stage  # type: ignore[no-any-return]

    def _fit_stage(self, stage: Any, x: Tensor, residual: Tensor, iterations: int) -> None:
        optimizer = torch.optim.LBFGS(
            stage.parameters(), max_iter=iterations, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            weights = stage[0].weight.square().sum() + stage[2].weight.square().sum()
            loss = F.mse_loss(stage(x), residual) + self.decay * weights
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]


def _signs(y: Tensor) -> Tensor:
    return 2.0 * y.float() - 1.0
