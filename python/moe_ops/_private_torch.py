"""All private names of torch that this package uses, with substitutes for versions of torch without
them.

Public torch has no other way to register a rule below autograd or to check whether a call needs the
full dispatcher. tests/test_private_torch.py finds private names elsewhere in the package, and runs
it with a torch that lacks all names with substitutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.nn.modules.module
import torch.utils._python_dispatch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd import forward_ad

# torch.library.register_autograd uses these two; there is no substitute.
AutoDispatchBelowAutograd: Any = torch._C._AutoDispatchBelowAutograd
after_autograd_keyset: Any = torch._C._after_autograd_keyset


def arguments_of(op: str) -> list[Any]:
    """Returns the arguments of an op of this package in the order of its schema: `name`,
    `default_value`, `kwarg_only`."""
    return list(getattr(torch.ops.moe_ops, op).default._schema.arguments)


def entry_of(packet: Any) -> Callable[..., Any]:
    """Returns the function behind an op's packet. The compiler supports only the packet."""
    run: Callable[..., Any] = getattr(packet, "_op", packet)
    return run


def redispatch_of(op: str) -> Callable[..., Any]:
    """Returns a function (keys, *arguments) that calls the op through the dispatcher at the first
    of these keys."""
    overload = getattr(torch.ops.moe_ops, op).default
    redispatch: Callable[..., Any] = overload._handle.redispatch_boxed
    return redispatch


def _any_requires_grad(*args: Any) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in args)


# The __torch_function__ of Tensor subclasses whose functions return plain tensors; the substitute
# returns the subclass.
disabled_torch_function: Any = getattr(
    torch._C, "_disabled_torch_function_impl", Tensor.__torch_function__
)
any_requires_grad: Callable[..., bool] = getattr(torch._C, "_any_requires_grad", _any_requires_grad)
# If torch cannot tell, a transform of torch.func, or a mode, is assumed to be active.
are_functorch_transforms_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: True
)
len_torch_dispatch_stack: Callable[[], int] = getattr(
    torch._C, "_len_torch_dispatch_stack", lambda: 1
)
# -1 outside of a backward pass, which is the default assumption.
current_graph_task_id: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)

try:
    from torch._C import (
        _dispatch_tls_is_dispatch_key_excluded,
        _dispatch_tls_is_dispatch_key_included,
        _is_any_autocast_enabled,
        _is_tracing,
    )

    _PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
    _AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality
    forward_ad._current_level  # noqa: B018

    def in_forward_mode() -> bool:
        """Returns whether tensors may have tangents: inside ``forward_ad.dual_level`` or
        ``torch.func.jvp``. Checking an individual tensor takes a call of a torch operation."""
        return forward_ad._current_level >= 0

    def is_plain_eager() -> bool:
        """Returns whether the dispatcher would go directly to the autograd rule: no autocast,
        functorch, tracer or mode, no tangents, and not below autograd. Inference mode counts as
        plain, although it excludes autograd's keys. Reading all dispatch keys would take longer
        than these checks."""
        return not (
            forward_ad._current_level >= 0
            or _is_any_autocast_enabled()
            or are_functorch_transforms_active()
            or len_torch_dispatch_stack()
            or _is_tracing()
            or _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
            or (
                _dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD)
                and not torch.is_inference_mode_enabled()
            )
        )

except (AttributeError, ImportError):  # All calls pass through the dispatcher.

    def in_forward_mode() -> bool:
        return True

    def is_plain_eager() -> bool:
        return False


def any_tangent(values: Iterable[Any]) -> bool:
    """Returns whether a tensor among the values has a forward-mode tangent."""
    return in_forward_mode() and any(
        isinstance(v, Tensor) and forward_ad.unpack_dual(v).tangent is not None for v in values
    )


enable_single_level_autograd_function: Callable[[], AbstractContextManager[Any]]
try:
    from torch._functorch.utils import enable_single_level_autograd_function
except ImportError:  # torch.func then rejects the ops with its own error.
    enable_single_level_autograd_function = nullcontext
# Base class of a Function for one level of torch.func's transforms.
SingleLevelFunction: Any = getattr(
    torch.autograd.function, "_SingleLevelFunction", torch.autograd.Function
)


