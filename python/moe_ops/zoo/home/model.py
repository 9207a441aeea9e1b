"""The model HoME and its loss.

Letters: T rows, V width of a row's features, K tasks, C categories, E experts, O expert output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._fields import check_choice, check_least

from .._presets import preset
from .layers import FeatureGate, Features, GatedLayer, Towers, Trace, ownership, spread

SHARED = "shared"


@dataclass(frozen=True)
class HoMEConfig:
    """Sizes, and the parts of HoME to use.

    Attributes:
        cardinalities: values of each categorical feature. num_dense: number of dense features.
        categories: tasks by category, names of tasks in tuples; any grouping, one name once.
        embedding_size, expert_hidden, expert_size, tower_hidden: widths. An expert is
            input -> expert_hidden -> expert_size.
        num_shared: experts for all tasks; 0: "without shared experts".
        num_category: experts of each category, in each of HoME's two levels.
        num_task: experts of each task alone.
        expert_norm: batch normalization and Swish on experts' outputs, instead of ReLU.
        hierarchy: HoME's masks; without them every gate may use every expert of its level.
        feature_gate: "both", "first" (the first level only) or "none".
        num_lora: low-rank pairs of a feature gate.
        self_gate: the second gate, over a task's own experts.
    """

    cardinalities: tuple[int, ...] = ()
    num_dense: int = 16
    categories: tuple[tuple[str, ...], ...] = (("a", "b"), ("c",))
    embedding_size: int = 16
    expert_hidden: int = 64
    expert_size: int = 32
    tower_hidden: int = 32
    num_shared: int = 2
    num_category: int = 1
    num_task: int = 1
    expert_norm: bool = True
    hierarchy: bool = True
    feature_gate: str = "both"
    num_lora: int = 2
    self_gate: bool = True

    def __post_init__(self) -> None:
        tasks = self.tasks
        if not tasks or len(set(tasks)) != len(tasks) or any(not c for c in self.categories):
            raise ValueError(
                "HoMEConfig: categories must be tuples of at least one task, each task once, got "
                f"{self.categories}."
            )
        check_choice("HoMEConfig", "feature_gate", self.feature_gate, ("both", "first", "none"))
        self.check_experts()

    def check_experts(self) -> None:
        """Raises ValueError for impossible numbers of experts."""
        for name, least in (("num_shared", 0), ("num_category", 1), ("num_task", 1)):
            check_least("HoMEConfig", name, getattr(self, name), least)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Returns task names, in the order of the logits' columns."""
        return tuple(task for category in self.categories for task in category)

    tiny = preset(
        "For tests and tries.",
        cardinalities=(20, 7),
        num_dense=3,
        expert_hidden=16,
        expert_size=8,
    )
    wide = preset(
        "Eight tasks in two categories, 16 experts in the last level; ten categorical features.",
        cardinalities=(1000,) * 10,
        num_dense=0,
        categories=(("a", "b", "c", "d"), ("e", "f", "g", "h")),
        num_category=3,
    )


