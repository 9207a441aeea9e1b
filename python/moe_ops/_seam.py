"""Calls on the CPU with tensors of a GPU, for modules whose weights stay in CPU memory.

A crossing copies all tensors of a call to pinned memory, waits for one event, runs the call in the
calling thread, and copies its result back on the current stream without waiting. Work that the
stream already has goes on meanwhile. Pinned memory is that of torch's caching allocator: it has
blocks of powers of two, and reuses a block once the copies from it have ended, so that calls of a
size that occurred before allocate nothing. Tensors on the CPU cross in these steps by plain copies.

Autograd crosses once in each direction: a result's gradient comes down as the tensors do, and the
gradients of all tensors go up together. Between the crossings, the graph is that of the call on the
CPU. Its nodes run in the thread that calls backward, which is usually the one of the forward, so
that both use one pool of OpenMP threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@torch.compiler.disable
def run_on_cpu(
    run: Callable[..., Tensor],
    *args: Any,
    meanwhile: Callable[[], object] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Returns ``run(*args, **kwargs)``, computed with copies of the tensor arguments on the CPU.

    Autocast of the tensors' device becomes autocast on the CPU.

    Args:
        run: returns one tensor on the CPU.
        args, kwargs: tensors of one device, the first of which determines the device of the result,
            and other objects, which are passed on.
        meanwhile: called before the host waits; work that it launches overlaps with `run`.
    """
    tensors, call = take_tensors(args, kwargs)
    device = tensors[0].device
    found = _copy_to_cpu(tensors, meanwhile)
    if torch.is_grad_enabled():
        if device.type != "cpu":
            # The graph may keep these until backward, and pinned memory is scarce.
            found = [t.clone() for t in found]
        # Without the view, gradients would reach the node before, which may have another stream.
        found = _ToCpu.apply(found, *(t.view_as(t) if t.requires_grad else t for t in tensors))
    if device.type == "cpu" or not torch.is_autocast_enabled(device.type):
        y = call.run(run, found)
    else:
        with torch.autocast("cpu", dtype=torch.get_autocast_dtype(device.type)):
            y = call.run(run, found)
    result: Tensor = _ToDevice.apply(y, device)
    return result


class CallWithoutTensors(NamedTuple):
    """Arguments of a call without its tensors; `keys` are their positions and names."""

    keys: list[int | str]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
        """Calls a function with these tensors in the places of those that were taken."""
        given: dict[int | str, Tensor] = dict(zip(self.keys, tensors, strict=True))
        args = (given.get(number, value) for number, value in enumerate(self.args))
        return function(*args, **{name: given.get(name, v) for name, v in self.kwargs.items()})


def take_tensors(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor], CallWithoutTensors]:
    """Returns the tensors among the arguments of a call, and the rest."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    found = {key: value for key, value in named if isinstance(value, Tensor)}
    rest = tuple(None if number in found else value for number, value in enumerate(args))
    named_rest = {name: None if name in found else value for name, value in kwargs.items()}
    return list(found.values()), CallWithoutTensors(list(found), rest, named_rest)


class _ToCpu(torch.autograd.Function):
    """Connects copies on the CPU with their originals."""

    @staticmethod
    def forward(ctx: Any, copies: list[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.device = tensors[0].device
        on_cpu = ctx.device.type == "cpu"
        ctx.stream = None if on_cpu else torch.cuda.current_stream(ctx.device)
        ctx.mark_non_differentiable(*(t for t in copies if not t.is_floating_point()))
        ctx.set_materialize_grads(False)
        return tuple(copies)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Autograd sets no stream here, because the gradients are on the CPU.
        with torch.cuda.stream(ctx.stream):
            return None, *(None if g is None else _copy_to(g, ctx.device) for g in grads)


class _ToDevice(torch.autograd.Function):
    """Copies a result from the CPU."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, device: torch.device) -> Tensor:
        ctx.save_for_backward(y.new_empty(0))
        return _copy_to(y, device)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Under checkpointing, to read a saved tensor runs the forward again. It must happen here:
        # later, two threads might do it at once, that of the CPU's nodes and that of the GPU's.
        _ = ctx.saved_tensors
        return _copy_to_cpu([grad])[0], None


def _copy_to_cpu(
    tensors: Sequence[Tensor], meanwhile: Callable[[], object] | None = None
) -> list[Tensor]:
    """Returns copies on the CPU, in pinned memory if they come from a GPU; the host waits once."""
    device = tensors[0].device
    with torch.no_grad():
        copies = [t.to("cpu", non_blocking=True, copy=True) for t in tensors]
    event = None
    if device.type != "cpu":
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
    if meanwhile is not None:
        meanwhile()
    if event is not None:
        event.synchronize()
    return copies


def _copy_to(t: Tensor, device: torch.device) -> Tensor:
    """Returns a copy on `device`, in the order of its current stream."""
    if device.type == "cpu":
        return t.clone()
    return t.pin_memory().to(device, non_blocking=True)
