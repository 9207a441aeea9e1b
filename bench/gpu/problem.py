"""What one case compares: calls by name, how their results are checked, who is not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Problem:
    """`check` gives the relative error of a result; more than `tolerance` is refused."""

    jobs: dict[str, Callable[[], Any]]
    check: Callable[[Any], float]
    tolerance: float
    absent: dict[str, str] = field(default_factory=dict)


def relative(value: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth; nan where shapes differ."""
    value, truth = value.detach(), truth.detach()
    if value.shape != truth.shape:
        return float("nan")
    error, norm = (value.double() - truth.double()).norm(), truth.double().norm()
    return float(error / norm) if norm > 0 else float(error)
