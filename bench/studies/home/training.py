"""Training and evaluation of multi-task recommenders: batches, AUC and GAUC, a loop with early
stopping.

Letters: N rows, F categorical features, D dense features, K tasks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moe_ops._fields import check_choice
from moe_ops.zoo.home.model import HoME, multitask_loss

from ..progress import bar
from ..trainer import take_steps


@dataclass
class Rows:
    """Table of examples.

    Attributes:
        categorical: [N, F] integers.
        dense: [N, D] floats.
        labels: [N, K] of 0 and 1, NaN where unknown.
        users: [N] integers, the user of each row; for GAUC. None: GAUC is not computed.
    """

    categorical: Tensor
    dense: Tensor
    labels: Tensor
    users: Tensor | None = None

    def __post_init__(self) -> None:
        sizes = [t.shape[0] for t in (self.categorical, self.dense, self.labels)]
        sizes += [] if self.users is None else [self.users.shape[0]]
        if len(set(sizes)) != 1:
            raise ValueError(
                "Rows: categorical, dense, labels and users must have one number of rows, got "
                f"{sizes}."
            )

    def __len__(self) -> int:
        return self.labels.shape[0]

    def batches(
        self, size: int, generator: torch.Generator | None = None, *, drop_single: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields (categorical, dense, labels) in order, or shuffled with a CPU generator.

        `drop_single` drops a last batch of one row, which batch normalization cannot train on.
        """
        order = None
        if generator is not None:
            order = torch.randperm(len(self), generator=generator).to(self.labels.device)
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            if drop_single and stop - start == 1 and len(self) > 1:
                return
            rows = slice(start, stop) if order is None else order[start:stop]
            yield self.categorical[rows], self.dense[rows], self.labels[rows]


def auc(scores: Tensor, labels: Tensor) -> float:
    """Returns the area under the ROC curve: the fraction of (1, 0) pairs in correct order, ties
    count half.

    Args:
        scores, labels: [N]; rows with a NaN label are left out.

    Returns:
        NaN if there is only one class.
    """
    groups = torch.zeros(scores.shape[0], dtype=torch.long, device=scores.device)
    areas, _ = _auc_by_group(scores, labels, groups)
    return float(areas[0]) if areas.numel() else math.nan


def gauc(scores: Tensor, labels: Tensor, users: Tensor) -> float:
    """Returns the mean AUC of users' own impressions, weighted by their number.

    Users with one class are excluded. NaN if no user has both.

    Source: Zhou et al. 2018 (Deep Interest Network, arXiv 1706.06978).
    """
    areas, counts = _auc_by_group(scores, labels, users)
    valid = ~areas.isnan()
    if not bool(valid.any()):
        return math.nan
    weights = counts[valid].double()
    return float((areas[valid] * weights).sum() / weights.sum())


