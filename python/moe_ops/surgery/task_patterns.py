"""PreMoe: the experts that a task needs, and the task of a prompt.

Letters: T tokens, L layers, E experts, M kept experts per layer, D tasks.

Source: Pei et al. 2025 (PreMoe, later "Proactive Inference", arXiv 2505.17639).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_ops._eval_mode import in_eval
from moe_ops.layers import Routing

from ._optional import names_in, save_tensors, saved_by
from .criteria import CRITERIA, score_experts, select_experts
from .profile import LayerProfile, profile_experts
from .routed_layers import find_routed_layers

_FORMAT = "moe_ops.surgery.TaskRoutingPatterns 1"
_FROM_ROUTING = ("frequency", "tcess", "tcess_softmax")


class Retrieved(NamedTuple):
    """The task nearest to a prompt, and the distances [D] of all tasks."""

    task: str
    distances: Tensor


class _Reached(Exception):
    """Raised when the last required router has been called."""


@dataclass
class TaskRoutingPatterns:
    """Router statistics of several tasks.

    Attributes:
        tasks: D names.
        layers: L names of routed layers, in the order of the model.
        vectors: [D, L, E] fp64, the mean router logits of a task's tokens.
        scores: [D, L, E] fp64, the importance of each expert for the task.
    """

    tasks: list[str]
    layers: list[str]
    vectors: Tensor
    scores: Tensor

    @classmethod
    def collect(
        cls,
        model: nn.Module,
        tasks: Mapping[str, Iterable[Any]],
        *,
        by: str | Callable[[LayerProfile], Tensor] = "tcess",
    ) -> TaskRoutingPatterns:
        """Collects the patterns by running the model on text of each task.

        Args:
            model: see `profile_experts`; all its routed layers have the same number of experts.
            tasks: name -> inputs of `profile_experts`.
            by: a criterion of `score_experts`.

        Raises:
            ValueError: no task, or layers with different numbers of experts.
        """
        if not tasks:
            raise ValueError("TaskRoutingPatterns: tasks must be at least one, got none.")
        outputs = by not in _FROM_ROUTING
        if isinstance(by, str) and by not in CRITERIA:
            scores_of = ", ".join(CRITERIA)
            raise ValueError(f"TaskRoutingPatterns: by must be one of {scores_of}, got {by!r}.")
        vectors, needed, layers = [], [], []
        for inputs in tasks.values():
            found = profile_experts(model, inputs, outputs=outputs)
            layers = list(found)
            sizes = {layer.num_experts for layer in found.layers.values()}
            if len(sizes) != 1:
                raise ValueError(
                    "TaskRoutingPatterns: all layers must have the same number of experts, got "
                    f"{sorted(sizes)}."
                )
            means = [layer.logit_sum / int(layer.tokens) for layer in found.layers.values()]
            vectors.append(torch.stack(means))
            needed.append(torch.stack(list(score_experts(found, by).values())))
        return cls(list(tasks), layers, torch.stack(vectors), torch.stack(needed))

    def keep(
        self, model: nn.Module, task: str, number: int | float, **options: Any
    ) -> dict[str, list[int]]:
        """Returns the experts that a task needs most, for `prune_experts`, `load_pruned` or `only`.

        Args:
            model: unpruned model with these layers; it may be on the meta device.
            number: M, or a fraction of the experts.
            options: of `select_experts`.

        Raises:
            ValueError: an unknown task, or arguments that `select_experts` rejects.
        """
        if task not in self.tasks:
            raise ValueError(
                f"TaskRoutingPatterns.keep: task must be one of {', '.join(self.tasks)}, got "
                f"{task!r}."
            )
        own = dict(zip(self.layers, self.scores[self.tasks.index(task)], strict=True))
        return select_experts(model, own, number, **options)

    @torch.no_grad()
    def retrieve(self, model: nn.Module, inputs: Any, *, layer: int | None = 0) -> Retrieved:
        """Returns the task whose mean router logits are nearest (L2) to those of a prompt.

        Args:
            model: runs only up to the router of the layer, so that the first layer needs no expert.
            inputs: a batch to call the model with (tokens [B, S], or keyword arguments).
            layer: index of the routed layer to compare: 0 is the first, as published, which sees
                little more than single tokens; -1 the last. None: all layers.
        """
        name = None if layer is None else self.layers[layer]
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def watch(own: str) -> Callable[[Tensor, Routing], None]:
            def watcher(x: Tensor, routing: Routing) -> None:
                logits = routing.router_logits.double().sum(0).cpu()
                sums[own] = sums.get(own, torch.zeros_like(logits)) + logits
                counts[own] = counts.get(own, 0) + len(x)
                if own == name:
                    raise _Reached

            return watcher

        handles: list[Any] = []
        wanted = self.layers if name is None else [name]
        try:
            for routed in find_routed_layers(model, wanted, caller="TaskRoutingPatterns.retrieve"):
                handles += routed.watch(watch(routed.name))
            with in_eval(model):
                model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        unseen = [own for own in wanted if not counts.get(own)]
        if unseen:
            raise ValueError(
                f"TaskRoutingPatterns.retrieve: inputs must reach {unseen[0]!r}, got no token "
                f"there."
            )
        query = torch.cat([sums[own] / counts[own] for own in wanted])
        index = list(range(len(self.layers))) if name is None else [self.layers.index(name)]
        patterns = self.vectors[:, index].flatten(1)
        distances = torch.linalg.vector_norm(patterns - query, dim=1)
        return Retrieved(self.tasks[int(distances.argmin())], distances)

    def save(self, path: Path | str) -> None:
        """Writes one safetensors file: vectors, scores, and order [D, L, E] int64, each layer's
        experts by descending importance."""
        order = self.scores.argsort(dim=-1, descending=True, stable=True)
        tensors = {"vectors": self.vectors, "scores": self.scores, "order": order}
        metadata = {
            "format": _FORMAT,
            "tasks": json.dumps(self.tasks),
            "layers": json.dumps(self.layers),
        }
        save_tensors("TaskRoutingPatterns", path, tensors, metadata)

    @classmethod
    def load(cls, path: Path | str) -> TaskRoutingPatterns:
        """Loads a file of `save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is another kind of file, or does not match its checksum.
        """
        with saved_by("TaskRoutingPatterns", path, _FORMAT) as (tensors, metadata):
            tasks, layers = (names_in(metadata[key]) for key in ("tasks", "layers"))
            vectors, scores = tensors["vectors"], tensors["scores"]
            wanted = (len(tasks), len(layers), vectors.shape[-1])
            if vectors.shape != wanted or scores.shape != wanted:
                raise ValueError(
                    f"its tensors are {list(vectors.shape)} and {list(scores.shape)} for "
                    f"{len(tasks)} tasks and {len(layers)} layers"
                )
            return cls(tasks, layers, vectors, scores)
