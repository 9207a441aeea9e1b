"""Data of the HoME experiment: MovieLens 100k with seven tasks, and generated rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bench.studies import movielens as files
from bench.studies.home.training import Rows

# Tasks by category.
GENERATED_TASKS = (("a", "b"), ("c", "d"))
FILM_TASKS = (("like", "love", "hate", "one"), ("continue", "end", "slow"))


class Table(NamedTuple):
    """Rows for training, for epoch selection and for the report, with the sizes for the config."""

    name: str
    train: Rows
    valid: Rows
    test: Rows
    cardinalities: tuple[int, ...]
    categories: tuple[tuple[str, ...], ...]

    @property
    def num_dense(self) -> int:
        return self.train.dense.shape[1]


def generated(seed: int, num_rows: int = 30000, num_features: int = 40) -> Table:
    """Generates two categories that use the features in opposite ways; positive rates 50, 20, 5, 2
    %.

    A category's tasks share their own wave and read the common one with opposite signs; each task
    adds a linear part. Labels are drawn at these log-odds, shifted to the task's rate.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_features, generator=generator)
    users = torch.randint(num_rows // 50, (num_rows,), generator=generator)
    directions = torch.linalg.qr(torch.randn(num_features, 8, generator=generator)).Q
    part = x @ directions
    taste = 0.5 * torch.randn(int(users.max()) + 1, 2, generator=generator)[users]
    rates, columns = (0.5, 0.2, 0.05, 0.02), []
    for task, rate in enumerate(rates):
        category = task // 2
        sign = 1.0 if category == 0 else -1.0
        logit = 2 * sign * torch.sin(2 * part[:, 0]) + 2 * torch.sin(2 * part[:, 1 + category])
        logit = logit + part[:, 4 + task] + taste[:, category]
        columns.append(_draw(logit, rate, generator))
    labels = torch.stack(columns, dim=1)
    rows = Rows(users[:, None], x, labels, users)
    cuts = (int(0.6 * num_rows), int(0.8 * num_rows))
    parts = [_take(rows, s) for s in (slice(0, cuts[0]), slice(*cuts), slice(cuts[1], None))]
    return Table("generated", *parts, (int(users.max()) + 1,), GENERATED_TASKS)


def _draw(logit: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    low, high = -30.0, 30.0
    for _ in range(40):  # The mean increases with the shift.
        shift = (low + high) / 2
        low, high = (low, shift) if (logit + shift).sigmoid().mean() > rate else (shift, high)
    return (torch.rand(logit.shape, generator=generator) < (logit + shift).sigmoid()).float()


def _take(rows: Rows, which: slice | Tensor) -> Rows:
    assert rows.users is not None
    return Rows(*(t[which] for t in (rows.categorical, rows.dense, rows.labels, rows.users)))


# ------------------------------------------------------------------------------- MovieLens 100k


def movielens() -> Table | None:
    """Returns MovieLens 100k from the installed package recbole; None if it is not installed.

    The files are read in place: GroupLens' terms do not allow redistribution. Rows are ordered by
    user and time. Tasks of preference: like (rating of at least 4), love (5), hate (at most 2), one
    (1). Tasks of engagement: continue (the next rating within 15 s), end (none or later than 10
    min), slow (1 to 10 min). Each user's last fifth is the test, and the last 12 % of the rest are
    for epoch selection. No feature uses data after the row.
    """
    folder = files.folder()
    if folder is None:
        return None
    ratings = files.read(folder / "ml-100k.inter")
    ratings.sort(key=lambda row: (int(row[0]), float(row[3]), int(row[1])))
    people = {row[0]: row for row in files.read(folder / "ml-100k.user")}
    films = {row[0]: row for row in files.read(folder / "ml-100k.item")}
    jobs = _numbers(row[3] for row in people.values())
    genres = _numbers(g for row in films.values() for g in row[3].split())
    users = torch.tensor([int(row[0]) for row in ratings])
    times = torch.tensor([float(row[3]) for row in ratings], dtype=torch.float64)
    stars = torch.tensor([float(row[2]) for row in ratings])

    same = users[1:] == users[:-1]
    gap = torch.where(same, times[1:] - times[:-1], torch.inf)
    after = torch.cat([gap, gap.new_full((1,), torch.inf)])
    before = torch.cat([gap.new_full((1,), torch.inf), gap])
    first = torch.cat([same.new_ones(1), ~same])
    start = torch.arange(len(users))[first]
    which_user = first.long().cumsum(0) - 1
    position = torch.arange(len(users)) - start[which_user]
    count = which_user.bincount()[which_user]
    labels = [stars >= 4, stars == 5, stars <= 2, stars == 1]
    labels += [after <= 15, after > 600, (after >= 60) & (after <= 600)]

    columns = [
        users,
        torch.tensor([int(row[1]) for row in ratings]),
        torch.tensor([int(float(people[row[0]][1])) // 10 for row in ratings]),
        torch.tensor([int(people[row[0]][2] == "F") for row in ratings]),
        torch.tensor([jobs[people[row[0]][3]] for row in ratings]),
        torch.tensor([_decade(films[row[1]][2]) for row in ratings]),
        (times / 3600).long() % 24,
        before.clamp(1, 1e6).log2().long(),
    ]
    categorical = torch.stack(columns, dim=1)
    many = torch.zeros(len(users), len(genres))
    for i, row in enumerate(ratings):
        for genre in films[row[1]][3].split():
            many[i, genres[genre]] = 1
    dense = torch.cat([many, (position.float() + 1).log()[:, None] / 5], dim=1)
    rows = Rows(categorical, dense, torch.stack(labels, dim=1).float(), users)
    share = position / count
    cut = 0.8 * 0.88
    parts = [_take(rows, m) for m in (share < cut, (share >= cut) & (share < 0.8), share >= 0.8)]
    limits = tuple(int(c) + 1 for c in categorical.amax(0))
    return Table("MovieLens 100k", *parts, limits, FILM_TASKS)


def _numbers(words: object) -> dict[str, int]:
    return {word: i for i, word in enumerate(sorted(set(words)))}  # type: ignore[call-overload]


def _decade(year: str) -> int:
    return max(int(year) - 1910, 0) // 10 if year.strip().isdigit() else 0
