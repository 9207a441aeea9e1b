"""Keeps the recomputation of a layer to the routing of its first pass.

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

import weakref
from collections import OrderedDict
from typing import Any

import torch

from moe_ops._private_torch import current_graph_task_id

from .routing import Routing

# First passes without a graph to live in (reentrant checkpointing) are kept up to this number a
# layer: more than any schedule has in flight, few enough to bound memory.
_MAX_OUTSTANDING = 256


def in_backward() -> bool:
    """Whether this code runs inside a backward pass, as recomputed forwards do. False while
    compiling: a compiled graph is traced once and decides on recomputation by itself."""
    return not torch.compiler.is_compiling() and current_graph_task_id() != -1


class LoggedCall:
    """A first pass and, after `RoutingLog.finish` or from a record, the choice to repeat."""

    __slots__ = ("__weakref__", "ambiguous", "choice", "use_weights", "used")

    def __init__(self) -> None:
        self.choice: Routing | None = None
        self.use_weights = False
        self.used = False
        self.ambiguous = False


class RoutingLog:
    """What one MoE layer keeps about its calls. Made by the layer, and by the contexts of
    `record`.

    record: list to add choices to, or None. replay: choices to repeat, or None.
    use_weights: replayed calls take the recorded weights too, as constants.
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

    def finish(self, key: object, call: LoggedCall, routing: Routing, training: bool) -> None:
        """Called after routing with its result."""
        if in_backward():
            return
        topk_weights = routing.topk_weights
        # The very tensor of ids, which a recomputation passes on again: what a dispatcher of
        # `moe_ops.parallel` has learnt about it holds for both.
        call.choice = Routing(None, topk_weights.detach(), routing.topk_ids)
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
