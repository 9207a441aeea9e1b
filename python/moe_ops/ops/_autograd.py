"""Calls of the ops, and their autograd rules: gradients, or errors that refuse them.

torch's stable ABI has no autograd in C++, so the rules are registered in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import has_torch_function

from moe_ops._private_torch import (
    AutoDispatchBelowAutograd,
    SingleLevelFunction,
    after_autograd_keyset,
    allow_forward_gradients,
    any_requires_grad,
    any_tangent,
    are_functorch_transforms_active,
    enable_single_level_autograd_function,
    entry_of,
    in_forward_mode,
    is_plain_eager,
    redispatch_of,
)
from moe_ops.ops._error_kinds import LOST, keep_kinds
from moe_ops.ops._library import Signature, library

# Bound here because looking up names is slow once a call's weights have filled the cache.
_is_grad_enabled = torch.is_grad_enabled
_is_inference_mode_enabled = torch.is_inference_mode_enabled

# Op -> function that applies its autograd rule without the dispatcher.
_direct_rules: dict[Any, Callable[..., Any]] = {}


def in_transform() -> bool:
    """Returns whether eager code runs under torch.func's transforms or in forward mode, which must
    see every operation."""
    return not is_compiling() and (in_forward_mode() or are_functorch_transforms_active())


def in_plain_training(*args: Any) -> bool:
    """Returns whether eager code needs a gradient and the dispatcher would directly call the
    autograd rule."""
    return bool(
        not is_compiling()
        and _is_grad_enabled()
        and not _is_inference_mode_enabled()
        and is_plain_eager()
        and not has_torch_function(args)
        and any_requires_grad(*args)
    )


def direct_call(name: str) -> Callable[..., Any]:
    """Returns a function that calls an op with low overhead.

    If no gradient is possible, it bypasses the autograd rule, which is Python code and takes as
    long as routing a token. Inference mode bypasses the rule anyway; compiled code must not check
    for it.

    In plain eager code with gradients, it applies the autograd rule directly: the dispatcher would
    return to Python through torch.library, and a training step of a small layer consists of such
    calls.

    Everything that a call needs is bound beforehand: weights that do not fit in L2 evict Python's
    own objects, and then each name lookup is a cache miss.

    Args:
        name: of the op, without the namespace.
    """
    op = getattr(torch.ops.moe_ops, name)
    run = entry_of(op)

    def call(*args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return op(*args, **kwargs)
        if _is_inference_mode_enabled():
            return run(*args, **kwargs)
        if _is_grad_enabled():
            if kwargs or not is_plain_eager() or has_torch_function(args):
                return run(*args, **kwargs)
            if any_requires_grad(*args):
                return _direct_rules.get(op, run)(*args)
        elif in_forward_mode():
            return run(*args, **kwargs)
        with AutoDispatchBelowAutograd():
            return run(*args, **kwargs)

    return keep_kinds(name, call) if LOST else call


def plain_call(name: str) -> Callable[..., Any]:
    """Returns a function that calls an op without an autograd rule."""
    op: Callable[..., Any] = getattr(torch.ops.moe_ops, name)
    return keep_kinds(name, op) if LOST else op


def needs_input_grad(ctx: Any, count: int) -> tuple[bool, ...]:
    """Returns ``ctx.needs_input_grad`` for all ``count`` arguments.

    The dispatcher drops trailing arguments that equal their defaults, and with them their entries.
    """
    needs = tuple(ctx.needs_input_grad)[:count]
    return needs + (False,) * (count - len(needs))


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Saves all arguments, which must be tensors, as the `setup` of an op whose backward needs
    them."""
    ctx.save_for_backward(*inputs)


def only_needed(grads: Iterable[Tensor], needs: Iterable[bool]) -> Iterator[Tensor | None]:
    """Yields the gradients, or None if they are not needed."""
    return (g if need else None for g, need in zip(grads, needs, strict=True))


