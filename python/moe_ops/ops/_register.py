"""What every op registers from Python: fake checks, autocast, errors of missing second derivatives.

The stable ABI has no C++ autograd or autocast, so those rules live beside the public functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd, is_grad_enabled, is_inference_mode_enabled
from torch.compiler import is_compiling

# What _plain_eager asks torch; a release without one of these takes the dispatcher's way.
try:
    from torch._C import (
        _any_requires_grad,
        _are_functorch_transforms_active,
        _dispatch_tls_is_dispatch_key_excluded,
        _dispatch_tls_is_dispatch_key_included,
        _has_torch_function,
        _is_any_autocast_enabled,
        _len_torch_dispatch_stack,
    )

    _CAN_ASK = True
except ImportError:
    _CAN_ASK = False

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTS = (torch.int32, torch.int64)

# Keeps the registrations alive for the life of the process.
library = torch.library.Library("moe_ops", "FRAGMENT")
# Ops whose only CUDA kernel is a sentence.
cpu_only_ops: list[str] = []


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_float(op: str, name: str, t: Tensor) -> None:
    check(
        t.dtype in _FLOATS,
        f"{op}: {name} must be float64, float32, bfloat16 or float16, got {dtype_name(t.dtype)}.",
    )


def check_index(op: str, name: str, t: Tensor) -> None:
    check(
        t.dtype in _INTS,
        f"{op}: {name} must be int32 or int64, got {dtype_name(t.dtype)}.",
    )


def check_dim(op: str, name: str, t: Tensor, dim: int, shape: str) -> None:
    check(
        t.dim() == dim,
        f"{op}: {name} must be {shape} ({dim} dimensions), got shape {list(t.shape)}.",
    )


def check_size(op: str, name: str, t: Tensor, d: int, n: int, what: str) -> None:
    check(
        t.shape[d] == n,
        f"{op}: {name} must have {what} = {n} in dimension {d}, got shape {list(t.shape)}.",
    )


def check_same_dtype(op: str, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    check(
        t.dtype == like.dtype,
        f"{op}: {name} must be {dtype_name(like.dtype)} like {like_name}, "
        f"got {dtype_name(t.dtype)}.",
    )


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """A fake implementation must refuse what the real one cannot run."""
    first_name, first = next((n, t) for n, t in tensors.items() if t is not None)
    for name, t in tensors.items():
        check(
            t is None or t.device == first.device,
            f"{op}: {name} must be on {first.device} like {first_name}, "
            f"got {t.device if t is not None else None}.",
        )


# Op -> what applies its autograd rule, without the way there through the dispatcher.
_autograd_rules: dict[Any, Callable[..., Any]] = {}


_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality


def _plain_eager() -> bool:
    """Whether the dispatcher would go straight to the autograd rule: no autocast, functorch or
    mode, and not below autograd already. A read of all its keys would take longer than these."""
    return not (
        _is_any_autocast_enabled()
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack()
        or _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
        or _dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD)
    )


def in_plain_training(*args: Any) -> bool:
    """Whether a gradient is wanted, in eager code where the dispatcher would go straight to the
    autograd rule."""
    return bool(
        _CAN_ASK
        and not is_compiling()
        and is_grad_enabled()
        and not is_inference_mode_enabled()
        and _plain_eager()
        and not _has_torch_function(args)
        and _any_requires_grad(*args)
    )


def _run_of(packet: Any) -> Callable[..., Any]:
    """What calling an op comes to. The compiler knows only the packet."""
    run: Callable[..., Any] = getattr(packet, "_op", packet)
    return run


def caller(name: str) -> Callable[..., Any]:
    """A function that calls an op.

    Where no gradient can be wanted, it passes by the autograd rule, which is Python and takes 5 us,
    as long as routing a token. Inference mode passes by it anyway; code that is being compiled must
    not ask for it.

    In plain eager code that wants gradients, the autograd rule is applied here: the dispatcher
    would come back to Python for it, through torch.library, and a training step of a small layer is
    made of such calls.

    What a call needs is bound beforehand. Weights that do not fit L2 push Python's own objects out
    of it; then looking up names and passing through torch's functions takes up to 7 us a call.

    Args:
        name: of the op, without the namespace.
    """
    op = getattr(torch.ops.moe_ops, name)
    run = _run_of(op)

    def call(*args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return op(*args, **kwargs)
        if is_inference_mode_enabled():
            return run(*args, **kwargs)
        if is_grad_enabled():
            if kwargs or not _CAN_ASK or not _plain_eager() or _has_torch_function(args):
                return run(*args, **kwargs)
            if _any_requires_grad(*args):
                return _autograd_rules.get(op, run)(*args)
        with _AutoDispatchBelowAutograd():
            return run(*args, **kwargs)

    return call


def options_of(
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    interleaved: bool,
    apply_router_weight_on_input: bool,
    alpha: float,
    limit: float,
) -> tuple[Any, ...]:
    """The last arguments of moe_ffn and its kin, for a call: none where all are at their defaults.
    The dispatcher takes half a microsecond to read the seven."""
    if (
        activation == "swiglu"
        and b_gate_up is None
        and b_down is None
        and interleaved is False
        and apply_router_weight_on_input is False
        and alpha == 1.702
        and limit == 7.0
    ):
        return ()
    return b_gate_up, b_down, activation, interleaved, apply_router_weight_on_input, alpha, limit


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _autocast_keyset(device_type: str) -> Any:
    key = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
    return torch._C.DispatchKeySet(key[device_type])


def register_cpu_only(name: str, instead: str) -> None:
    """An op without a CUDA kernel says so, and what to do instead."""
    cpu_only_ops.append(name)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{name}: it runs on the CPU only, got CUDA tensors; {instead}.")

    library.impl(name, refuse, "CUDA")


def register_autocast(op: str, cast: Sequence[str], dtype: torch.dtype | None = None) -> None:
    """Under autocast, casts the named tensor arguments and leaves the others as they are.

    ``torch.library.register_autocast`` casts every floating tensor, so it would round fp32 routing
    weights to the autocast type. fp64 tensors are left alone, as torch does.

    Args:
        op: name of the op, without the namespace.
        cast: names of the arguments to cast.
        dtype: target; the autocast type of the device when None.
    """
    overload = getattr(torch.ops.moe_ops, op).default
    names = [a.name for a in overload._schema.arguments]
    positional = [a.name for a in overload._schema.arguments if not a.kwarg_only]
    wanted = [n for n in names if n in cast]
    assert len(wanted) == len(cast), (op, cast, names)

    for device_type in ("cpu", "cuda"):
        keyset = _autocast_keyset(device_type)

        def kernel(
            *args: Any, _keyset: Any = keyset, _device: str = device_type, **kwargs: Any
        ) -> Any:
            target = dtype or torch.get_autocast_dtype(_device)

            def convert(name: str, value: Any) -> Any:
                if (
                    name in wanted
                    and isinstance(value, Tensor)
                    and value.is_floating_point()
                    and value.dtype != torch.float64
                    and value.device.type == _device
                ):
                    return value.to(target)
                return value

            new_args = [convert(n, v) for n, v in zip(positional, args, strict=False)]
            new_kwargs = {n: convert(n, v) for n, v in kwargs.items()}
            with torch._C._ExcludeDispatchKeyGuard(_keyset):
                return overload(*new_args, **new_kwargs)

        library.impl(op, kernel, "AutocastCPU" if device_type == "cpu" else "AutocastCUDA")


def needs_input_grad(ctx: Any, count: int) -> tuple[bool, ...]:
    """``ctx.needs_input_grad`` for all ``count`` arguments.

    The dispatcher drops trailing arguments that equal their defaults, and with them their entries.
    """
    needs = tuple(ctx.needs_input_grad)[:count]
    return needs + (False,) * (count - len(needs))


def register_autocast_keep(op: str) -> None:
    """Under autocast, keeps every dtype as it is (pure data movement and elementwise ops)."""
    register_autocast(op, [])


def register_autograd(
    op: str, backward: Callable[..., Any], setup: Callable[[Any, tuple[Any, ...], Any], None]
) -> None:
    """``torch.library.register_autograd`` for an op without keyword-only arguments.

    torch's own reads the schema anew on every call to fill in defaults, and makes an object for the
    dispatch keys. A training step of a small layer is made of such calls.

    Args:
        op: name of the op, without the namespace.
        backward: (ctx, *gradients of the outputs) -> gradients of all arguments.
        setup: (ctx, all arguments, output), saves what backward needs.
    """
    packet = getattr(torch.ops.moe_ops, op)
    overload = packet.default
    run = _run_of(packet)
    arguments = overload._schema.arguments
    assert not any(a.kwarg_only for a in arguments), op
    defaults = tuple(a.default_value for a in arguments)
    redispatch = overload._handle.redispatch_boxed
    below = torch._C._after_autograd_keyset

    def forward(ctx: Any, *args_and_keys: Any) -> Any:
        args, keyset = args_and_keys[:-1], args_and_keys[-1]
        with _AutoDispatchBelowAutograd():
            output = redispatch(keyset & below, *args)
            setup(ctx, (*args, *defaults[len(args) :]), output)
        return output

    # The keys come last, so that `needs_input_grad` of the others keeps its places; they have no
    # gradient. Gradients of arguments that were left out are None, which autograd cuts off.
    def all_gradients(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return *backward(ctx, *grads), None

    function: Any = type(
        f"{op}_autograd",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(all_gradients)},
    )

    def plain_forward(ctx: Any, *args: Any) -> Any:
        with _AutoDispatchBelowAutograd():
            output = run(*args)
            setup(ctx, (*args, *defaults[len(args) :]), output)
        return output

    plain: Any = type(
        f"{op}_autograd",
        (torch.autograd.Function,),
        {"forward": staticmethod(plain_forward), "backward": staticmethod(backward)},
    )
    if _CAN_ASK:
        # Function.apply itself only looks for functorch, which `call` has done.
        _autograd_rules[packet] = super(torch.autograd.Function, plain).apply

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args, keyset)
        with _AutoDispatchBelowAutograd():
            return redispatch(keyset & below, *args)

    library.impl(op, kernel, "Autograd", with_keyset=True)


def register_training_form(op: str, forward: str) -> None:
    """Lets ``op`` run the op ``forward``, which also returns what backward needs, when a gradient
    is wanted, and its own kernel otherwise.

    ``torch.library.register_autograd`` can only save inputs and outputs, and the pre-activation is
    no output that a caller of ``op`` wants to see.
    """
    overload = getattr(torch.ops.moe_ops, op).default
    training = getattr(torch.ops.moe_ops, forward).default

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(a, Tensor) and a.requires_grad for a in (*args, *kwargs.values())
        ):
            return training(*args, **kwargs)[0]
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    library.impl(op, kernel, "Autograd", with_keyset=True)


def register_no_double_backward(op: str, forward: str) -> None:
    """Makes a second derivative through ``op`` a clear error instead of a missing gradient."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"{forward}: the second derivative is not implemented; {op} cannot be differentiated. "
            f"moe_ops.reference.{forward} can."
        )

    torch.library.register_autograd(f"moe_ops::{op}", backward)


def register_not_differentiable(op: str, forward: str) -> None:
    """The same for an op that writes into its arguments, which register_autograd does not take."""
    overload = getattr(torch.ops.moe_ops, op).default

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(a, Tensor) and a.requires_grad for a in (*args, *kwargs.values())
        ):
            raise NotImplementedError(
                f"{forward}: the second derivative is not implemented; {op} cannot be "
                f"differentiated. moe_ops.reference.{forward} can."
            )
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    library.impl(op, kernel, "Autograd", with_keyset=True)


def register_no_gradient(op: str, advice: str) -> None:
    """For an op of inference: an error where a gradient is wanted, in the forward pass already."""
    overload = getattr(torch.ops.moe_ops, op).default

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            named = dict(zip((a.name for a in overload._schema.arguments), args, strict=False))
            named |= kwargs
            wanted = [n for n, v in named.items() if isinstance(v, Tensor) and v.requires_grad]
            if wanted:
                raise NotImplementedError(
                    f"{op}: it has no gradient, and {', '.join(wanted)} requires one; call it "
                    f"under torch.no_grad(), or {advice}."
                )
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    library.impl(op, kernel, "Autograd", with_keyset=True)


def register_fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"moe_ops::{op}")
