"""Recording and replay of top-k selections."""

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
    """Top-k selections of a model's MoE layers, in the order of their calls.

    layers: layer name (as in `named_modules`) -> one `Routing` per call, detached and without
    logits.
    """

    layers: dict[str, list[Routing]] = field(default_factory=dict)

    def __getitem__(self, layer: str) -> list[Routing]:
        return self.layers[layer]

    def __len__(self) -> int:
        """Returns the number of layers."""
        return len(self.layers)

    def to(self, device: torch.device | str) -> RoutingRecord:
        """Returns a copy with all tensors on `device`."""
        return RoutingRecord(
            {
                name: [
                    Routing(None, c.topk_weights.to(device), c.topk_ids.to(device)) for c in calls
                ]
                for name, calls in self.layers.items()
            }
        )

    def state_dict(self) -> dict[str, list[dict[str, Tensor]]]:
        """Returns plain containers of tensors, for torch.save and torch.load(weights_only=True)."""
        return {
            name: [{"topk_ids": c.topk_ids, "topk_weights": c.topk_weights} for c in calls]
            for name, calls in self.layers.items()
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, list[dict[str, Tensor]]]) -> RoutingRecord:
        """Returns the record of a `state_dict`."""
        return cls({n: [Routing(None, **call) for call in calls] for n, calls in state.items()})


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Records the top-k selections of every MoE layer of `model` while the context is open.

    Example:
        with record_routing(model) as record:
            loss = model(tokens).sum()
            loss.backward()          # recomputation adds no record, and repeats the selection
        record["blocks.0.moe"][0].topk_ids

    Tensors are recorded detached on their device, without a device sync. In training mode, each
    call draws one number from torch's CPU generator (see `moe_ops.layers.recompute`), which shifts
    later random numbers. Run backward with recomputation inside the context. Eager mode only:
    compiled layers are not recorded.

    Args:
        model: any module, which may be a `MoE` itself; `MoE` layers are found by type.

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
    """Makes every MoE layer of `model` repeat recorded selections, call by call, while the context
    is open.

    Weights are computed from the current logits at the recorded ids and are differentiable, unless
    `use_recorded_weights` selects the recorded ones, as constants. `topk_ids` passed to a layer's
    forward take precedence and consume a recorded call. Recomputation under torch.utils.checkpoint
    repeats its original call, so run backward inside the context. Eager mode only.

    Args:
        model: a model with the layer names of the record.
        record: from `record_routing`, on the device of the model.
        use_recorded_weights: also use the recorded weights.

    Raises:
        ValueError: the model has no MoE layer, its layers differ from those of the record, or (in
            the layer) a call has another number of tokens than the recorded one.
        RuntimeError: a layer is already being recorded or replayed, or (in the layer) has more
            calls than recorded.
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
