"""A test bench for what pre-training leaves in a model that is fine-tuned on long-tailed classes.

Logit adjustment answers the imbalance of the classes it is told. What pre-training was short of
is not among them; a sum of the logits of models that were pre-trained on different data averages
over it (the paper's backdoor adjustment, a term of causal inference). The bench trains, sums and
reports accuracies by how frequent a class is.

Letters: N examples, C classes, M models.

Source: Chen et al. 2025 (Rethinking the Bias of Foundation Model under Long-tailed Distribution,
ICML, arXiv 2501.15955); Menon et al. 2021 (Long-tail learning via logit adjustment, ICLR, arXiv
2007.07314).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = ("many", "medium", "few")


def long_tailed_counts(num_classes: int, most: int, ratio: float) -> list[int]:
    """Examples of each class, most ratio^(-c / (C - 1)) rounded, at least 1."""
    if num_classes < 2 or most < 1 or ratio < 1:
        raise ValueError(
            "long_tailed_counts: there must be 2 classes, 1 example and a ratio of 1 at least, got "
            f"{num_classes}, {most} and {ratio}."
        )
    return [max(1, round(most * ratio ** (-c / (num_classes - 1)))) for c in range(num_classes)]


def long_tailed(
    y: Tensor, counts: Sequence[int], generator: torch.Generator | None = None
) -> Tensor:
    """Places of so many examples of each class, drawn without replacement; all of a class that has
    fewer."""
    places = []
    for c, count in enumerate(counts):
        pool = (y == c).nonzero()[:, 0]
        places.append(pool[torch.randperm(len(pool), generator=generator)[:count]])
    return torch.cat(places)


def adjusted_cross_entropy(
    logits: Tensor, y: Tensor, counts: Sequence[int] | Tensor, tau: float = 1.0
) -> Tensor:
    """Cross-entropy of logits + tau log(prior), the prior being the share of each class.

    Args:
        logits: [N, C]. y: [N]. counts: examples of each class in training.
    """
    prior = torch.as_tensor(counts).to(logits)
    return F.cross_entropy(logits + tau * (prior / prior.sum()).log(), y)


def summed_logits(models: Sequence[nn.Module], x: Tensor) -> Tensor:
    """[N, C]: the sum of the logits of M models, each as likely as the others."""
    return torch.stack([model(x) for model in models]).sum(0)


def groups_of(counts: Sequence[int]) -> dict[str, Tensor]:
    """Classes "many", "medium" and "few": thirds of the classes in order of their counts, ties by
    number; where there is a rest the first groups have one more."""
    order = torch.tensor(counts).argsort(descending=True, stable=True)
    return dict(zip(GROUPS, order.tensor_split(3), strict=True))


def accuracy_by_group(logits: Tensor, y: Tensor, groups: dict[str, Tensor]) -> dict[str, float]:
    """Accuracy over the examples of each group of classes, and the mean over classes as "all"."""
    right = (logits.argmax(1) == y).double()
    found = {name: float(right[torch.isin(y, classes)].mean()) for name, classes in groups.items()}
    classes = y.unique()
    found["all"] = float(torch.stack([right[y == c].mean() for c in classes]).mean())
    return found


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    counts: Sequence[int] | None,
    *,
    steps: int,
    rate: float = 1e-3,
    batch: int = 64,
    seed: int = 0,
) -> nn.Module:
    """Adam on shuffled batches, by `adjusted_cross_entropy`, or plain cross-entropy without counts;
    returns the model, in `eval()`."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(x), (min(batch, len(x)),), generator=generator)
        logits = model(x[rows])
        if counts is None:
            loss = F.cross_entropy(logits, y[rows])
        else:
            loss = adjusted_cross_entropy(logits, y[rows], counts)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


def run_bench(
    make: Callable[[], nn.Module],
    upstream: tuple[Tensor, Tensor],
    downstream: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    pretrained_on: Sequence[Sequence[int]],
    counts: Sequence[int],
    pretrain_steps: int = 300,
    steps: int = 300,
    rate: float = 1e-3,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Pre-trains, fine-tunes and compares.

    Args:
        make: a model with fresh weights, [N, ...] -> [N, C].
        upstream, downstream, test: examples and classes; of the first two, subsets are drawn.
        pretrained_on: for each of M models the examples of each class that it is pre-trained on.
        counts: of the classes in fine-tuning.

    Returns:
        Arm -> accuracy by group of `groups_of(counts)`, "all", and "missing upstream", the classes
        that a third of the pre-training sets has least of: "fine-tuned alone" (mean over models,
        without logit adjustment), "adjusted" (with), "sum, one pre-training" (M fine-tunings of
        each pre-trained model, mean over models), "sum, different pre-training".
    """
    generator = torch.Generator().manual_seed(seed)
    rows = long_tailed(downstream[1], counts, generator)
    x, y = downstream[0][rows], downstream[1][rows]
    groups = groups_of(counts)
    how: dict[str, Any] = {"steps": steps, "rate": rate}
    plain, adjusted = [], []
    for i, shares in enumerate(pretrained_on):
        chosen = long_tailed(upstream[1], shares, generator)
        torch.manual_seed(seed + i)
        base = fit(
            make(), upstream[0][chosen], upstream[1][chosen], None,
            steps=pretrain_steps, rate=rate, seed=seed + i,
        )  # fmt: skip
        plain.append(fit(copy.deepcopy(base), x, y, None, **how, seed=seed))
        adjusted.append(
            [fit(copy.deepcopy(base), x, y, counts, **how, seed=seed + 100 * j)
             for j in range(len(pretrained_on))]
        )  # fmt: skip

    def judged(models: Sequence[nn.Module], shares: Sequence[int]) -> dict[str, float]:
        with torch.no_grad():
            logits = summed_logits(models, test[0])
        rare = groups_of(shares)["few"]
        return {
            **accuracy_by_group(logits, test[1], groups),
            "missing upstream": accuracy_by_group(logits, test[1], {"rare": rare})["rare"],
        }

    def mean(found: Sequence[dict[str, float]]) -> dict[str, float]:
        return {name: sum(f[name] for f in found) / len(found) for name in found[0]}

    pairs = list(zip(adjusted, pretrained_on, strict=True))
    different = [models[i] for i, models in enumerate(adjusted)]
    return {
        "fine-tuned alone": mean(
            [judged([m], shares) for m, shares in zip(plain, pretrained_on, strict=True)]
        ),
        "adjusted": mean([judged([models[0]], shares) for models, shares in pairs]),
        "sum, one pre-training": mean([judged(models, shares) for models, shares in pairs]),
        "sum, different pre-training": mean([judged(different, shares) for _, shares in pairs]),
    }
