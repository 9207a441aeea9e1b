"""What every op registers from Python: fake checks, autocast, errors of missing second derivatives.

The stable ABI has no C++ autograd or autocast, so those rules live beside the public functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd, is_grad_enabled, is_inference_mode_enabled
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
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


def in_forward_mode() -> bool:
    """Whether tensors may have tangents: inside of ``forward_ad.dual_level`` or ``torch.func.jvp``.
    Only torch itself can tell whether one has, which takes a call of an operation."""
    return forward_ad._current_level >= 0


def _any_tangent(values: Iterable[Any]) -> bool:
    return in_forward_mode() and any(
        isinstance(v, Tensor) and forward_ad.unpack_dual(v).tangent is not None for v in values
    )


def in_transform() -> bool:
    """Whether eager code runs under torch.func's transforms or in forward mode, which must see
    every operation."""
    return not is_compiling() and (in_forward_mode() or torch._C._are_functorch_transforms_active())


def _plain_eager() -> bool:
    """Whether the dispatcher would go straight to the autograd rule: no autocast, functorch or
    mode, no tangents, and not below autograd already. A read of all its keys would take longer than
    these."""
    return not (
        forward_ad._current_level >= 0
        or _is_any_autocast_enabled()
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
        elif forward_ad._current_level >= 0:
            return run(*args, **kwargs)
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


def _public(op: str) -> str:
    """The op that users call and that has a reference."""
    for suffix in ("_bwd_accumulate", "_bwd", "_fwd"):
        op = op.removesuffix(suffix)
    return op


def refuse_tangents(op: str, advice: str | None = None) -> Callable[..., Any]:
    """The ``jvp`` of an autograd Function that has none."""
    name = _public(op)
    if advice is None:
        advice = f"moe_ops.reference.{name} can be differentiated in forward mode"

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(f"{name}: forward-mode AD is not implemented; {advice}.")

    return jvp


class _Call:
    """How an op is called with all its arguments in a row, keyword-only ones last."""

    def __init__(self, op: str) -> None:
        self.packet = getattr(torch.ops.moe_ops, op)
        self.overload = self.packet.default
        arguments = self.overload._schema.arguments
        self.num_positional = sum(not a.kwarg_only for a in arguments)
        self.keywords = tuple(a.name for a in arguments if a.kwarg_only)
        self.defaults = tuple(a.default_value for a in arguments)

    def complete(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments in a row. The dispatcher drops trailing ones that equal their defaults."""
        given = (*args, *self.defaults[len(args) : self.num_positional])
        if not self.keywords:
            return given
        last = zip(self.keywords, self.defaults[self.num_positional :], strict=True)
        return *given, *(kwargs.get(name, default) for name, default in last)

    def split(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not self.keywords:
            return args, {}
        last = args[self.num_positional :]
        return args[: self.num_positional], dict(zip(self.keywords, last, strict=True))


def register_autograd(
    op: str, backward: Callable[..., Any], setup: Callable[[Any, tuple[Any, ...], Any], None]
) -> None:
    """``torch.library.register_autograd`` that also knows torch.func and refuses forward mode.

    torch's own reads the schema anew on every call to fill in defaults, and makes an object for the
    dispatch keys; a training step of a small layer is made of such calls. It drops tangents without
    a word and fails under torch.func.

    Args:
        op: name of the op, without the namespace.
        backward: (ctx, *gradients of the outputs) -> gradients of all arguments, in the order of
            the schema, keyword-only ones last.
        setup: (ctx, all arguments, output), saves what backward needs.
    """
    call = _Call(op)
    packet, defaults = call.packet, call.defaults
    run = _run_of(packet)
    redispatch = call.overload._handle.redispatch_boxed
    below = torch._C._after_autograd_keyset
    jvp = refuse_tangents(op)

    def forward(ctx: Any, *args_and_keys: Any) -> Any:
        args, keyset = args_and_keys[:-1], args_and_keys[-1]
        positional, keywords = call.split(args)
        with _AutoDispatchBelowAutograd():
            with _lower_levels():
                output = redispatch(keyset & below, *positional, **keywords)
            setup(ctx, (*args, *defaults[len(args) :]), output)
        return output

    # The keys come last, so that `needs_input_grad` of the others keeps its places; they have no
    # gradient. Gradients of arguments that were left out are None, which autograd cuts off.
    def all_gradients(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return *backward(ctx, *grads), None

    function: Any = type(
        f"{op}_autograd",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "backward": staticmethod(all_gradients),
            "jvp": staticmethod(jvp),
        },
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
    if _CAN_ASK and not call.keywords:
        # Function.apply itself only looks for functorch, which `call` has done.
        _autograd_rules[packet] = super(torch.autograd.Function, plain).apply

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if in_forward_mode() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            # torch finds the tangents and calls jvp where there are any.
            row = call.complete(args, kwargs) if call.keywords else args
            return _apply(function, *row, keyset)
        with _AutoDispatchBelowAutograd():
            return redispatch(keyset & below, *args, **kwargs)

    library.impl(op, kernel, "Autograd", with_keyset=True)


def _lower_levels() -> AbstractContextManager[Any]:
    """Where a rule goes on to the outer transforms of torch.func, which may differentiate too: for
    its forward, a Function turns differentiation off at all levels."""
    if not torch._C._are_functorch_transforms_active():
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.enable_grad())
    stack.enter_context(forward_ad._set_fwd_grad_enabled(True))
    return stack


def _apply(function: Any, *args: Any) -> Any:
    """``function.apply`` for the autograd rule of an op.

    Under torch.func's transforms, the dispatcher comes here once for each level that
    differentiates, with tensors of that level, and what the function calls goes on to the next one,
    as with torch's own operations. torch wants to be told that a function is made for one level.
    """
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, function).apply(*args)


