"""Replay of routed experts in the forward and backward passes of a trainer.

T tokens, L decoder layers, K experts per token.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_ops.layers import ExpertLoadStats

from .agreement import RoutingAgreement
from .arrays import align
from .selection import TopK
from .taps import Tap, Taps, own_forward, restore_forward

_BALANCE_LOSS = "load_balancing_loss_func"


class Replay:
    """Routing replay of one model; made by `moe_ops.hf.replay`.

    agreement: a `RoutingAgreement` of given experts and the router's own; None unless `replay` got
        measure=True.
    """

    def __init__(self, model: nn.Module, measure: bool, stats: ExpertLoadStats | None) -> None:
        self.taps = Taps(model, "hf.replay")
        self.agreement = RoutingAgreement() if measure else None
        self.stats = stats
        self._model = model
        self._stack: contextlib.ExitStack | None = None

    @property
    def layers(self) -> dict[str, list[int]]:
        """Returns the rows of routed_experts that each MoE layer reads, by its name."""
        return {tap.name: tap.rows for tap in self.taps.taps}

    def set(
        self,
        routed_experts: Any,
        *,
        attention_mask: Any = None,
        cu_seqlens: Any = None,
        start: int | Sequence[int] = 0,
        strict: bool = True,
    ) -> None:
        """Sets the experts of the next batch; see `moe_ops.hf.replay`. None ends the replay, as a
        pass of a reference model needs it.

        Raises:
            ValueError: an array does not fit the model or the tokens; the previous one stays.
        """
        given = None
        if routed_experts is not None:
            options: dict[str, Any] = {"start": start, "strict": strict}
            found = align(
                self.taps,
                routed_experts,
                attention_mask=attention_mask,
                cu_seqlens=cu_seqlens,
                **options,
            )
            kind = np.int16 if max(t.num_experts for t in self.taps.taps) < 2**15 else np.int32
            given = [
                [torch.from_numpy(ids.astype(kind)).to(_device(tap.module)) for ids in parts]
                for tap, parts in zip(self.taps.taps, found, strict=True)
            ]
            free = [any(bool((ids < 0).any()) for ids in parts) for parts in found]
        if self._stack is not None:
            self.taps.bind_checkpointing()
        for index, tap in enumerate(self.taps.taps):
            tap.given = None if given is None else given[index]
            tap.free = given is not None and free[index]
            tap.num_calls = 0

    def __enter__(self) -> Replay:
        for tap in self.taps.taps:
            if tap.users and tap.replayed:
                raise RuntimeError(
                    f"hf.replay: layer {tap.name!r} must not be replayed already, got a second "
                    "context; call set on the first."
                )
        with contextlib.ExitStack() as stack:
            stack.callback(self.taps.close)
            self.taps.open()
            for tap in self.taps.taps:
                tap.replayed = True
                stack.callback(setattr, tap, "replayed", False)
                if self.agreement is not None:
                    _append(stack, tap.watchers, self._compare)
                if self.stats is not None:
                    _append(stack, tap.watchers, self._count)
            stack.callback(self.taps.unbind_checkpointing)
            self.taps.bind_checkpointing()
            stack.enter_context(_balance_losses(self._model, self.taps))
            stack.callback(self._forget)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._stack is not None
        self._stack.close()
        self._stack = None

    def _forget(self) -> None:
        for tap in self.taps.taps:
            tap.given = None

    def _compare(self, tap: Tap, index: int, taken: Tensor, own: Tensor | None) -> None:
        if tap.given is not None and own is not None:
            assert self.agreement is not None
            self.agreement.add(tap.name, tap.given[index], own)

    def _count(self, tap: Tap, index: int, taken: Tensor, own: Tensor | None) -> None:
        assert self.stats is not None
        self.stats.update(taken, tap.num_experts, layer=tap.name)


def replay(
    model: nn.Module,
    routed_experts: Any = None,
    *,
    attention_mask: Any = None,
    cu_seqlens: Any = None,
    start: int | Sequence[int] = 0,
    strict: bool = True,
    measure: bool = False,
    stats: ExpertLoadStats | None = None,
) -> Replay:
    """Makes the MoE layers of a transformers model take given experts: routing replay.

    In reinforcement learning, an inference engine samples and a trainer computes log-probabilities
    of the samples again. Where rounding makes their routers select different experts, the two
    policies differ by more than rounding. Replay removes this part of the difference: the trainer
    takes the engine's experts. Routing weights are computed from the trainer's live logits by the
    router's own formula, so that tokens and router have gradients.

    Example:
        with moe_ops.hf.replay(model) as replay:
            for batch in batches:
                replay.set(batch["routed_experts"], attention_mask=batch["attention_mask"])
                loss(model, batch).backward()

    Only the ids are replayed. Transformers' activation checkpointing repeats them in backward even
    after the next `set` or the end of the context; with other checkpointing, run backward before
    them. Balance losses of transformers (output_router_logits=True) count the experts taken.

    Args:
        model: a transformers model with MoE layers, or a module that has one inside; compiled,
            sharded, with adapters, quantized, on moe_ops or not.
        routed_experts: ids in numpy arrays or tensors of any integer type, as vLLM and SGLang
            return them. A list with one array [tokens, L, K] per sequence, one such array of all
            sequences, or a padded array [B, S, L, K]. L is the number of all decoder layers, or of
            those with experts. -1 in a whole row lets the router select. An array may be
            the base64 text of the engines' servers. None: call `set` later.
        attention_mask: [B, S], which aligns arrays with padding on either side. The experts of
            padding are selected freely.
        cu_seqlens: [sequences + 1], offsets of packed sequences, instead of attention_mask.
            Without both, rows of arrays are the tokens of a call.
        start: number of tokens at the start of a sequence that its array leaves out, or one number
            per sequence. They select freely.
        strict: raise unless an array has a row for each token, or for each but the last, which
            engines never run. False: tokens without rows at the end select freely, rows without
            tokens are left out.
        measure: also compute the experts that the router would have taken, for
            `Replay.agreement`. Eager mode only.
        stats: counts the experts taken by layer, for `update_expert_bias`. Eager mode only.

    Returns:
        A `Replay`, to be used as a context.

    Raises:
        ValueError: the model has no MoE layer, or an array does not fit; in a call, another number
            of tokens.
        RuntimeError: the model is being replayed already, or (in a call) a router of unknown code
            does not select by `torch.topk`.
    """
    found = Replay(model, measure, stats)
    found.set(
        routed_experts,
        attention_mask=attention_mask,
        cu_seqlens=cu_seqlens,
        start=start,
        strict=strict,
    )
    return found


def _append(stack: contextlib.ExitStack, items: list[Any], item: Any) -> None:
    items.append(item)
    stack.callback(items.remove, item)


def _device(module: nn.Module) -> torch.device:
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


# ----------------------------------------------------------------- balance losses of transformers


class _TakenExperts(TorchFunctionMode):
    """Replaces the top-k over router logits of a balance loss by the experts taken.

    The loss calls it for each layer [T, E] in their order, or in older versions for all of them.
    """

    def __init__(self, taps: list[Tap]) -> None:
        super().__init__()
        self.taps = taps
        self.given = [ids for tap in taps if tap.given and tap.selects for ids in tap.given]
        self.used = 0

    def __torch_function__(
        self, func: Any, classes: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is not torch.topk or found[1].dim() != 2:
            return found
        num_rows, top_k = found[1].shape
        if any(tap.is_selecting for tap in self.taps) or {top_k} != {
            ids.shape[1] for ids in self.given
        }:
            return found
        ids = torch.cat(self.given)[self.used : self.used + num_rows].to(args[0].device).long()
        if len(ids) != num_rows:
            return found
        self.used += num_rows
        ids = torch.where(ids < 0, found[1], ids)
        return TopK(args[0].gather(-1, ids), ids)


@contextlib.contextmanager
def _balance_losses(model: nn.Module, taps: Taps) -> Iterator[None]:
    """Makes the balance loss in a model's forward count the experts given to its layers."""
    changed = []
    try:
        for module in model.modules():
            own = inspect.unwrap(type(module).forward)
            if _BALANCE_LOSS in getattr(getattr(own, "__code__", None), "co_names", ()):
                before = module.__dict__.get("forward")
                changed.append((module, before))
                forward = _counting(module, before, taps.taps)
                module.forward = types.MethodType(forward, module)
        yield
    finally:
        for module, before in changed:
            restore_forward(module, before)


def _counting(module: Any, before: Any, taps: list[Tap]) -> Callable[..., Any]:
    @functools.wraps(type(module).forward)
    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        forward = own_forward(self, before)
        wanted = kwargs.get("output_router_logits")
        if wanted is None:
            wanted = getattr(self.config.get_text_config(), "output_router_logits", False)
        if not wanted or self is not module:  # It may be a copy, made inside the context.
            return forward(*args, **kwargs)
        with _TakenExperts(taps):
            return forward(*args, **kwargs)

    return counting
