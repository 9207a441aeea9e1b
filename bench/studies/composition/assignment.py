"""Assignment of models to categories under a budget: a mixed-integer linear program.

Letters: C categories, M models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ops.zoo.composition import Composition


@dataclass(frozen=True)
class Assignment:
    """Assignment. models [C]: the model of each category. kept: models that are used or required,
    in order. value: sum over categories of count * score."""

    models: Tensor
    kept: tuple[int, ...]
    value: float


def assign(
    scores: Tensor,
    counts: Tensor,
    sizes: Sequence[float],
    *,
    budget: float | None = None,
    mean_budget: float | None = None,
    required: Sequence[int] = (),
) -> Assignment:
    """Returns the assignment of categories to models with the highest total score.

    Maximizes sum_c counts[c] * scores[c, x_c], x_c the model of category c, with HiGHS by
    scipy.optimize.milp. If several assignments reach the maximum, any of them is returned. HiGHS
    accepts budgets exceeded by less than a millionth.

    Args:
        scores: [C, M], higher is better: win rates, accuracies, minus losses. Finite.
        counts: [C], at least 0: prompts of each category, or their fractions.
        sizes: parameters of the models, above 0.
        budget: maximum total size of all kept models; None: no bound.
        mean_budget: maximum mean over `counts` of the size used by a prompt; None: no bound.
        required: models that are kept even if unused, such as the generalist. They count in
            `budget`.

    Raises:
        ImportError: scipy is not installed.
        ValueError: invalid shapes or values, or infeasible budgets.
    """
    scores, counts = scores.double(), counts.double()
    size = torch.as_tensor(sizes, dtype=torch.float64)
    _check(scores, counts, size, required)
    optimize, sparse, np = _scipy()
    num_categories, num_models = scores.shape
    # Variables: x[c, m], category c uses model m, then y[m], model m is kept; all 0 or 1.
    num_x = num_categories * num_models
    value = (counts[:, None] * scores).flatten()
    one_model = sparse.kron(sparse.eye(num_categories), np.ones((1, num_models)))
    rows = [sparse.hstack([one_model, sparse.csr_matrix((num_categories, num_models))])]
    low, high = [np.ones(num_categories)], [np.ones(num_categories)]
    # x[c, m] <= y[m].
    to_model = sparse.kron(np.ones((num_categories, 1)), sparse.eye(num_models))
    rows.append(sparse.hstack([sparse.eye(num_x), -to_model]))
    low.append(np.full(num_x, -np.inf))
    high.append(np.zeros(num_x))

    def bound(coefficients: Tensor, limit: float) -> None:
        if not limit > 0:
            raise ValueError(f"assign: budget and mean_budget must be above 0, got {limit}.")
        # Scaled by the limit: the solver's tolerances are absolute.
        rows.append(sparse.csr_matrix((coefficients / limit).numpy()[None]))
        low.append(np.array([-np.inf]))
        high.append(np.array([1.0]))

    if budget is not None:
        bound(torch.cat([size.new_zeros(num_x), size]), budget)
    if mean_budget is not None:
        share = counts / counts.sum()
        used = (share[:, None] * size).flatten()
        bound(torch.cat([used, size.new_zeros(num_models)]), mean_budget)
    least = np.zeros(num_x + num_models)
    least[[num_x + m for m in required]] = 1
    largest = float(value.abs().max())
    found = optimize.milp(
        np.concatenate([-(value / largest if largest else value).numpy(), np.zeros(num_models)]),
        integrality=np.ones(num_x + num_models),
        bounds=optimize.Bounds(least, np.ones(num_x + num_models)),
        constraints=optimize.LinearConstraint(
            sparse.vstack(rows, format="csr"), np.concatenate(low), np.concatenate(high)
        ),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise ValueError(
            f"assign: budget and mean_budget must leave an assignment, got {budget} and "
            f"{mean_budget} for sizes {size.tolist()} of which {list(required)} are required."
        )
    chosen = torch.from_numpy(found.x[:num_x]).view(num_categories, num_models).argmax(-1)
    kept = tuple(sorted({*chosen.tolist(), *required}))
    total = float((counts * scores.gather(1, chosen[:, None])[:, 0]).sum())
    return Assignment(chosen, kept, total)


def assign_models(
    composition: Composition, scores: Tensor, counts: Tensor, **settings: Any
) -> Assignment:
    """Assigns models to a composition's categories under its budget; the generalist is always kept.

    Args:
        scores: [C, M], higher is better. counts: [C], prompts of each category.
        settings: `budget`, `mean_budget` and `required` of `assign`, instead of the config's.
    """
    settings.setdefault("budget", composition.config.budget or None)
    settings.setdefault("required", (composition.generalist,))
    found = assign(scores, counts, composition.config.sizes, **settings)
    composition.model_of.copy_(found.models)
    return found


def _check(scores: Tensor, counts: Tensor, size: Tensor, required: Sequence[int]) -> None:
    if scores.dim() != 2 or 0 in scores.shape or not bool(scores.isfinite().all()):
        raise ValueError(
            f"assign: scores must be finite [C, M] with C, M >= 1, got shape {list(scores.shape)}."
        )
    num_categories, num_models = scores.shape
    if counts.shape != (num_categories,) or bool((counts < 0).any()) or not bool(counts.any()):
        raise ValueError(
            f"assign: counts must be [{num_categories}], at least 0 and not all 0, got "
            f"{counts.tolist()}."
        )
    if size.shape != (num_models,) or bool((size <= 0).any()):
        raise ValueError(f"assign: sizes must be {num_models} above 0, got {size.tolist()}.")
    if any(not 0 <= m < num_models for m in required):
        raise ValueError(f"assign: required must be in [0, {num_models}), got {list(required)}.")


def _scipy() -> Any:
    try:
        import numpy
        from scipy import optimize, sparse
    except ModuleNotFoundError as error:
        raise ImportError(
            f"bench.studies: the assignment needs {error.name}, which is not installed: "
            "pip install torch-moe-ops[studies]"
        ) from error
    return optimize, sparse, numpy
