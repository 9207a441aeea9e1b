"""Six multi-task models; they differ in which expert reads what and which task may use it.

Letters: T rows, V width of a row's features, K tasks, C categories, E experts, O expert output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._fields import check_choice

from .._presets import preset
from .layers import FeatureGate, Features, GatedLayer, Towers, Trace, ownership, spread

SHARED = "shared"


@dataclass(frozen=True)
class HoMEConfig:
    """Sizes, and what of HoME to use.

    Attributes:
        cardinalities: values of each categorical feature. num_dense: number of dense features.
        categories: tasks by category, names of tasks in tuples; any grouping, one name once.
        model: "shared_bottom", "mmoe", "cgc", "ple", "adammoe" or "home".
        embedding_size, expert_hidden, expert_size, tower_hidden: widths. An expert is
            input -> expert_hidden -> expert_size.
        num_shared: experts for all tasks (all of MMoE's; 0: "without shared experts").
        num_category: experts of each category, in each of HoME's two levels.
        num_task: experts of each task alone. MMoE has none.
        num_layers: levels of PLE.
        expert_norm: batch normalisation and Swish on experts' outputs, instead of ReLU.
        hierarchy: HoME's masks; without them every gate may use every expert of its level.
        feature_gate: "both", "first" (the first level only) or "none".
        num_lora: low-rank pairs of a feature gate.
        self_gate: HoME's (and AdaMMoE's) second gate over a task's own experts.
    """

    cardinalities: tuple[int, ...] = ()
    num_dense: int = 16
    categories: tuple[tuple[str, ...], ...] = (("a", "b"), ("c",))
    model: str = "home"
    embedding_size: int = 16
    expert_hidden: int = 64
    expert_size: int = 32
    tower_hidden: int = 32
    num_shared: int = 2
    num_category: int = 1
    num_task: int = 1
    num_layers: int = 2
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
        check_choice("HoMEConfig", "model", self.model, MODELS)
        check_choice("HoMEConfig", "feature_gate", self.feature_gate, ("both", "first", "none"))
        needs_own = self.model in ("cgc", "ple", "adammoe", "home")
        if self.num_task < needs_own:
            raise ValueError(
                f"HoMEConfig: num_task must be at least 1 with {self.model}, got {self.num_task}."
            )
        if self.num_shared < (not needs_own):
            raise ValueError(
                f"HoMEConfig: num_shared must be at least {int(not needs_own)} with {self.model}, "
                f"got {self.num_shared}."
            )
        if self.model == "home" and self.num_category < 1:
            raise ValueError(
                f"HoMEConfig: num_category must be at least 1 with home, got {self.num_category}."
            )
        if self.model == "ple" and self.num_layers < 1:
            raise ValueError(f"HoMEConfig: num_layers must be at least 1, got {self.num_layers}.")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the logits' columns."""
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


class MultiTask(nn.Module):
    """Features, what a model makes of them for each task, and the tasks' towers.

    A subclass says how [T, V] becomes the towers' inputs [T, K, O].
    """

    def __init__(self, config: HoMEConfig) -> None:
        super().__init__()
        self.config = config
        self.features = Features(config.cardinalities, config.num_dense, config.embedding_size)
        self.towers = Towers(len(config.tasks), config.expert_size, config.tower_hidden)
        self.build(self.features.size)

    def build(self, size: int) -> None:
        """Makes the layers for inputs of width `size`."""
        raise NotImplementedError

    def represent(self, v: Tensor, trace: list[Trace] | None = None) -> Tensor:
        """[T, V] to [T, K, O]."""
        raise NotImplementedError

    def forward(
        self, categorical: Tensor, dense: Tensor, trace: list[Trace] | None = None
    ) -> Tensor:
        """Logits [T, K].

        Args:
            categorical: [T, F] integers, column f in [0, cardinalities[f]).
            dense: [T, D] floats.
            trace: a list to which each level appends its `Trace`.
        """
        return self.towers(self.represent(self.features(categorical, dense), trace))

    def layer(
        self, in_size: int, input_ids: list[int], mask: Tensor, gate_size: int, **options: Any
    ) -> GatedLayer:
        """Experts and gates of the config's sizes; `options` are the others of `GatedLayer`."""
        config = self.config
        sizes = (in_size, config.expert_hidden, config.expert_size)
        options = {"norm": config.expert_norm, "lone": "one", **options}
        return GatedLayer(*sizes, input_ids, mask, gate_size, **options)


class SharedBottom(MultiTask):
    """One network for all tasks and a tower for each. Its width is that of one expert."""

    def build(self, size: int) -> None:
        mask = torch.ones(1, 1, dtype=torch.bool, device="cpu")
        self.bottom = self.layer(size, [0], mask, size)

    def represent(self, v: Tensor, trace: list[Trace] | None = None) -> Tensor:
        return self.bottom(v[:, None], v, trace=trace).expand(-1, len(self.config.tasks), -1)


