"""Multi-task recommenders compared with HoME; they differ in the experts available to each task.

Letters: T rows, V width of a row's features, K tasks, E experts, O expert output.

Sources: Ma et al. 2018 (MMoE, KDD); Tang et al. 2020 (CGC and PLE, RecSys); Li et al. 2023
(adaptive fusion of a task's own experts, arXiv 2304.04959).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops._fields import check_choice
from moe_ops.zoo.home import HoME, HoMEConfig
from moe_ops.zoo.home.layers import GatedLayer, Gates, Trace, ownership, softmax_of_rows
from moe_ops.zoo.home.model import SHARED


@dataclass(frozen=True)
class RecommenderConfig(HoMEConfig):
    """Sizes, and the kind of model.

    Attributes, beside those of `HoMEConfig` (MMoE has shared experts alone):
        model: "shared_bottom", "mmoe", "cgc", "ple", "adammoe" or "home".
        num_layers: levels of PLE.
    """

    model: str = "home"
    num_layers: int = 2

    def check_experts(self) -> None:
        check_choice("RecommenderConfig", "model", self.model, MODELS)
        if self.model == "home":
            super().check_experts()
        has_own = self.model in ("cgc", "ple", "adammoe", "home")
        for name, least in (("num_task", has_own), ("num_shared", not has_own)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"RecommenderConfig: {name} must be at least {int(least)} with {self.model}, "
                    f"got {getattr(self, name)}."
                )
        if self.model == "ple" and self.num_layers < 1:
            raise ValueError(
                f"RecommenderConfig: num_layers must be at least 1, got {self.num_layers}."
            )


class OpenGates(Gates):
    """Gates of which one with a single expert is the constant 1."""

    def __init__(self, mask: Tensor, in_size: int) -> None:
        constant = bool((mask.sum(1) < 2).all())
        # Gates with constant weight 1 have no parameters and draw no random numbers.
        with torch.random.fork_rng(devices=[], enabled=constant):
            super().__init__(mask, in_size)
        if constant:
            self.linear = None

    def forward(self, x: Tensor, input_ids: Sequence[int] | None = None) -> Tensor:
        if self.linear is None:
            return self.mask.to(x.dtype).expand(x.shape[0], -1, -1)
        if not self.has_lone:
            return super().forward(x, input_ids)
        logits = self.linear(x, input_ids)
        alone = self.mask.to(logits.dtype).expand(logits.shape)
        mixed = softmax_of_rows(logits.masked_fill(self.closed, -torch.inf))
        return torch.where(self.lone_rows, alone, mixed)


class _Compared(HoME):
    """A model of HoME's parts, with other experts and gates."""

    config: RecommenderConfig

    def layer(
        self, in_size: int, input_ids: list[int], mask: Tensor, gate_size: int, **options: Any
    ) -> GatedLayer:
        options = {"gates": OpenGates, **options}
        return super().layer(in_size, input_ids, mask, gate_size, **options)


class SharedBottom(_Compared):
    """One network for all tasks and a tower for each. Its width is the width of one expert."""

    def build(self, size: int) -> None:
        mask = torch.ones(1, 1, dtype=torch.bool, device="cpu")
        self.bottom = self.layer(size, [0], mask, size)

    def represent(self, v: Tensor, trace: list[Trace] | None = None) -> Tensor:
        return self.bottom(v[:, None], v, trace=trace).expand(-1, len(self.config.tasks), -1)


class MMoE(_Compared):
    """Shared experts and one softmax gate per task."""

    def build(self, size: int) -> None:
        shape = len(self.config.tasks), self.config.num_shared
        mask = torch.ones(shape, dtype=torch.bool, device="cpu")
        self.mixture = self.layer(size, [0] * self.config.num_shared, mask, size)

    def represent(self, v: Tensor, trace: list[Trace] | None = None) -> Tensor:
        return self.mixture(v[:, None], v, trace=trace)


class PLE(_Compared):
    """Levels of experts per task and shared experts; a task never uses other tasks' experts.

    Below the last level, one more gate mixes all experts into the input of the next level's shared
    experts. A gate reads its task's current input.
    """

    @property
    def levels(self) -> int:
        return self.config.num_layers

    def build(self, size: int) -> None:
        config = self.config
        num_tasks = len(config.tasks)
        owners = task_owners(config)
        # Input k is task k's, the last one the shared experts'.
        input_ids = [num_tasks if owner == SHARED else int(owner) for owner in owners]
        self.stack = nn.ModuleList()
        for level in range(self.levels):
            wanted = [{str(k), SHARED} for k in range(num_tasks)]
            # Without shared experts their input would be unused.
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


class AdaMMoE(_Compared):
    """One gate per task over all experts, including those of other tasks, and a second one over its
    own."""

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
            gates=Gates,
        )

    def represent(self, v: Tensor, trace: list[Trace] | None = None) -> Tensor:
        return self.mixture(v[:, None], v, trace=trace)


MODELS: dict[str, type[HoME]] = {
    "shared_bottom": SharedBottom,
    "mmoe": MMoE,
    "cgc": CGC,
    "ple": PLE,
    "adammoe": AdaMMoE,
    "home": HoME,
}


def build(config: RecommenderConfig) -> HoME:
    """Returns the model selected by `config.model`, with newly initialized weights."""
    return MODELS[config.model](config)


def task_owners(config: RecommenderConfig) -> list[str]:
    """Returns the owners of experts: a task's index or "shared", tasks first."""
    own = [str(k) for k in range(len(config.tasks)) for _ in range(config.num_task)]
    return own + [SHARED] * config.num_shared
