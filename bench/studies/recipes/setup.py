"""Shared parts of the studies of the recipes: digits, small networks, studies of one run a seed.

Digits are the 1,797 images of 8 x 8 that scikit-learn has as a file, which is read without it.
"""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..study import Hypothesis, Job, Results, Run, Study

# Of all steps; tests make it small.
SCALE = 1.0
BATCH = 64
ALL = "all arms of a seed"
Rows = dict[str, dict[str, float | None]]


def steps_of(count: int) -> int:
    return max(2, round(count * SCALE))


class Split(NamedTuple):
    """x [N, D] and y [N] of a training and of a test part."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@cache
def _digits() -> tuple[Tensor, Tensor]:
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise ImportError(
            "digits: needs the package scikit-learn, of which a file is read: "
            "pip install --no-deps scikit-learn"
        )
    path = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(path, "rt") as lines:
        table = torch.tensor([[float(v) for v in line.split(",")] for line in lines])
    return table[:, :-1] / 16, table[:, -1].long()


def digits(seed: int, test: int = 600) -> Split:
    """Pixels in [0, 1]; the seed says which 600 are the test."""
    x, y = _digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    return Split(x[test:], y[test:], x[:test], y[:test])


def batches(x: Tensor, y: Tensor, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,), generator=draw)
        yield x[rows], y[rows]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    return float((model(x).argmax(1) == y).double().mean())


def mlp(sizes: list[int]) -> nn.Sequential:
    """Linear maps with ReLU between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def study(
    name: str,
    size: str,
    rank: int,
    minutes: float,
    perform: Callable[[int], Rows],
    hypotheses: list[Hypothesis],
    setting: dict[str, str],
    seeds: int = 10,
) -> Study:
    def job(seed: int, run: Run) -> dict[str, Any]:
        return {"rows": perform(seed)}

    runs: dict[str, Job] = {ALL: job}
    return Study(f"recipes-{name}", size, rank, runs, seeds, minutes, hypotheses, lambda: setting)


def ahead(a: str, b: str, column: str = "test accuracy") -> Callable[[Results], list[float]]:
    return lambda r: r.gap(a, b, column)