def register_autograd(
    op: str,
    backward: Callable[..., Any],
    setup: Callable[[Any, tuple[Any, ...], Any], None],
    *,
    forward: str | None = None,
) -> None:
    """Registers an autograd rule that supports torch.func and refuses forward mode.

    ``torch.library.register_autograd`` reads the schema on every call to fill in defaults and
    creates an object for the dispatch keys, which is slow for a training step of a small layer. It
    silently drops tangents, fails under torch.func, and can save only inputs and outputs of the op.

    Args:
        op: name of the op, without the namespace.
        backward: (ctx, *gradients of the outputs) -> gradients of all arguments, in the order of
            the schema, keyword-only ones last.
        setup: (ctx, all arguments, output), saves what backward needs.
        forward: an op with the arguments of `op` that replaces it if a gradient is needed. Its
            first output is that of `op`; `setup` gets all outputs, to save those that callers of
            `op` do not see.
    """
    signature = Signature(op)
    packet, defaults = getattr(torch.ops.moe_ops, op), signature.defaults
    training = forward or op
    run, redispatch = entry_of(getattr(torch.ops.moe_ops, training)), redispatch_of(training)
    jvp = refuse_tangents(op)

    def run_forward(ctx: Any, *args_and_keys: Any) -> Any:
        args, keyset = args_and_keys[:-1], args_and_keys[-1]
        positional, keywords = signature.split(args)
        with AutoDispatchBelowAutograd():
            with _lower_levels():
                output = redispatch(keyset & after_autograd_keyset, *positional, **keywords)
            setup(ctx, (*args, *defaults[len(args) :]), output)
        return output if forward is None else output[0]

    # The keys come last, so that `needs_input_grad` of the other arguments keeps its indices; keys
    # have no gradient. Gradients of omitted arguments are None, which autograd drops.
    def all_gradients(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return *backward(ctx, *grads), None

    apply = _rule_of(
        f"{op}_autograd",
        forward=staticmethod(run_forward),
        backward=staticmethod(all_gradients),
        jvp=staticmethod(jvp),
    )

    def run_plain_forward(ctx: Any, *args: Any) -> Any:
        with AutoDispatchBelowAutograd():
            output = run(*args)
            setup(ctx, (*args, *defaults[len(args) :]), output)
        return output if forward is None else output[0]

    plain: Any = type(
        f"{op}_autograd",
        (torch.autograd.Function,),
        {"forward": staticmethod(run_plain_forward), "backward": staticmethod(backward)},
    )
    if not signature.keywords:
        # Function.apply itself only checks for functorch, which `call` has done.
        _direct_rules[packet] = super(torch.autograd.Function, plain).apply

    def differentiate(keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # torch finds the tangents and calls jvp if there are any.
        row = signature.complete(args, kwargs) if signature.keywords else args
        return apply(*row, keyset)

    _register_rule(op, differentiate)


def _register_rule(
    op: str, differentiate: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
) -> None:
    """Calls `differentiate` (keys, positional arguments, keyword-only arguments) instead of the op
    if a gradient or a tangent is needed."""
    redispatch = redispatch_of(op)

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if (_is_grad_enabled() and any_requires_grad(*args)) or any_tangent(args):
            return differentiate(keyset, args, kwargs)
        with AutoDispatchBelowAutograd():
            return redispatch(keyset & after_autograd_keyset, *args, **kwargs)

    library.impl(op, kernel, "Autograd", with_keyset=True)


def _lower_levels() -> AbstractContextManager[Any]:
    """Returns a context in which a rule calls the outer transforms of torch.func, which may also
    differentiate: during its forward, a Function disables differentiation at all levels."""
    if not are_functorch_transforms_active():
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.enable_grad())
    stack.enter_context(allow_forward_gradients())
    return stack


def _rule_of(name: str, **methods: Any) -> Callable[..., Any]:
    """Returns ``apply`` of an autograd Function, for the rule of an op.

    Under torch.func's transforms, the dispatcher calls the rule once per level that differentiates,
    with tensors of that level; inner calls go to the next level, as with torch's own operations.
    torch requires functions for one level to be marked as such.
    """
    function: Any = type(name, (torch.autograd.Function,), methods)
    single_level: Any = type(name, (SingleLevelFunction,), methods)

    def apply(*args: Any) -> Any:
        if not are_functorch_transforms_active():
            return function.apply(*args)
        with enable_single_level_autograd_function():
            return single_level.apply(*args)

    return apply


# --- ops without a gradient


def _public(op: str) -> str:
    """Returns the name of the public op, which has a reference."""
    for suffix in ("_accumulate", "_bwd", "_fwd", "_exact"):
        op = op.removesuffix(suffix)
    return op


def refuse_tangents(op: str, advice: str | None = None) -> Callable[..., Any]:
    """Returns a ``jvp`` that raises, for an autograd Function without one."""
    name = _public(op)
    if advice is None:
        advice = f"moe_ops.reference.{name} can be differentiated in forward mode"

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(f"{name}: forward-mode AD is not implemented; {advice}.")

    return jvp


def _no_second_derivative(op: str) -> NotImplementedError:
    name = _public(op)
    return NotImplementedError(
        f"{name}: the second derivative is not implemented; {op} cannot be differentiated. "
        f"moe_ops.reference.{name} can."
    )


def register_no_double_backward(op: str) -> None:
    """Registers a rule that makes a derivative of the backward `op` an error instead of a missing
    gradient."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise _no_second_derivative(op)

    register_autograd(op, backward, lambda ctx, inputs, output: None)


def register_not_differentiable(op: str) -> None:
    """Acts like `register_no_double_backward`, for ops that write into their arguments, which
    `register_autograd` does not support."""

    def refuse(keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise _no_second_derivative(op)

    _register_rule(op, refuse)


def register_no_gradient(op: str, advice: str) -> None:
    """Registers an inference-only op: raises in the forward pass if a gradient is needed."""
    names = Signature(op).names
    jvp = refuse_tangents(op, f"call it on tensors without tangents, or {advice}")

    def refuse(keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any_tangent(args):
            jvp(None)
        tensors = {n: v for n, v in zip(names, args, strict=False) if isinstance(v, Tensor)}
        wanted = ", ".join(n for n, v in tensors.items() if v.requires_grad)
        raise NotImplementedError(
            f"{op}: it has no gradient, and {wanted} requires one; call it under torch.no_grad(), "
            f"or {advice}."
        )

    _register_rule(op, refuse)


def register_gradient_of(op: str, function: Callable[..., Any]) -> None:
    """Calls `function` with all arguments instead of the op if a gradient is needed."""
    signature = Signature(op)

    def differentiate(keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return function(*signature.complete(args, kwargs))

    _register_rule(op, differentiate)
