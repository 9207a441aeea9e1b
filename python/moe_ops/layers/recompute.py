"""Repeats the routing of a layer's first pass in recomputation.

Activation checkpointing runs a forward again during backward. If two experts nearly tie, the second
run may select the other one (attention before the router need not be bitwise repeatable), and
gradients then belong to a forward that never happened. A `RoutingLog` on a `MoE` prevents this:

- A recomputation is a forward inside an autograd graph task, whichever kind of checkpointing
  started it.
- It is matched with its first pass by a number that each logged forward draws from torch's CPU
  generator in training mode. `torch.utils.checkpoint` rewinds that generator before recomputing
  (preserve_rng_state=True, its default), so the second run draws the number of the first, in
  whatever order micro-batches return. If the number is unknown (preserve_rng_state=False) and the
  layer has one outstanding call, that call is used; otherwise an error is raised.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any

import torch

from moe_ops._private_torch import current_graph_task_id

from .routing import Routing

# Maximum number of first passes per layer kept without a graph (reentrant checkpointing): more than
# any schedule has in flight, few enough to bound memory.
_MAX_OUTSTANDING = 256


def in_backward() -> bool:
    """Returns whether this code runs inside a backward pass, as recomputed forwards do. It is False
    while compiling: a compiled graph is traced once, and the compiler controls recomputation."""
    return not torch.compiler.is_compiling() and current_graph_task_id() != -1


class LoggedCall:
    """A first pass and, after `RoutingLog.finish` or from a record, the selection to repeat."""

    __slots__ = ("__weakref__", "ambiguous", "choice", "use_weights", "used")

    def __init__(self) -> None:
        self.choice: Routing | None = None
        self.use_weights = False
        self.used = False
        self.ambiguous = False


class RoutingLog:
    """Log of the calls of one MoE layer, made by the layer or by the contexts of `record`.

    record: list to add selections to, or None.
    replay: selections to repeat, or None.
    use_weights: replayed calls also use the recorded weights, as constants.
    """

    def __init__(
        self,
        name: str = "",
        record: list[Routing] | None = None,
        replay: list[Routing] | None = None,
        use_weights: bool = False,
    ) -> None:
        self.name = name
        self.record = record
        self.replay = replay
        self.use_weights = use_weights
        self.num_replayed = 0
        # Calls live as long as their graph; calls without a graph are kept in `_held`.
        self._calls: weakref.WeakValueDictionary[object, LoggedCall] = weakref.WeakValueDictionary()
        self._held: OrderedDict[object, LoggedCall] = OrderedDict()

    def applies(self, training: bool) -> bool:
        """Returns whether a call needs the log; plain inference does not."""
        recording = self.record is not None or self.replay is not None
        return recording or training or torch.is_grad_enabled()

    def begin(self, training: bool) -> tuple[object, LoggedCall]:
        """Returns a key, and the call to repeat or an empty one. It is called before routing."""
        key: object = int(torch.randint(2**62, (), device="cpu")) if training else object()
        if in_backward():
            call = self._calls.get(key)
            if call is None or call.ambiguous:
                call = self._only_call()
            call.used = True
            return key, call

        # Recomputed calls are no longer needed once the next forward starts.
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

    def finish(self, key: object, call: LoggedCall, routing: Routing, training: bool) -> None:
        """Stores the result of routing."""
        if in_backward():
            return
        topk_weights = routing.topk_weights
        # The original ids tensor, which a recomputation passes on again, so that data cached about
        # it by a dispatcher of `moe_ops.parallel` is valid for both.
        call.choice = Routing(None, topk_weights.detach(), routing.topk_ids)
        if self.record is not None:
            self.record.append(call.choice)
        twin = self._calls.get(key)
        if twin is not None and not twin.used:
            # The generator was reset between two calls: their recomputations cannot be
            # distinguished.
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
