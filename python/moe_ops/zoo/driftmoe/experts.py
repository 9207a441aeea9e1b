"""Experts that learn from one example at a time, and their labels for training the router.

Letters: E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Protocol

from torch import Tensor

from moe_ops._fields import check_choice

EXPERTS = ("tree", "adaptive_tree")


class StreamExpert(Protocol):
    """Interface of an expert; every classifier of river has it."""

    def predict_proba_one(self, x: Any) -> Mapping[Any, float]:
        """Returns class -> probability; missing classes have 0, and an untrained expert returns
        {}."""
        ...

    def learn_one(self, x: Any, y: Any) -> Any: ...


def hoeffding_tree(
    kind: str = "tree", grace_period: int = 50, delta: float = 1e-7, seed: int = 0
) -> StreamExpert:
    """Creates a tree of river.

    Args:
        kind: "tree", a Hoeffding tree; "adaptive_tree", which replaces branches when an ADWIN
            detector finds a rising error.
        grace_period: examples that a leaf receives between two attempts to split.
        delta: probability that a split is wrong.
        seed: of an adaptive tree.

    Raises:
        ImportError: river is not installed.
    """
    check_choice("hoeffding_tree", "kind", kind, EXPERTS)
    try:
        from river import tree
    except ModuleNotFoundError as error:
        raise ImportError(
            f"moe_ops.zoo: driftmoe needs {error.name}, which is not installed: "
            "pip install torch-moe-ops[streams]"
        ) from error
    if kind == "tree":
        return tree.HoeffdingTreeClassifier(grace_period=grace_period, delta=delta)
    return tree.HoeffdingAdaptiveTreeClassifier(grace_period=grace_period, delta=delta, seed=seed)


def probability_row(said: Mapping[Hashable, float], classes: Mapping[Hashable, int]) -> list[float]:
    """Returns an expert's prediction as a list with one value per class, in the order of
    `classes`."""
    return [float(said.get(label, 0.0)) for label in classes]


def right_experts(probabilities: Tensor, y: int) -> Tensor:
    """Returns [E] bool: True for experts of [E, C] whose most likely class is `y` (ties: the
    smaller index), among those with any prediction."""
    top, likeliest = probabilities.max(dim=1)
    return (likeliest == y) & (top > 0)


def cooperative_labels(probabilities: Tensor, y: int) -> Tensor:
    """Returns the router's target experts: the correct ones (`right_experts`), or, if there are
    none, the one that gives the true class the highest probability.

    Args:
        probabilities: [E, C] floats, a row of zeros for an untrained expert.
        y: index of the true class, in [0, C).

    Returns:
        [E] of 0 and 1, in the type of `probabilities`, with at least one 1 (ties of experts that
        are all wrong: the smaller id).

    Source: the multi-hot correctness mask of DriftMoE (MoE-Data).
    """
    if probabilities.dim() != 2 or not 0 <= y < probabilities.shape[1]:
        raise ValueError(
            f"cooperative_labels: probabilities must be [E, C] with C above y = {y}, got shape "
            f"{list(probabilities.shape)}."
        )
    right = right_experts(probabilities, y)
    if not bool(right.any()):
        right[probabilities[:, y].argmax()] = True
    return right.to(probabilities.dtype)
