"""Calls of placed experts with many tokens, computed on the GPU with a copy of the layer's weights.

All layers of a model share two slots on the GPU. A call waits there for the copy of its layer into
one slot, and starts the copy of the next layer into the other one; in backward passes that is the
layer before. Copies run on a stream of their own, from memory that is page-locked in place.

Autograd keeps the tokens and the routing of a call. Its backward copies the weights again and runs
the forward again, so that no graph refers to a slot.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_ops._private_torch import current_graph_task_id
from moe_ops._seam import CallWithoutTensors, take_tensors
from moe_ops._slots import SlotStream
from moe_ops.hf.experts.pinned import PinnedStorages

_ATTRIBUTE = "_moe_ops_stream"
_ALIGNMENT = 256  # Bytes, of each tensor in a slot.


class Streamer:
    """Two slots on a GPU for the weights of a model's placed experts, one layer in each.

    Calls of several threads run one at a time.

    Args:
        device_type: device type of the calls that use the slots. On the CPU, copies are plain.
        min_tokens: minimum number of tokens of these calls.
        num_layers: number of modules of experts, which are called in the order of their indices.
    """

    def __init__(self, device_type: str, min_tokens: int, num_layers: int) -> None:
        self.device_type, self.min_tokens, self.num_layers = device_type, min_tokens, num_layers
        self._modules: list[Callable[[], nn.Module | None]] = [lambda: None] * num_layers
        self._lock = threading.RLock()
        self._last = -1  # Index of the last layer that a forward pass called.
        self._pinned = PinnedStorages()
        self._stream: SlotStream | None = None
        self._buffers: list[Tensor] = []
        self._contents: list[Any] = [None, None]  # Key of the layer in each slot.
        # The end of the process unlocks memory, too.
        weakref.finalize(self, self._pinned.unlock).atexit = False

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies of a model get slots of their own.
        return Streamer, (self.device_type, self.min_tokens, self.num_layers)

    def bind(self, index: int, module: nn.Module) -> None:
        """Sets the module with an index."""
        if self._modules[index]() is not module:
            self._modules[index] = weakref.ref(module)

    def takes(self, module: nn.Module, x: Tensor) -> bool:
        """Returns whether a call with tokens x [..., H] is computed on the GPU. Weights with a
        gradient are not."""
        return (
            x.device.type == self.device_type
            and x.numel() >= self.min_tokens * x.shape[-1]
            and not (torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()))
        )

    @contextlib.contextmanager
    def on_device(
        self, index: int, module: nn.Module, cls: type, device: torch.device
    ) -> Iterator[nn.Module]:
        """Yields a module of class `cls` that has the weights of `module` in a slot.

        Work with it must be submitted to the current stream inside the block.
        """
        backward = current_graph_task_id() >= 0
        with self._lock:
            self.bind(index, module)
            if not backward and index <= self._last:
                # In a new pass, weights may differ without a new version.
                self._contents = [None, None]
            self._last = self.num_layers if backward else index
            following = index + (-1 if backward else 1)
            coming = self._modules[following]() if 0 <= following < self.num_layers else None
            self._allocate(device, module, coming)
            slot, views = self._fill(index, module, None)
            if coming is not None:
                self._fill(following, coming, slot)
            if self._stream is not None:
                self._stream.wait_for([slot])
                self._buffers[slot].record_stream(torch.cuda.current_stream(device))
            try:
                yield with_tensors(module, cls, views)
            finally:
                if self._stream is not None:
                    self._stream.used([slot])

    def pin(self) -> None:
        """Page-locks the weights of all modules, if calls are on a GPU."""
        for module in self._bound():
            self._pin(tensors_of(module))

    def release(self) -> None:
        """Unlocks all memory and frees the slots."""
        with self._lock:
            self._pinned.unlock()
            self._contents, self._buffers, self._stream = [None, None], [], None

    def release_unused(self) -> None:
        """Unlocks the memory of former weights, which is freed only then."""
        with self._lock:
            kept = {t.untyped_storage().data_ptr() for m in self._bound() for t in tensors_of(m)}
            self._pinned.unlock(kept)

    def _bound(self) -> list[nn.Module]:
        found = (module() for module in self._modules)
        return [module for module in found if module is not None]

    def _allocate(self, device: torch.device, *modules: nn.Module | None) -> None:
        """Allocates slots for the largest layer, unless those on the device have room for these
        modules."""

        def largest(modules: Iterable[nn.Module | None]) -> int:
            return max(layout_of(tensors_of(module))[1] for module in modules if module is not None)

        if self._buffers and self._buffers[0].device == device:
            if self._buffers[0].numel() >= largest(modules):
                return
        size = largest(self._bound())
        self._contents, self._buffers = [None, None], []
        with torch.inference_mode(False):
            self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._stream = None
        if device.type == "cuda":
            self._stream = SlotStream(device, 2)
            self._pinned.devices.add(device)
            # Their memory may have been used by the current stream before.
            self._stream.used([0, 1])
            for buffer in self._buffers:
                buffer.record_stream(self._stream.stream)

    @torch.no_grad()
    def _fill(self, index: int, module: nn.Module, kept: int | None) -> tuple[int, list[Tensor]]:
        """Returns the slot with a layer's weights, and these; starts their copy if needed.

        Args:
            kept: slot that keeps its contents.
        """
        tensors = tensors_of(module)
        key = index, tuple(map(identity_of, tensors))
        if key in self._contents:
            slot = self._contents.index(key)
            return slot, views_of(self._buffers[slot], tensors)
        self._pin(tensors)
        if kept is None:
            kept = 1 if self._contents[0] is None else 0
        slot = 1 - kept
        self._contents[slot] = None
        views = self._copy(index, tensors, slot)
        self._contents[slot] = key
        return slot, views

    def _copy(self, index: int, tensors: Sequence[Tensor], slot: int) -> list[Tensor]:
        """Copies a layer's weights into a slot."""
        views = views_of(self._buffers[slot], tensors)
        filling = contextlib.nullcontext() if self._stream is None else self._stream.filling(slot)
        with filling:
            for view, t in zip(views, tensors, strict=True):
                view.copy_(t, non_blocking=True)
        return views

    def _pin(self, tensors: Sequence[Tensor]) -> None:
        if self.device_type == "cuda":
            self._pinned.pin(tensors, self.release_unused)