class MMoE(MultiTask):
    """Shared experts and one softmax gate a task."""

    def build(self, size: int) -> None:
        shape = len(self.config.tasks), self.config.num_shared
        mask = torch.ones(shape, dtype=torch.bool, device="cpu")
        self.mixture = self.layer(size, [0] * self.config.num_shared, mask, size)

    def represent(self, v: Tensor, trace: list[Trace] | None = None) -> Tensor:
        return self.mixture(v[:, None], v, trace=trace)


class PLE(MultiTask):
    """Levels of experts of one task and experts of all; a task never sees those of other tasks.

    Below the last level, one more gate mixes all experts into what the shared experts of the next
    level read. A gate reads what its task has so far.
    """

    @property
    def levels(self) -> int:
        return self.config.num_layers

    def build(self, size: int) -> None:
        config = self.config
        num_tasks = len(config.tasks)
        owners = task_owners(config)
        # Input k is task k's, the last one that of the shared experts.
        input_ids = [num_tasks if owner == SHARED else int(owner) for owner in owners]
        self.stack = nn.ModuleList()
        for level in range(self.levels):
            wanted = [{str(k), SHARED} for k in range(num_tasks)]
            # Without shared experts nobody would read their input.
            if level + 1 < self.levels and config.num_shared:
                wanted.append(set(owners))
            width = config.expert_size if level else size
            ids = input_ids if level else [0] * len(owners)
            self.stack.append(self.layer(width, ids, ownership(owners, wanted), width))

    def represent(self, v: Tensor, trace: list[Trace] | None = None) -> Tensor:
        x: Tensor = v[:, None]
        for level, layer in enumerate(self.stack):
            assert isinstance(layer, GatedLayer)
            gate_x = x[:, : layer.gates.mask.shape[0]] if level else v
            x = layer(x, gate_x, trace=trace)
        return x


class CGC(PLE):
    """PLE with one level."""

    @property
    def levels(self) -> int:
        return 1


class AdaMMoE(MultiTask):
    """A gate a task over all experts, those of other tasks too, and a second one over its own."""

    def build(self, size: int) -> None:
        owners = task_owners(self.config)
        tasks = [str(k) for k in range(len(self.config.tasks))]
        own = ownership(owners, [{task} for task in tasks])
        every = torch.ones_like(own)
        self.mixture = self.layer(
            size,
            [0] * len(owners),
            every,
            size,
            self_mask=own if self.config.self_gate else None,
            lone="sigmoid",
        )

    def represent(self, v: Tensor, trace: list[Trace] | None = None) -> Tensor:
        return self.mixture(v[:, None], v, trace=trace)


class HoME(MultiTask):
    """Two levels: experts of a category and of all, then of a task, its category and of all.

    Inputs are numbered by category, then the shared one (if there are shared experts), then by
    task in the second level.
    """

    def build(self, size: int) -> None:
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
            lone="sigmoid",
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
            lone="sigmoid",
        )

    def _mask(self, owners: list[str], wanted: list[set[str]]) -> Tensor:
        mask = ownership(owners, wanted)
        return mask if self.config.hierarchy else torch.ones_like(mask)

    def represent(self, v: Tensor, trace: list[Trace] | None = None) -> Tensor:
        x = v[:, None] if self.feature_gate is None else self.feature_gate(v)
        # The gates read the features as they are, not through the feature gate.
        z = self.meta(x, v, trace=trace)
        # Tasks of a category read the same: gates are products over categories, not over tasks.
        own = gate_x = z[:, : len(self.config.categories)]
        if self.config.num_shared:
            gate_x = torch.cat([own, z[:, -1:].expand_as(own)], dim=-1)
        if self.task_feature_gate is None:
            private = spread(own, self.category_of)
        else:
            private = self.task_feature_gate(own, self.category_of)
        inputs = torch.cat([z, private], dim=1)
        return self.task_level(inputs, gate_x, self_x=own, gate_ids=self.category_of, trace=trace)


MODELS: dict[str, type[MultiTask]] = {
    "shared_bottom": SharedBottom,
    "mmoe": MMoE,
    "cgc": CGC,
    "ple": PLE,
    "adammoe": AdaMMoE,
    "home": HoME,
}


def build(config: HoMEConfig) -> MultiTask:
    """The model that `config.model` names, with fresh weights."""
    return MODELS[config.model](config)


def task_owners(config: HoMEConfig) -> list[str]:
    """Who an expert belongs to: a task's number or "shared", tasks first."""
    own = [str(k) for k in range(len(config.tasks)) for _ in range(config.num_task)]
    return own + [SHARED] * config.num_shared


def multitask_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over tasks of the mean binary cross-entropy; labels that are NaN do not count.

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
