"""Records which experts were chosen, and plays choices back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .moe import MoE
from .recompute import RoutingLog
from .routing import Routing


@dataclass
class RoutingRecord:
    """The choices of a model's MoE layers, in the order of their calls.

    layers: name of the layer (as in `named_modules`) -> a `Routing` for each of its calls, detached
        and without logits.
    """

    layers: dict[str, list[Routing]] = field(default_factory=dict)

    def __getitem__(self, layer: str) -> list[Routing]:
        return self.layers[layer]

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def to(self, device: torch.device | str) -> RoutingRecord:
        """A copy with all tensors on `device`."""
        return RoutingRecord(
            {
                name: [
                    Routing(None, c.topk_weights.to(device), c.topk_ids.to(device)) for c in calls
                ]
                for name, calls in self.layers.items()
            }
        )

    def state_dict(self) -> dict[str, list[dict[str, Tensor]]]:
        """Plain containers of tensors, for torch.save and torch.load(weights_only=True)."""
        return {
            name: [{"topk_ids": c.topk_ids, "topk_weights": c.topk_weights} for c in calls]
            for name, calls in self.layers.items()
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, list[dict[str, Tensor]]]) -> RoutingRecord:
        """The inverse of `state_dict`."""
        return cls({n: [Routing(None, **call) for call in calls] for n, calls in state.items()})


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Records the choices of every MoE layer of `model` while the context is open.

    Example:
        with record_routing(model) as record:
            loss = model(tokens).sum()
            loss.backward()          # recomputation inside adds nothing, and repeats the choice
        record["blocks.0.moe"][0].topk_ids

    Tensors are recorded detached and stay on their device; nothing waits for it. In training mode
    each call draws one number from torch's CPU generator (see `moe_ops.layers.recompute`), which
    shifts the random numbers that follow. Backward with recomputation belongs inside the context.
    Eager code only: compiled layers are not recorded.

    Args:
        model: any module; its `MoE` layers are found by type, itself included.

    Raises:
        ValueError: the model has no MoE layer.
        RuntimeError: a layer is already being recorded or replayed.
    """
    record = RoutingRecord()
    logs = {}
    for name in _moe_layers("record_routing", model):
        record.layers[name] = []
        logs[name] = RoutingLog(name, record=record.layers[name])
    with _attached("record_routing", model, logs):
        yield record


@contextlib.contextmanager
def replay_routing(
    model: nn.Module, record: RoutingRecord, *, use_recorded_weights: bool = False
) -> Iterator[None]:
    """Makes every MoE layer of `model` choose as recorded, call by call, while the context is open.

    Weights are computed from the present logits at the recorded ids and are differentiable, unless
    `use_recorded_weights` asks for the recorded ones, as constants. `topk_ids` given to a layer's
    forward still win and use up a recorded call. Recomputation under torch.utils.checkpoint
    repeats the call it belongs to, so keep backward inside the context. Eager code only.

    Args:
        model: a model with the layer names of the record.
        record: from `record_routing`, on the device of the model.
        use_recorded_weights: take the recorded weights as well.

    Raises:
        ValueError: the model has no MoE layer, or its layers are not those of the record, or (in
            the layer) a call has another number of tokens than was recorded.
        RuntimeError: a layer is already being recorded or replayed, or (in the layer) is called
            more often than was recorded.
    """
    layers = _moe_layers("replay_routing", model)
    if layers.keys() != record.layers.keys():
        raise ValueError(
            f"replay_routing: record must have the model's layers {sorted(layers)}, got "
            f"{sorted(record.layers)}."
        )
    logs = {
        name: RoutingLog(name, replay=record.layers[name], use_weights=use_recorded_weights)
        for name in layers
    }
    with _attached("replay_routing", model, logs):
        yield


def _moe_layers(name: str, model: nn.Module) -> dict[str, MoE]:
    layers = {path: m for path, m in model.named_modules() if isinstance(m, MoE)}
    if not layers:
        raise ValueError(f"{name}: model must hold a MoE layer, got {type(model).__name__}.")
    return layers


@contextlib.contextmanager
def _attached(name: str, model: nn.Module, logs: dict[str, RoutingLog]) -> Iterator[None]:
    layers = _moe_layers(name, model)
    before = {path: layer.routing_log for path, layer in layers.items()}
    for path, log in before.items():
        if log is not None and (log.record is not None or log.replay is not None):
            raise RuntimeError(
                f"{name}: layer {path!r} must not be recorded or replayed already, got a log."
            )
    try:
        for path, layer in layers.items():
            layer.routing_log = logs[path]
        yield
    finally:
        for path, layer in layers.items():
            layer.routing_log = before[path]
