"""Records which experts were chosen, plays choices back, and keeps recomputation to its first pass.

Activation checkpointing runs a forward again during backward. Where two experts nearly tie, the
second run may choose the other one (attention before the router need not be bitwise repeatable),
and gradients then belong to a forward that never happened. A `RoutingLog` on a `MoE` prevents it:

- A recomputation is a forward that runs inside an autograd graph task, whichever kind of
  checkpointing started it.
- Which first pass it repeats is told by a number that each logged forward draws from torch's CPU
  generator in training mode. `torch.utils.checkpoint` rewinds that generator before recomputing
  (preserve_rng_state=True, its default), so the second run draws the number of the first, in
  whatever order micro-batches come back. When the number is unknown (preserve_rng_state=False) and
  the layer has a single call outstanding, it can only be that one; otherwise an error is raised.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_ops._private_torch import current_graph_task_id

if TYPE_CHECKING:
    from .moe import MoE

# First passes without a graph to live in (reentrant checkpointing) are kept up to this number a
# layer: more than any schedule has in flight, few enough to bound memory.
_MAX_OUTSTANDING = 256


def in_backward() -> bool:
    """Whether this code runs inside a backward pass, as recomputed forwards do. False while
    compiling: a compiled graph is traced once and decides on recomputation by itself."""
    return not torch.compiler.is_compiling() and current_graph_task_id() != -1


@dataclass
class RoutingChoice:
    """One call of one layer: topk_ids [T, K] int32 and topk_weights [T, K], both detached."""

    topk_ids: Tensor
    topk_weights: Tensor


@dataclass
class RoutingRecord:
    """The choices of a model's MoE layers, in the order of their calls.

    layers: name of the layer (as in `named_modules`) -> its choices, a call each.
    """

    layers: dict[str, list[RoutingChoice]] = field(default_factory=dict)

    def __getitem__(self, layer: str) -> list[RoutingChoice]:
        return self.layers[layer]

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def to(self, device: torch.device | str) -> RoutingRecord:
        """A copy with all tensors on `device`."""
        return RoutingRecord(
            {
                name: [
                    RoutingChoice(c.topk_ids.to(device), c.topk_weights.to(device)) for c in calls
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
        return cls({n: [RoutingChoice(**call) for call in calls] for n, calls in state.items()})


class LoggedCall:
    """A first pass and, after `RoutingLog.finish` or from a record, the choice to repeat."""

    __slots__ = ("__weakref__", "ambiguous", "choice", "use_weights", "used")

    def __init__(self) -> None:
        self.choice: RoutingChoice | None = None
        self.use_weights = False
        self.used = False
        self.ambiguous = False


class RoutingLog:
    """What one MoE layer keeps about its calls. Made by the layer and by the contexts below.

    record: list to add choices to, or None. replay: choices to repeat, or None.
    use_weights: replayed calls take the recorded weights too, as constants.
    """

    def __init__(
        self,
        name: str = "",
        record: list[RoutingChoice] | None = None,
        replay: list[RoutingChoice] | None = None,
        use_weights: bool = False,
    ) -> None:
        self.name = name
        self.record = record
        self.replay = replay
        self.use_weights = use_weights
        self.num_replayed = 0
        # Calls live as long as their graph does; those run without one are held in `_held`.
        self._calls: weakref.WeakValueDictionary[object, LoggedCall] = weakref.WeakValueDictionary()
        self._held: OrderedDict[object, LoggedCall] = OrderedDict()

    def applies(self, training: bool) -> bool:
        """Whether a call needs the log; plain inference does not."""
        recording = self.record is not None or self.replay is not None
        return recording or training or torch.is_grad_enabled()

    def begin(self, training: bool) -> tuple[object, LoggedCall]:
        """Called before routing: a key, and the call that is to be repeated or an empty one."""
        key: object = int(torch.randint(2**62, (), device="cpu")) if training else object()
        if in_backward():
            call = self._calls.get(key)
            if call is None or call.ambiguous:
                call = self._only_call()
            call.used = True
            return key, call

        # Recomputed calls are done with once the next forward starts.
        for old in [k for k, c in self._held.items() if c.used]:
            del self._held[old]
        call = LoggedCall()
        if self.replay is not None:
            if self.num_replayed >= len(self.replay):
                raise RuntimeError(
                    f"replay_routing: layer {self.name!r} must be called at most "
                    f"{len(self.replay)} times, as recorded, got one more."
                )
            call.choice = self.replay[self.num_replayed]
            call.use_weights = self.use_weights
            self.num_replayed += 1
        return key, call

    def finish(
        self,
        key: object,
        call: LoggedCall,
        topk_weights: Tensor,
        topk_ids: Tensor,
        training: bool,
    ) -> None:
        """Called after routing with its result."""
        if in_backward():
            return
        call.choice = RoutingChoice(topk_ids.detach(), topk_weights.detach())
        if self.record is not None:
            self.record.append(call.choice)
        twin = self._calls.get(key)
        if twin is not None and not twin.used:
            # The generator was set back between two calls: their recomputations look the same.
            call.ambiguous = twin.ambiguous = True
            key = object()
        self._calls[key] = call
        if topk_weights.grad_fn is not None:
            metadata: Any = topk_weights.grad_fn.metadata
            metadata.setdefault("moe_ops_calls", []).append(call)
        elif training:
            self._held[key] = call
            while len(self._held) > _MAX_OUTSTANDING:
                self._held.popitem(last=False)

    def _only_call(self) -> LoggedCall:
        calls = list(self._calls.values())
        if len(calls) == 1:
            return calls[0]
        raise RuntimeError(
            f"MoE: a recomputation of layer {self.name!r} must find its first pass, got "
            f"{len(calls)} candidates; checkpoint with preserve_rng_state=True and do not reseed "
            "between calls in flight."
        )

    def __deepcopy__(self, memo: dict) -> RoutingLog:
        return RoutingLog(self.name, use_weights=self.use_weights)

    def __reduce__(self):
        return RoutingLog, (self.name, None, None, self.use_weights)


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Records the choices of every MoE layer of `model` while the context is open.

    Example:
        with record_routing(model) as record:
            loss = model(tokens).sum()
            loss.backward()          # recomputation inside adds nothing, and repeats the choice
        record["blocks.0.moe"][0].topk_ids

    Tensors are recorded detached and stay on their device; nothing waits for it. In training mode
    each call draws one number from torch's CPU generator (see the module's text), which shifts the
    random numbers that follow. Backward with recomputation belongs inside the context. Eager code
    only: compiled layers are not recorded.

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
    from .moe import MoE

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
