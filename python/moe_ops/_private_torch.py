"""Every private name of torch that this package uses, and what is done in a torch without it.

Public torch has no other way to register a rule below autograd or to ask whether a call needs the
dispatcher's detours. tests/test_private_torch.py finds private names elsewhere in the package, and
runs it in a torch that has none of those with a substitute here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.modules.module
import torch.utils._python_dispatch
from torch import Tensor
from torch.autograd import forward_ad

# torch.library.register_autograd is made of these two; nothing can take their place.
AutoDispatchBelowAutograd: Any = torch._C._AutoDispatchBelowAutograd
after_autograd_keyset: Any = torch._C._after_autograd_keyset


def arguments_of(op: str) -> list[Any]:
    """The arguments of an op of this package in the order of its schema: `name`, `default_value`,
    `kwarg_only`."""
    return list(getattr(torch.ops.moe_ops, op).default._schema.arguments)


def entry_of(packet: Any) -> Callable[..., Any]:
    """What calling an op comes to. The compiler knows only the packet."""
    run: Callable[..., Any] = getattr(packet, "_op", packet)
    return run


def redispatch_of(op: str) -> Callable[..., Any]:
    """(keys, *arguments) -> the op, called by the dispatcher at the first of these keys."""
    overload = getattr(torch.ops.moe_ops, op).default
    redispatch: Callable[..., Any] = overload._handle.redispatch_boxed
    return redispatch


def _any_requires_grad(*args: Any) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in args)


# What a subclass of Tensor has as __torch_function__ so that functions return plain tensors;
# without it they return the subclass.
disabled_torch_function: Any = getattr(
    torch._C, "_disabled_torch_function_impl", Tensor.__torch_function__
)
any_requires_grad: Callable[..., bool] = getattr(torch._C, "_any_requires_grad", _any_requires_grad)
# A torch that cannot tell is taken to have a transform of torch.func, or a mode, active.
are_functorch_transforms_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: True
)
len_torch_dispatch_stack: Callable[[], int] = getattr(
    torch._C, "_len_torch_dispatch_stack", lambda: 1
)
# -1 outside of a backward pass, which is all that can be assumed.
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
        """Whether tensors may have tangents: inside of ``forward_ad.dual_level`` or
        ``torch.func.jvp``. Only torch itself can tell whether one has, which takes a call of an
        operation."""
        return forward_ad._current_level >= 0

    def is_plain_eager() -> bool:
        """Whether the dispatcher would go straight to the autograd rule: no autocast, functorch,
        tracer or mode, no tangents, and not below autograd already. A read of all its keys would
        take longer than these."""
        return not (
            forward_ad._current_level >= 0
            or _is_any_autocast_enabled()
            or are_functorch_transforms_active()
            or len_torch_dispatch_stack()
            or _is_tracing()
            or _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
            or _dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD)
        )

except (AttributeError, ImportError):  # All calls pass through the dispatcher.

    def in_forward_mode() -> bool:
        return True

    def is_plain_eager() -> bool:
        return False


def any_tangent(values: Iterable[Any]) -> bool:
    """Whether a tensor among the values has a tangent of forward mode."""
    return in_forward_mode() and any(
        isinstance(v, Tensor) and forward_ad.unpack_dual(v).tangent is not None for v in values
    )


enable_single_level_autograd_function: Callable[[], AbstractContextManager[Any]]
try:
    from torch._functorch.utils import enable_single_level_autograd_function
except ImportError:  # torch.func then refuses the ops in its own words.
    enable_single_level_autograd_function = nullcontext
# The base class of a Function that is made for one level of torch.func's transforms.
SingleLevelFunction: Any = getattr(
    torch.autograd.function, "_SingleLevelFunction", torch.autograd.Function
)


# Where torch lacks it, modes see what is asked of real tensors.
disable_modes: Callable[[], AbstractContextManager[Any]] = getattr(
    torch.utils._python_dispatch, "_disable_current_modes", nullcontext
)


def allow_forward_gradients() -> AbstractContextManager[Any]:
    """Turns forward mode on, which torch turns off inside of an autograd Function."""
    allow = getattr(forward_ad, "_set_fwd_grad_enabled", None)
    return nullcontext() if allow is None else allow(True)


def without_autocast(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """What makes a context in which the dispatcher passes by the autocast rules of cpu or cuda."""
    try:
        key = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
        keyset, guard = torch._C.DispatchKeySet(key[device_type]), torch._C._ExcludeDispatchKeyGuard
    except AttributeError:
        return lambda: torch.autocast(device_type, enabled=False)
    return lambda: guard(keyset)


def has_kernel(op: str, device_type: str) -> bool:
    """Whether a kernel of the op "namespace::name" is registered for cpu or cuda."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op, device_type.upper()))


# Whether hooks wait for calls of all modules. A torch that cannot tell is taken to have some.
has_global_hooks: Callable[[], bool] = getattr(
    torch.nn.modules.module, "_has_any_global_hook", lambda: True
)


# A fact about sizes, for the compiler; an error where it is not so.
check_size: Callable[[bool], None] = torch._check


def collective_ops() -> Any:
    """The collectives that return before they are done, whose results `wait_tensor` waits for: what
    torch compiles, traces and lets policies of checkpointing see."""
    return torch.ops._c10d_functional


def collectives_with_gradients() -> Any:
    """The module of the same collectives for compiled code; slow to import, and useless without
    torch.distributed."""
    from torch.distributed import _functional_collectives

    return _functional_collectives


def fake_process_group() -> tuple[str, Any]:
    """The backend of a group that sends nothing and returns at once, and a store for it."""
    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        raise ImportError(f"A trace needs torch's fake process group, got: {error}") from error
    return "fake", FakeStore()


def fake_tensors() -> Any:
    """A context in which tensors have everything but data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def dispatch_mode_class() -> Any:
    """The base class of what sees every operation."""
    return torch.utils._python_dispatch.TorchDispatchMode


def registered_ops(namespace: str) -> list[str]:
    """The names of all ops of a namespace."""
    names = (schema.name for schema in torch._C._jit_get_all_schemas())
    prefix = f"{namespace}::"
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def cuda_driver_version() -> int | None:
    """Of the driver, 1000 * major + 10 * minor; None in a torch without CUDA."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return None if ask is None else int(ask())


def ragged_dim(x: Tensor) -> int:
    """Which dimension of a jagged tensor has sizes of its own; the second where torch does not
    say."""
    return int(getattr(x, "_ragged_idx", 1))


def exclude_from_ddp(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Keeps DistributedDataParallel from parameters and buffers, besides those it is kept from."""
    before = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [*before, *names]
    )