def register_training_form(op: str, forward: str, without: Sequence[str] = ()) -> None:
    """Lets ``op`` run the op ``forward``, which also returns what backward needs, when a gradient
    is wanted, and its own kernel otherwise.

    ``torch.library.register_autograd`` can only save inputs and outputs, and the pre-activation is
    no output that a caller of ``op`` wants to see.

    Args:
        op: name of the op, without the namespace.
        forward: the op for training; its first output is that of ``op``.
        without: arguments of ``op`` that ``forward`` does not have.
    """
    overload = getattr(torch.ops.moe_ops, op).default
    training = getattr(torch.ops.moe_ops, forward).default
    names = [a.name for a in overload._schema.arguments]

    def train(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if without:
            kwargs = dict(zip(names, args, strict=False)) | kwargs
            args = ()
            for name in without:
                del kwargs[name]
        return training(*args, **kwargs)[0]

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        if (
            torch.is_grad_enabled()
            and any(isinstance(a, Tensor) and a.requires_grad for a in values)
        ) or _any_tangent(values):
            return train(args, kwargs)
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    library.impl(op, kernel, "Autograd", with_keyset=True)


def register_no_double_backward(op: str, forward: str) -> None:
    """Makes a second derivative through ``op`` a clear error instead of a missing gradient."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"{forward}: the second derivative is not implemented; {op} cannot be differentiated. "
            f"moe_ops.reference.{forward} can."
        )

    register_autograd(op, backward, lambda ctx, inputs, output: None)


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
    names = [a.name for a in overload._schema.arguments]
    jvp = refuse_tangents(op, f"call it on tensors without tangents, or {advice}")

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if in_forward_mode() or torch.is_grad_enabled():
            named = dict(zip(names, args, strict=False)) | kwargs
            tensors = {n: v for n, v in named.items() if isinstance(v, Tensor)}
            if _any_tangent(tensors.values()):
                jvp(None)
            wanted = [n for n, v in tensors.items() if v.requires_grad and torch.is_grad_enabled()]
            if wanted:
                raise NotImplementedError(
                    f"{op}: it has no gradient, and {', '.join(wanted)} requires one; call it "
                    f"under torch.no_grad(), or {advice}."
                )
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    library.impl(op, kernel, "Autograd", with_keyset=True)


def register_fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"moe_ops::{op}")
