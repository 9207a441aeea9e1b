"""The comparison of one case: calls by name, checks of their results, missing baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Rows that are compared with fp64: each row of a block needs its experts' weights in fp64.
_CHECKED = 8


@dataclass
class Problem:
    """Calls of a case. `check` gives the relative error of a result; above `tolerance` it is
    rejected."""

    jobs: dict[str, Callable[[], Any]]
    check: Callable[[Any], float]
    tolerance: float
    absent: dict[str, str] = field(default_factory=dict)


def relative(value: Tensor, truth: Tensor) -> float:
    """Returns the Frobenius norm of the difference over that of the truth; nan if shapes differ."""
    value, truth = value.detach(), truth.detach()
    if value.shape != truth.shape:
        return float("nan")
    error, norm = (value.double() - truth.double()).norm(), truth.double().norm()
    return float(error / norm) if norm > 0 else float(error)


def worst(errors: Iterable[float]) -> float:
    """Returns the largest error; nan if one is, which max would lose."""
    errors = list(errors)
    return float("nan") if any(e != e for e in errors) else max(errors)


def gradient_check(by_x: Callable[[Tensor], float]) -> Callable[[tuple[Tensor, ...]], float]:
    """Checks gradients: the first one, determined by a few rows of the input, with `by_x` against a
    reference; the others against our result, which has passed that check."""
    first: list[Tensor] = []

    def check(gradients: tuple[Tensor, ...]) -> float:
        by_first, *others = gradients
        samples = [t[:, ::61].float() if t.dim() == 3 else t.float() for t in others]
        if not first:
            first.extend(samples)
        pairs = zip(samples, first, strict=True)
        return worst([by_x(by_first), *(relative(a, b) for a, b in pairs)])

    return check


def sampled(count: int, device: torch.device) -> Tensor:
    """Returns indices of the first and the last row and some between."""
    rows = torch.linspace(0, count - 1, min(count, _CHECKED), dtype=torch.float64)
    return rows.round().long().unique().to(device)
