"""MoE layers of transformers' models whose selection of experts can be watched and replaced.

T tokens, E experts, K experts per token, L decoder layers.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops.layers.recompute import in_backward

from .selection import Selection, SparseMixerSelection

_ATTRIBUTE = "_moe_ops_tap"
_UNBOUND = "_moe_ops_unbound"
# Blocks whose own forward selects experts; in others the router does.
_SELECTING_BLOCKS = {"DbrxFFN", "Llama4TextMoe"}
# Blocks without a module `experts`.
_OTHER_BLOCKS = {"JetMoeMoE"}

# (tap, pass, taken [T, K], own [T, K] or None).
Watcher = Callable[["Tap", int, Tensor, "Tensor | None"], None]


class Tap:
    """One MoE layer.

    name: the block's name in the model.
    block: the block with router and experts.
    module: the module whose forward selects: the router, or the block.
    num_experts, top_k: E and K.
    rows: index of the layer among decoder layers; a looped layer has one more per further pass.
    selects: False if token ids alone define the experts (hash routing): nothing to replace.
    given: [T, K] ids per pass, or None.
    free: given ids contain rows of -1.
    is_bound: a recomputation runs that knows its pass.
    is_selecting: the module's forward runs.
    watchers: called after each selection, but not in recomputation.
    """

    def __init__(self, name: str, block: nn.Module, router: nn.Module, rows: list[int]) -> None:
        kinds = {cls.__name__ for cls in type(block).__mro__}
        self.name = name
        self.block = block
        self.module = block if kinds & _SELECTING_BLOCKS else router
        base = _base(router)
        self.num_experts = _number(base, block, _EXPERT_COUNTS)
        self.top_k = _number(base, block, _TOP_KS)
        self.rows = rows
        self.selects = not hasattr(base, "tid2eid")
        self.is_sparse_mixer = type(base).__name__ == "PhimoeTopKRouter"
        self.given: list[Tensor] | None = None
        self.free = False
        self.watchers: list[Watcher] = []
        self.users = 0
        self.replayed = False
        self.num_calls = 0
        self.is_selecting = False
        self.is_bound = False

    def open(self) -> None:
        """Replaces the module's forward; the last `close` restores it."""
        self.users += 1
        if self.users == 1:
            self._before = self.module.__dict__.get("forward")
            if getattr(self._before, "__func__", None) is _tapped:  # A copy's, of another tap.
                self._before = getattr(self.module, _ATTRIBUTE)._before
            setattr(self.module, _ATTRIBUTE, self)
            self.module.forward = types.MethodType(_tapped, self.module)

    def close(self) -> None:
        self.users -= 1
        if self.users == 0:
            delattr(self.module, _ATTRIBUTE)
            restore_forward(self.module, self._before)

    def __deepcopy__(self, memo: Any) -> Tap:
        """A copy of the model keeps a reference, and its forward ignores a tap of another."""
        return self

    def call(self, args: Any, kw: Any) -> Any:
        """Runs the module with the given experts."""
        forward = own_forward(self.module, self._before)
        given = None
        index = 0
        if len(self.rows) > 1:
            if in_backward() and not self.is_bound:
                raise RuntimeError(
                    f"{self.name} is called {len(self.rows)} times per pass, so its checkpointing "
                    "must be transformers' own (gradient_checkpointing_enable), got another."
                )
            index = self.num_calls % len(self.rows)
            self.num_calls += 1
        if self.given is not None and self.selects:
            given = self.given[index]
            # An optimized router calls an op that selects by itself.
            cls = getattr(type(self.module), "_moe_ops_own", None)
            forward = forward if cls is None else functools.partial(cls.forward, self.module)
        elif not self.watchers:
            return forward(*args, **kw)
        arguments = self.num_experts, self.top_k, given, self.free or bool(self.watchers)
        mode = (
            SparseMixerSelection(*arguments, training=self.module.training)
            if self.is_sparse_mixer
            else Selection(*arguments)
        )
        if given is not None:
            self._check_tokens(given, args[0])
        self.is_selecting = True
        try:
            with mode:
                output = forward(*args, **kw)
        finally:
            self.is_selecting = False
        taken = mode.taken
        if taken is None:
            if given is not None:
                raise RuntimeError(
                    f"hf.replay: the router of {self.name!r} must select its {self.top_k} of "
                    f"{self.num_experts} experts by torch.topk, got another selection in "
                    f"{type(self.module).__name__}; its class is unknown, or a kernel replaces it."
                )
            taken = _ids_of(self, output)
        if self.watchers and not in_backward():
            shape = (-1, self.top_k)
            found = None if mode.own is None else mode.own.detach().reshape(shape)
            for watcher in self.watchers:
                watcher(self, index, taken.detach().reshape(shape), found)
        return output

    def _check_tokens(self, given: Tensor, x: Tensor) -> None:
        num_tokens = x.shape[:-1].numel()
        if num_tokens != given.shape[0]:
            raise ValueError(
                f"hf.replay: routed_experts must have one row for each of the {num_tokens} tokens "
                f"of a call, padding included, got {given.shape[0]} in {self.name!r}; pass the "
                "call's attention_mask or cu_seqlens."
            )