def _auc_by_group(scores: Tensor, labels: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Returns AUC (fp64, NaN with one class) and number of rows of each group, by the rank sum."""
    known = ~labels.isnan()
    scores, labels, groups = scores[known].double(), labels[known].double(), groups[known]
    _, group = groups.unique(return_inverse=True)
    if not group.numel():
        return scores.new_empty(0), group
    # By group, then by score: two stable sorts.
    order = scores.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    scores, labels, group = scores[order], labels[order], group[order]
    counts = group.bincount()
    starts = counts.cumsum(0) - counts
    # Rows of equal group and score share the mean of their ranks.
    new = torch.ones_like(group, dtype=torch.bool)
    new[1:] = (scores[1:] != scores[:-1]) | (group[1:] != group[:-1])
    run = new.long().cumsum(0) - 1
    length = run.bincount()
    first = length.cumsum(0) - length
    rank = first.double() + (length.double() + 1) / 2
    rank = rank[run] - starts[group]
    num_groups = counts.shape[0]
    zeros = torch.zeros(num_groups, dtype=torch.float64, device=scores.device)
    positives = zeros.index_add(0, group, labels)
    rank_sum = zeros.index_add(0, group, rank * labels)
    negatives = counts - positives
    pairs = positives * negatives
    area = (rank_sum - positives * (positives + 1) / 2) / pairs
    return torch.where(pairs > 0, area, torch.nan), counts


@torch.no_grad()
def predict(model: nn.Module, rows: Rows, batch_size: int = 8192) -> Tensor:
    """Returns probabilities [N, K], computed in `eval()`; the model's mode is restored
    afterwards."""
    before = model.training
    model.eval()
    try:
        parts = [model(c, d).sigmoid() for c, d, _ in rows.batches(batch_size)]
    finally:
        model.train(before)
    return torch.cat(parts)


@dataclass
class Scores:
    """AUC and GAUC by task, and the loss; NaN for undefined values."""

    auc: dict[str, float]
    gauc: dict[str, float]
    loss: float

    @property
    def mean_auc(self) -> float:
        return _mean(self.auc)

    @property
    def mean_gauc(self) -> float:
        return _mean(self.gauc)


def _mean(values: dict[str, float]) -> float:
    finite = [v for v in values.values() if not math.isnan(v)]
    return sum(finite) / len(finite) if finite else math.nan


def evaluate(model: HoME, rows: Rows, batch_size: int = 8192) -> Scores:
    """Returns the scores of a model on a table."""
    probs = predict(model, rows, batch_size)
    tasks = model.config.tasks
    columns = list(zip(tasks, probs.unbind(1), rows.labels.unbind(1), strict=True))
    areas = {task: auc(p, y) for task, p, y in columns}
    by_user = {}
    if rows.users is not None:
        by_user = {task: gauc(p, y, rows.users) for task, p, y in columns}
    # logit of 1 is infinite in fp32; the loss of the prediction is finite.
    logits = probs.double().clamp(1e-12, 1 - 1e-12).logit()
    return Scores(areas, by_user, float(multitask_loss(logits, rows.labels.double())))


@dataclass
class History:
    """History of `fit`: losses and validation scores by epoch, and the kept epoch."""

    train_loss: list[float] = field(default_factory=list)
    valid: list[Scores] = field(default_factory=list)
    best_epoch: int = -1


def check_range(model: HoME, categorical: Tensor) -> None:
    """Raises ValueError for a value outside its feature's range; reads the data."""
    limits = model.features.limits
    bad = (categorical < 0) | (categorical >= limits)
    if bool(bad.any()):
        column = int(bad.any(0).nonzero()[0])
        worst = categorical[:, column]
        raise ValueError(
            f"fit: categorical column {column} must be in [0, {int(limits[column])}), got "
            f"{int(worst.min())} to {int(worst.max())}."
        )


def fit(
    model: HoME,
    train: Rows,
    valid: Rows,
    *,
    epochs: int = 20,
    batch_size: int = 2048,
    lr: float = 1e-3,
    weight_decay: float = 1e-6,
    patience: int = 3,
    monitor: str = "auc",
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Trains with Adam on the unweighted sum of the tasks' losses; keeps the best epoch's weights.

    Args:
        model, train, valid: on one device.
        epochs: maximum.
        batch_size: shuffled anew each epoch; a last batch of one row is left out.
        lr, weight_decay: of Adam.
        patience: epochs without a better score after which training ends; at least 1.
        monitor: "auc" or "gauc" (means over the tasks, higher is better) or "loss" of `valid`.
        seed: of the shuffling; the model itself uses torch's generator.
        progress: show a bar.

    Returns:
        A History. The model holds the weights and statistics of `best_epoch` (from 0).

    Raises:
        ValueError: invalid arguments, values outside a feature's range, an undefined score, or a
            loss that is not finite.
    """
    check_choice("fit", "monitor", monitor, ("auc", "gauc", "loss"))
    if patience < 1 or epochs < 1 or batch_size < 2:
        raise ValueError(
            "fit: patience and epochs must be at least 1 and batch_size at least 2, got "
            f"{patience}, {epochs} and {batch_size}."
        )
    for rows in (train, valid):
        check_range(model, rows.categorical)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
    history, best, best_state = History(), -math.inf, None
    size = math.ceil(len(train) / batch_size)
    if len(train) > 1 and len(train) % batch_size == 1:
        size -= 1
    drawn = (
        rows
        for _ in range(epochs)
        for rows in train.batches(batch_size, generator, drop_single=True)
    )
    total, seen, count = torch.zeros((), device=train.labels.device), 0, 0

    def loss(step: int) -> dict[str, Tensor]:
        nonlocal count
        categorical, dense, labels = next(drawn)
        count = len(labels)
        return {"loss": multitask_loss(model(categorical, dense), labels)}

    before = model.training
    model.train()
    with bar(epochs * size, f"fit {type(model).__name__}", progress) as shown:

        def after(step: int, parts: Mapping[str, Tensor]) -> bool:
            nonlocal total, seen, best, best_state
            total, seen = total + parts["loss"].detach() * count, seen + count
            shown.update()
            if (step + 1) % size:
                return False
            epoch, scores = step // size, evaluate(model, valid)
            history.train_loss.append(float(total) / max(seen, 1))
            history.valid.append(scores)
            total, seen = torch.zeros_like(total), 0
            value = {"auc": scores.mean_auc, "gauc": scores.mean_gauc, "loss": -scores.loss}[
                monitor
            ]
            if math.isnan(value):
                raise ValueError(
                    f"fit: valid must have rows of both classes (and users for gauc) to monitor "
                    f"{monitor}, got NaN."
                )
            shown.set_postfix(**{monitor: f"{abs(value):.4f}"})
            if value > best:
                best, history.best_epoch = value, epoch
                best_state = copy.deepcopy(model.state_dict())
            return epoch - history.best_epoch >= patience

        take_steps(optimizer, loss, range(epochs * size), after=after)
    assert best_state is not None
    model.load_state_dict(best_state)
    model.train(before)
    return history