class HoME(nn.Module):
    """Two levels of experts: shared and per category, then shared, per category and per task.

    Inputs are numbered by category, then the shared one (if there are shared experts), then, in the
    second level, by task.
    """

    def __init__(self, config: HoMEConfig) -> None:
        super().__init__()
        self.config = config
        self.features = Features(config.cardinalities, config.num_dense, config.embedding_size)
        self.towers = Towers(len(config.tasks), config.expert_size, config.tower_hidden)
        self.build(self.features.size)

    def build(self, size: int) -> None:
        """Creates the experts and gates for inputs of width `size`."""
        config = self.config
        num_categories, num_tasks = len(config.categories), len(config.tasks)
        self.num_inputs = num_categories + bool(config.num_shared)
        self.category_of = [c for c, tasks in enumerate(config.categories) for _ in tasks]
        categories = [f"c{c}" for c in range(num_categories)]
        groups = categories + [SHARED] * bool(config.num_shared)

        owners = [c for c in categories for _ in range(config.num_category)]
        owners += [SHARED] * config.num_shared
        first_gate = config.feature_gate != "none"
        self.feature_gate = (
            FeatureGate(self.num_inputs, size, config.num_lora) if first_gate else None
        )
        wanted = [{c, SHARED} for c in categories] + [set(owners)] * bool(config.num_shared)
        self.meta = self.layer(
            size,
            [groups.index(owner) if first_gate else 0 for owner in owners],
            self._mask(owners, wanted),
            size,
            self_mask=ownership(owners, [{g} for g in groups]) if config.self_gate else None,
        )

        width = config.expert_size
        tasks = [f"t{t}" for t in range(num_tasks)]
        owners = owners + [t for t in tasks for _ in range(config.num_task)]
        inputs = groups + tasks
        self.task_feature_gate = (
            FeatureGate(num_tasks, width, config.num_lora)
            if config.feature_gate == "both"
            else None
        )
        wanted = [{t, categories[c], SHARED} for t, c in zip(tasks, self.category_of, strict=True)]
        self.task_level = self.layer(
            width,
            [inputs.index(owner) for owner in owners],
            self._mask(owners, wanted),
            width * (1 + bool(config.num_shared)),
            self_mask=ownership(owners, [{t} for t in tasks]) if config.self_gate else None,
            self_gate_size=width,
        )

    def layer(
        self, in_size: int, input_ids: list[int], mask: Tensor, gate_size: int, **options: Any
    ) -> GatedLayer:
        """Returns experts and gates with the config's sizes; `options` are other options of
        `GatedLayer`."""
        config = self.config
        sizes = (in_size, config.expert_hidden, config.expert_size)
        return GatedLayer(*sizes, input_ids, mask, gate_size, norm=config.expert_norm, **options)

    def _mask(self, owners: list[str], wanted: list[set[str]]) -> Tensor:
        mask = ownership(owners, wanted)
        return mask if self.config.hierarchy else torch.ones_like(mask)

    def forward(
        self, categorical: Tensor, dense: Tensor, trace: list[Trace] | None = None
    ) -> Tensor:
        """Returns logits [T, K].

        Args:
            categorical: [T, F] integers, column f in [0, cardinalities[f]).
            dense: [T, D] floats.
            trace: a list to which each level appends its `Trace`.
        """
        return self.towers(self.represent(self.features(categorical, dense), trace))

    def represent(self, v: Tensor, trace: list[Trace] | None = None) -> Tensor:
        """Maps [T, V] to the towers' inputs [T, K, O]."""
        x = v[:, None] if self.feature_gate is None else self.feature_gate(v)
        # The gates read the unmodified features, not the feature gate's output.
        z = self.meta(x, v, trace=trace)
        # Tasks of a category have one input: gates are matmuls over categories, not over tasks.
        own = gate_x = z[:, : len(self.config.categories)]
        if self.config.num_shared:
            gate_x = torch.cat([own, z[:, -1:].expand_as(own)], dim=-1)
        if self.task_feature_gate is None:
            private = spread(own, self.category_of)
        else:
            private = self.task_feature_gate(own, self.category_of)
        inputs = torch.cat([z, private], dim=1)
        return self.task_level(inputs, gate_x, self_x=own, gate_ids=self.category_of, trace=trace)


def multitask_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the sum over tasks of the mean binary cross-entropy, ignoring labels that are NaN.

    Args:
        logits: [T, K]. labels: [T, K] in [0, 1], or NaN where unknown.

    Returns:
        A scalar. A task without any known label adds 0.
    """
    known = ~labels.isnan()
    losses = F.binary_cross_entropy_with_logits(
        logits, labels.where(known, torch.zeros_like(labels)), reduction="none"
    )
    counts = known.sum(0).clamp(min=1)
    return ((losses * known).sum(0) / counts).sum()