# If torch lacks it, modes see operations on real tensors.
disable_modes: Callable[[], AbstractContextManager[Any]] = getattr(
    torch.utils._python_dispatch, "_disable_current_modes", nullcontext
)


def allow_forward_gradients() -> AbstractContextManager[Any]:
    """Enables forward mode, which torch disables inside an autograd Function."""
    allow = getattr(forward_ad, "_set_fwd_grad_enabled", None)
    return nullcontext() if allow is None else allow(True)


def without_autocast(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """Returns a factory of contexts in which the dispatcher skips the autocast rules of cpu or
    cuda."""
    try:
        key = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
        keyset, guard = torch._C.DispatchKeySet(key[device_type]), torch._C._ExcludeDispatchKeyGuard
    except AttributeError:
        return lambda: torch.autocast(device_type, enabled=False)
    return lambda: guard(keyset)


def has_kernel(op: str, device_type: str) -> bool:
    """Returns whether a kernel of the op "namespace::name" is registered for cpu or cuda."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op, device_type.upper()))


# Returns whether there are global module hooks; True if torch cannot tell.
has_global_hooks: Callable[[], bool] = getattr(
    torch.nn.modules.module, "_has_any_global_hook", lambda: True
)


# States a condition on sizes for the compiler; raises if it is false.
check_size: Callable[[bool], None] = torch._check


def collective_ops() -> Any:
    """Returns the asynchronous collectives, whose results `wait_tensor` waits for, and which
    torch's compiler, tracers and checkpointing policies support."""
    return torch.ops._c10d_functional


def collectives_with_gradients() -> Any:
    """Returns the module of these collectives for compiled code; it is slow to import, and useless
    without torch.distributed."""
    from torch.distributed import _functional_collectives

    return _functional_collectives


def fake_process_group() -> tuple[str, Any]:
    """Returns the backend of a process group that sends nothing and returns immediately, and a
    store for it."""
    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        raise ImportError(f"A trace needs torch's fake process group, got: {error}") from error
    return "fake", FakeStore()


def fake_tensors() -> Any:
    """Returns a context in which tensors have no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def dispatch_mode_class() -> Any:
    """Returns the base class of modes that see every operation."""
    return torch.utils._python_dispatch.TorchDispatchMode


def registered_ops(namespace: str) -> list[str]:
    """Returns the names of all ops of a namespace."""
    names = (schema.name for schema in torch._C._jit_get_all_schemas())
    prefix = f"{namespace}::"
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def cuda_driver_version() -> int | None:
    """Returns the CUDA version of the driver, 1000 * major + 10 * minor; None in a torch without
    CUDA."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return None if ask is None else int(ask())


def ragged_dim(x: Tensor) -> int:
    """Returns the ragged dimension of a jagged tensor; the second if torch does not state it."""
    return int(getattr(x, "_ragged_idx", 1))


def exclude_from_ddp(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Excludes parameters and buffers from DistributedDataParallel, in addition to those already
    excluded."""
    before = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [*before, *names]
    )


def timeout_of(group: Any) -> timedelta | None:
    """Returns the timeout of a process group's collectives; None if torch does not state it."""
    for device in getattr(group, "_device_types", ()):
        options = getattr(group._get_backend(device), "options", None)
        timeout: timedelta | None = getattr(options, "_timeout", None)
        if timeout is not None:
            return timeout
    return None


def set_timeout(timeout: timedelta, group: Any) -> None:
    """Sets the timeout of the collectives of a process group of gloo or NCCL."""
    change = getattr(torch.distributed.distributed_c10d, "_set_pg_timeout", None)
    if change is not None and torch.distributed.get_backend(group) in ("gloo", "nccl"):
        change(timeout, group)


def in_selective_recompute() -> bool:
    """Returns whether torch.utils.checkpoint recomputes with results that a policy has kept; any
    mode counts if torch does not tell."""
    kind = getattr(torch.utils.checkpoint, "_CachedTorchDispatchMode", None)
    modes = getattr(torch.utils._python_dispatch, "_get_current_dispatch_mode_stack", None)
    if kind is None or modes is None:
        return len_torch_dispatch_stack() > 0
    return any(isinstance(mode, kind) for mode in modes())
