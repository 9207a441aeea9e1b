"""HoME, MMoE and PLE on generated rows that are each used once: structure without overfitting.

Rows are generated on demand, so that there are millions of them, and differences between models are
not due to overfitting. Categories use the features in opposite ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.studies.home.models import RecommenderConfig, build
from bench.studies.home.training import Rows, evaluate
from moe_ops.zoo.home import HoME
from moe_ops.zoo.home.model import multitask_loss

from ..study import Hypothesis, Job, Results, Run, Study
from ..trainer import take_steps
from ..training import DrawnTraining
from .arms import LR, parameters, with_parts

ARMS = ("MMoE*", "PLE*", "HoME*", "HoME* without feature gates")
# A gain in AUC that is relevant for a recommender.
WORTH = 0.002
# Samples for the teacher's biases: enough rows for rates of a thousandth.
CALIBRATION = 200_000


@dataclass(frozen=True)
class Stream:
    """Source and number of rows.

    Attributes:
        rates: of positives, one per task of a category; both categories have the same.
        num_dense, num_ids, cardinality: dense features, categorical ones, values of each.
        expert_hidden, expert_size: of HoME; the others are widened to its parameters.
        steps, batch: of training. test: rows.
    """

    rates: tuple[float, ...] = (0.5, 0.2, 0.07, 0.02)
    num_dense: int = 40
    num_ids: int = 0
    cardinality: int = 1000
    expert_hidden: int = 32
    expert_size: int = 32
    steps: int = 2000
    batch: int = 512
    test: int = 200_000

    @property
    def categories(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(f"{name}{i + 1}" for i in range(len(self.rates))) for name in ("a", "b"))

    def arms(self) -> dict[str, RecommenderConfig]:
        base = RecommenderConfig(
            cardinalities=(self.cardinality,) * self.num_ids,
            num_dense=self.num_dense,
            categories=self.categories,
            expert_hidden=self.expert_hidden,
            expert_size=self.expert_size,
            embedding_size=8,
        )
        every = with_parts(base)
        return {name: every[name] for name in ARMS}


SMALL = Stream()
# Twenty tasks of 0.1 to 5 %, narrow experts, features that are mostly ids: no model converges.
RARE = Stream(
    rates=(0.05, 0.03, 0.02, 0.015, 0.01, 0.007, 0.005, 0.003, 0.002, 0.001),
    num_dense=10,
    num_ids=20,
    expert_hidden=16,
    expert_size=8,
    steps=5000,
    batch=1024,
    test=400_000,
)


class Teacher:
    """Generator of rows, determined by the seed alone.

    A category's tasks share their own wave and read the common one with opposite signs; there is a
    product inside each category, and each task has a linear part and an effect of every id.
    """

    def __init__(self, stream: Stream, seed: int) -> None:
        self.stream = stream
        draw = torch.Generator().manual_seed(seed)
        tasks = 2 * len(stream.rates)
        size = stream.num_dense
        count = min(size, 7 + tasks)
        self.directions = torch.linalg.qr(torch.randn(size, count, generator=draw)).Q
        self.weights = 0.5 * torch.randn(count, tasks, generator=draw)
        shape = (stream.num_ids, stream.cardinality, tasks)
        shared = torch.randn(*shape[:2], 2, generator=draw).repeat_interleave(tasks // 2, -1)
        own = torch.randn(shape, generator=draw)
        self.effects = (shared + 0.5 * own) / max(1, stream.num_ids) ** 0.5
        self.bias = torch.zeros(tasks)
        dense, ids = self._features(CALIBRATION, draw)
        logits = self._logits(dense, ids)
        rates = torch.tensor(stream.rates).repeat(2)
        low, high = torch.full((tasks,), -40.0), torch.full((tasks,), 40.0)
        for _ in range(40):  # The mean increases with the bias.
            middle = (low + high) / 2
            above = (logits + middle).sigmoid().mean(0) > rates
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        self.bias = (low + high) / 2

    def _features(self, rows: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        stream = self.stream
        dense = torch.randn(rows, stream.num_dense, generator=draw)
        ids = torch.randint(stream.cardinality, (rows, stream.num_ids), generator=draw)
        return dense, ids

    def _logits(self, dense: Tensor, ids: Tensor) -> Tensor:
        part = dense @ self.directions
        wave = 2 * torch.sin(2 * part[:, 0])
        found = []
        for category, sign in enumerate((1.0, -1.0)):
            own = 2 * torch.sin(2 * part[:, 1 + category])
            product = part[:, 3 + 2 * category] * part[:, 4 + 2 * category]
            found.append((sign * wave + own + product)[:, None].expand(-1, len(self.stream.rates)))
        logits = torch.cat(found, dim=1) + part @ self.weights
        for feature in range(ids.shape[1]):
            logits = logits + self.effects[feature, ids[:, feature]]
        return logits + self.bias

    def rows(self, count: int, draw: torch.Generator) -> Rows:
        dense, ids = self._features(count, draw)
        chances = self._logits(dense, ids).sigmoid()
        labels = (torch.rand(chances.shape, generator=draw) < chances).float()
        return Rows(ids, dense, labels)


def rarest(model: HoME, rows: Rows) -> dict[str, float]:
    """Returns AUC: the mean over tasks, and over the rarest third of each category's."""
    areas = evaluate(model, rows).auc
    rare = [
        area
        for category in model.config.categories
        for area in [areas[task] for task in category][-max(1, len(category) // 3) :]
    ]
    return {"AUC": sum(areas.values()) / len(areas), "AUC, rare tasks": sum(rare) / len(rare)}


def one(arm: str, stream: Stream) -> Job:
    """Runs one model on the rows of a seed."""

    def perform(seed: int, run: Run) -> dict[str, Any]:
        teacher = Teacher(stream, seed)
        test = teacher.rows(stream.test, torch.Generator().manual_seed(1_000_000 + seed))
        draw = torch.Generator().manual_seed(2_000_000 + seed)
        torch.manual_seed(seed)
        model = build(stream.arms()[arm])
        optimizer = torch.optim.Adam(model.parameters(), lr=LR)
        training = DrawnTraining(run, model, optimizer, draw, {})
        quarter: dict[str, float] = training.found

        def loss(step: int) -> dict[str, Tensor]:
            rows = teacher.rows(stream.batch, draw)
            return {"loss": multitask_loss(model(rows.categorical, rows.dense), rows.labels)}

        def after(step: int, parts: Mapping[str, Tensor]) -> None:
            training.done += 1
            if training.done == stream.steps // 4:
                quarter.update(rarest(model, test))
                model.train()
            run.step(training.done, stream.steps, training.state)

        model.train()
        take_steps(optimizer, loss, range(training.done, stream.steps), after=after)
        last = rarest(model, test)
        row = {
            **last,
            "AUC, a quarter of the rows": quarter["AUC"],
            "parameters": float(parameters(model)),
        }
        return {"rows": {arm: row}}

    return perform


def stream_study(
    name: str, size: str, rank: int, minutes: float, stream: Stream, pilot: bool
) -> Study:
    """Returns a stream study; `pilot`: includes the results of `SMALL`'s pilot seeds."""

    def ahead(
        other: str,
        column: str,
        key: str = "",
        expected: tuple[float, float] | None = None,
        bound: float = 0.0,
    ) -> Hypothesis:
        when = {"AUC": "", "AUC, rare tasks": ", rare tasks"}.get(column, ", a quarter of the rows")

        def of(r: Results) -> list[float]:
            return r.gap("HoME*", other, column)

        points = f"{bound:g} " if bound else ""
        statement = f"HoME* is {points}ahead of {other} in test AUC{when}"
        mean, deviation = (expected if pilot else None) or (None, None)
        said = "seeds 0 to 2" if mean is not None else ""
        return Hypothesis(statement, of, "AUC", bound, False, key, mean, deviation, said)

    hypotheses = [
        ahead("MMoE*", "AUC", "MMoE", (0.00037, 0.00007)),
        ahead("PLE*", "AUC", "PLE", (0.00009, 0.0006)),
        ahead("MMoE*", "AUC", "MMoE by", (0.00037, 0.00007), WORTH),
        ahead("PLE*", "AUC", "PLE by", (0.00009, 0.0006), WORTH),
        ahead("MMoE*", "AUC, rare tasks"),
        ahead("PLE*", "AUC, rare tasks"),
        ahead("MMoE*", "AUC, a quarter of the rows", expected=(0.0015, 0.00076)),
        ahead("PLE*", "AUC, a quarter of the rows"),
        ahead("HoME* without feature gates", "AUC"),
    ]

    def made() -> dict[str, str]:
        rates = ", ".join(f"{100 * rate:g}" for rate in stream.rates)
        return {
            "Data": f"{stream.steps * stream.batch / 1e6:.2g} million rows drawn as they are "
            f"needed, each seen once; two categories of {len(stream.rates)} tasks with {rates} % "
            f"of positives; {stream.num_dense} dense features, {stream.num_ids} of "
            f"{stream.cardinality} ids; {stream.test} test rows",
            "Training": f"Adam {LR:g}, {stream.steps} steps of {stream.batch} rows; the last "
            "weights",
            "Model": f"HoME*: experts of {stream.expert_hidden} and {stream.expert_size}; MMoE* "
            "and PLE* are widened to its number of parameters, embeddings and towers apart",
        }

    runs = {arm: one(arm, stream) for arm in ARMS}
    return Study(name, size, rank, runs, 5, minutes, hypotheses, made)