class _Call(NamedTuple):
    """One call of experts."""

    streamer: Streamer
    number: int
    module: nn.Module
    cls: Any
    rest: CallWithoutTensors

    def on_device(self, device: torch.device) -> contextlib.AbstractContextManager[nn.Module]:
        return self.streamer.on_device(self.number, self.module, self.cls, device)

    def run(self, experts: nn.Module, tensors: Sequence[Tensor]) -> Tensor:
        return self.rest.run(functools.partial(self.cls.forward, experts), tensors)


class _Streamed(torch.autograd.Function):
    """Runs a call on the device, and again in backward."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Tensor:
        device = tensors[0].device
        ctx.call = call
        ctx.autocast = (
            torch.is_autocast_enabled(device.type),
            torch.get_autocast_dtype(device.type),
        )
        ctx.save_for_backward(*tensors)
        with call.on_device(device) as experts, torch.no_grad():
            return call.run(experts, tensors)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # Under checkpointing, this runs the forward of the block.
        device = saved[0].device
        needs = ctx.needs_input_grad[1:]
        enabled, dtype = ctx.autocast
        tensors = [t.detach().requires_grad_(n) for t, n in zip(saved, needs, strict=True)]
        with ctx.call.on_device(device) as experts, torch.enable_grad():
            with torch.autocast(device.type, dtype=dtype, enabled=enabled):
                y = ctx.call.run(experts, tensors)
            wanted = [t for t in tensors if t.requires_grad]
            found = iter(torch.autograd.grad(y, wanted, grad, allow_unused=True))
        return None, *(next(found) if n else None for n in needs)


def set_streamed(modules: Sequence[nn.Module], device_type: str, min_tokens: int | None) -> None:
    """Streams the weights of placed experts for calls with at least `min_tokens` tokens; never for
    None.

    Args:
        modules: in the order of their calls.
        device_type: device type of the calls.
    """
    for module in modules:
        old = module.__dict__.pop(_ATTRIBUTE, None)
        if old is not None:
            old[0].release()
    if min_tokens is None or not modules:
        return
    streamer = Streamer(device_type, min_tokens, len(modules))
    for index, module in enumerate(modules):
        streamer.bind(index, module)
        module.__dict__[_ATTRIBUTE] = streamer, index
    streamer.pin()


def streams_from(module: nn.Module) -> int | None:
    """Returns the minimum number of tokens of calls that stream the weights of this module; None if
    no call does."""
    found = module.__dict__.get(_ATTRIBUTE)
    return None if found is None else found[0].min_tokens


def weights_changed(module: nn.Module) -> None:
    """Unlocks memory that the module used before a cast."""
    if (found := module.__dict__.get(_ATTRIBUTE)) is not None:
        found[0].release_unused()


@torch.compiler.disable
def run_streamed(module: nn.Module, cls: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """Returns the result of `cls.forward` with a copy of the weights on the GPU; None if the call
    must run on the CPU."""
    if _ATTRIBUTE not in module.__dict__:
        return None
    streamer, index = module.__dict__[_ATTRIBUTE]
    tensors, rest = take_tensors(args, kwargs)
    if not streamer.takes(module, tensors[0]):
        return None
    y: Tensor = _Streamed.apply(_Call(streamer, index, module, cls, rest), *tensors)
    return y


def with_tensors(module: nn.Module, cls: type, views: Sequence[Tensor]) -> nn.Module:
    """Returns a module like `module` with other tensors, in the order of `tensors_of`."""
    by_id = {id(t): view for t, view in zip(tensors_of(module), views, strict=True)}
    return _shadow(module, cls, by_id)


def _shadow(module: nn.Module, cls: Any, views: dict[int, Tensor]) -> nn.Module:
    new: nn.Module = cls.__new__(cls)
    state = new.__dict__
    state.update(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        state[kind] = {n: t if t is None else views[id(t)] for n, t in state[kind].items()}
    state["_modules"] = {
        name: child
        if child is None or not tensors_of(child)
        else _shadow(child, type(child), views)
        for name, child in module._modules.items()
    }
    return new


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def identity_of(t: Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), None if t.is_inference() else t._version, t.dtype, t.shape, t.stride()


def layout_of(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Returns the offset of each tensor in a slot, and the bytes of all."""
    offsets, size = [], 0
    for t in tensors:
        offsets.append(size)
        size += -(-t.nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, size


def views_of(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [
        buffer[offset : offset + t.nbytes].view(t.dtype).view(t.shape)
        for offset, t in zip(layout_of(tensors)[0], tensors, strict=True)
    ]
