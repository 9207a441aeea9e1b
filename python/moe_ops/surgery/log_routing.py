"""Routing statistics in the logs of transformers' Trainer, and functions shared with
`lightning`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moe_ops.layers import ExpertLoadStats
from moe_ops.layers.recompute import in_backward
from moe_ops.surgery.routed_layer import RoutedLayer
from moe_ops.surgery.routed_layers import find_routed_layers


def log_routing(
    trainer: Any, *, layers: Sequence[str] | None = None, every_layer: bool = False
) -> ExpertLoadStats:
    """Adds routing statistics since the last entry to each training entry of a Trainer's log.

    They appear in the progress bar, in `trainer.state.log_history`, and in the targets of
    `report_to` (TensorBoard, Weights & Biases, ...). Names are ``moe/max_violation``,
    ``moe/dead_experts`` and ``moe/load_entropy``: the mean over layers, the sum for dead experts;
    see `moe_ops.layers.ExpertLoadStats`. Counts are summed over all processes at each entry. Tokens
    of evaluation and of recomputation are not counted.

    Example:
        trainer = Trainer(model, arguments, train_dataset=rows)
        moe_ops.surgery.log_routing(trainer)
        trainer.train()

    Args:
        trainer: of a model with routed layers (`moe_ops.surgery.find_routed_layers`), switched to
            moe_ops or not.
        layers: shell patterns of the names of layers; None is all.
        every_layer: also add ``moe/max_violation/<name>`` and ``moe/load_entropy/<name>`` of each
            layer.

    Returns:
        The statistics since the last entry, which resets them.

    Raises:
        ValueError: the model has no routed layer.
    """
    stats = ExpertLoadStats()
    count_in_training(stats, find_routed_layers(trainer.model, layers, caller="log_routing"))
    log = trainer.log

    def with_routing(logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        if "loss" in logs and len(stats):  # A training entry, not one of evaluation or of the end.
            measured = stats.all_reduce().as_dict()
            stats.reset()
            logs = {**logs, **summary(measured, every_layer)}
        return log(logs, *args, **kwargs)

    trainer.log = with_routing
    return stats


def count_in_training(stats: ExpertLoadStats, layers: Sequence[RoutedLayer]) -> list[Any]:
    """Adds the layers' routing in training to `stats`, without recomputation; returns handles whose
    `remove` ends it."""

    def watcher(layer: RoutedLayer) -> Any:
        def watch(x: Tensor, routing: Any) -> None:
            if layer.block.training and not in_backward():
                stats.update(routing.topk_ids, layer.num_experts, layer=layer.name)

        return watch

    return [handle for layer in layers for handle in layer.watch(watcher(layer))]


def summary(measured: dict[Any, dict[str, Any]], every_layer: bool) -> dict[str, float]:
    """Returns the entries of a log, from `ExpertLoadStats.as_dict`."""

    def mean(name: str) -> float:
        return sum(layer[name] for layer in measured.values()) / len(measured)

    found = {
        "moe/max_violation": mean("max_violation"),
        "moe/load_entropy": mean("load_entropy"),
        "moe/dead_experts": float(sum(len(m["dead_experts"]) for m in measured.values())),
    }
    if every_layer:
        for name in ("max_violation", "load_entropy"):
            found |= {f"moe/{name}/{layer}": m[name] for layer, m in measured.items()}
    return found