def _tapped(self: Any, *args: Any, **kwargs: Any) -> Any:
    tap = getattr(self, _ATTRIBUTE)
    if tap.module is not self:
        return own_forward(self, tap._before)(*args, **kwargs)
    return tap.call(args, kwargs)


def own_forward(module: Any, before: Any) -> Callable[..., Any]:
    """Returns the forward of a module, or of a copy of it, before it was replaced.

    before: the forward set on the module itself, or None.
    """
    if before is None or isinstance(before, types.MethodType):
        function = type(module).forward if before is None else before.__func__
        return functools.partial(function, module)  # Dynamo cannot make methods.
    return before  # type: ignore[no-any-return]


def restore_forward(module: Any, before: Any) -> None:
    if before is None:
        del module.forward
    else:
        module.forward = before


class Taps:
    """The MoE layers of a model, in the order of the decoder layers.

    num_rows: L, plus the further passes of looped layers.
    """

    def __init__(self, model: nn.Module, caller: str) -> None:
        self.caller = caller
        self.taps: list[Tap] = []
        stacks: dict[str, int] = {}
        loops = _loops(model)
        for name, block, router in _blocks(model):
            stack, index, size = _place(model, name)
            stacks[stack] = size
            known = getattr(_selecting(block, router), _ATTRIBUTE, None)
            if known is not None and known.module is not _selecting(block, router):
                known = None  # It belongs to the model of which this is a copy.
            self.taps.append(known or Tap(name, block, router, [index, *loops(index, size)]))
        if not self.taps:
            raise ValueError(
                f"{caller}: model must have MoE layers of transformers, got {type(model).__name__}."
            )
        if len(stacks) > 1:
            raise ValueError(
                f"{caller}: model must have one stack of decoder layers with experts, got "
                f"{', '.join(stacks)}; pass the part of the model that has one."
            )
        self.num_layers = next(iter(stacks.values()))
        self.num_rows = self.num_layers + len(loops(None, self.num_layers))
        self._layers = _checkpointed_layers(model, self.taps)

    def open(self) -> None:
        for tap in self.taps:
            tap.open()

    def close(self) -> None:
        for tap in self.taps:
            tap.close()

    def bind_checkpointing(self) -> None:
        """Binds transformers' activation checkpointing to the experts given in the first pass, so
        that a recomputation repeats them, even after another batch or the end of the context.

        Trainers enable checkpointing at any time, so each batch binds what is not bound.
        """
        for layer, taps in self._layers:
            func = layer.__dict__.get("_gradient_checkpointing_func")
            if func is not None and not hasattr(func, _UNBOUND):
                layer._gradient_checkpointing_func = _bound(func, taps)

    def unbind_checkpointing(self) -> None:
        for layer, _ in self._layers:
            func = layer.__dict__.get("_gradient_checkpointing_func")
            if hasattr(func, _UNBOUND):
                layer._gradient_checkpointing_func = getattr(func, _UNBOUND)


def _checkpointed_layers(model: nn.Module, taps: list[Tap]) -> list[tuple[Any, list[Tap]]]:
    """Returns the layers with experts that transformers can checkpoint."""
    from transformers import PreTrainedModel  # It stores the checkpointing function too.

    found = []
    for name, module in model.named_modules():
        inside = [tap for tap in taps if f"{tap.name}.".startswith(f"{name}." if name else "")]
        checkpointed = hasattr(module, "gradient_checkpointing")
        if inside and checkpointed and not isinstance(module, PreTrainedModel):
            found.append((module, inside))
    return found


def _bound(func: Callable[..., Any], taps: list[Tap]) -> Callable[..., Any]:
    # Dynamo cannot trace a function mode inside checkpointing. These two frames run eagerly, and it
    # compiles the layer on its own.
    @torch.compiler.disable(recursive=False)
    def checkpoint(layer: Callable[..., Any], *args: Any) -> Any:
        state = [(tap, tap.given, tap.free, tap.num_calls) for tap in taps]

        @torch.compiler.disable(recursive=False)
        def again(*inputs: Any) -> Any:
            with _restored(state):
                return layer(*inputs)

        return func(again, *args)

    setattr(checkpoint, _UNBOUND, func)
    return checkpoint


@contextlib.contextmanager
def _restored(state: Iterable[tuple[Tap, Any, bool, int]]) -> Iterator[None]:
    if not in_backward():
        yield
        return
    before = [(tap, tap.given, tap.free, tap.num_calls) for tap, *_ in state]
    try:
        for tap, *values in state:
            tap.open()
            tap.is_bound = True
            tap.given, tap.free, tap.num_calls = values
        yield
    finally:
        for tap, *values in before:
            tap.given, tap.free, tap.num_calls = values
            tap.is_bound = False
            tap.close()


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Returns name, block and router of each MoE layer. Attention experts are left out."""
    for name, block in model.named_modules():
        kinds = {cls.__name__ for cls in type(block).__mro__}
        if not (kinds & _OTHER_BLOCKS or isinstance(getattr(block, "experts", None), nn.Module)):
            continue
        for child in ("gate", "router"):
            router = getattr(block, child, None)
            if isinstance(router, nn.Module):
                yield name, block, router
                break


def _selecting(block: nn.Module, router: nn.Module) -> nn.Module:
    kinds = {cls.__name__ for cls in type(block).__mro__}
    return block if kinds & _SELECTING_BLOCKS else router


def _place(model: nn.Module, name: str) -> tuple[str, int, int]:
    """Returns the name of the list of decoder layers, the layer's index and the list's length."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        stack = ".".join(parts[:position])
        if part.isdigit() and isinstance(model.get_submodule(stack), nn.ModuleList):
            return stack, int(part), len(model.get_submodule(stack))  # type: ignore[arg-type]
    return "", 0, 1


def _loops(model: nn.Module) -> Callable[[int | None, int], list[int]]:
    """Returns a function of a layer's index (None: all) and L that lists rows of further passes."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    start = getattr(config, "loop_layer_index_start", 0)
    end = getattr(config, "loop_layer_index_end", 0)
    further = range(getattr(config, "loop_num_passes", 1) - 1)

    def rows(index: int | None, num_layers: int) -> list[int]:
        # The numbering of the model's own cache: passes follow the model's layers.
        layers = range(start, end) if index is None else [index] if start <= index < end else []
        return [num_layers + p * (end - start) + i - start for p in further for i in layers]

    return rows


def _ids_of(tap: Tap, output: Any) -> Tensor:
    """Returns the ids in the results of a router that does not select by torch.topk."""
    ids = output[2] if isinstance(output, tuple) and len(output) > 2 else None
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.shape[-1] != tap.top_k:
        raise RuntimeError(
            f"hf.record: the router of {tap.name!r} must return (logits, weights, ids) or select "
            f"by torch.topk, got {type(tap.module).__name__}."
        )
    return ids


def _base(module: Any) -> Any:
    """Returns a router without the wrappers of adapters."""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer
    return module


# Where a router, its block or their configs state E and K.
_EXPERT_COUNTS = ("num_router_classes", "num_experts", "n_routed_experts")
_TOP_KS = ("top_k", "top_k_experts", "moe_topk")


def _number(router: Any, block: Any, names: tuple[str, ...]) -> int:
    places = [router, getattr(router, "config", None), block, getattr(block, "experts", None)]
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if type(value) is int:
                return value
    raise ValueError(
        f"hf.replay: {type(router).__name__} must state its numbers of experts and of experts per "
        f"token, got none of {', '.join(names)}."
    )
