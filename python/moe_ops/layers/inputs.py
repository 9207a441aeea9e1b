"""Layer inputs other than plain tensors: jagged tensors, and proxies of torch.fx.

A jagged tensor [B, j*, H] (torch.nested, layout=torch.jagged) stores B sequences of different
lengths as one tensor of all tokens [T, H] and offsets [B + 1]. Layers of tokens use this format
without padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.fx import Proxy

from moe_ops._private_torch import ragged_dim

Forward = TypeVar("Forward", bound=Callable[..., Any])


class Jagged(NamedTuple):
    """Parts of a jagged tensor: values [T, ...], the tokens of all sequences, and offsets [B + 1]
    int64, the start of each."""

    values: Tensor
    offsets: Tensor

    def like(self, values: Tensor, *, dim: int = 1) -> Tensor:
        """Returns a jagged tensor with these sequence lengths and the given values; `dim` is the
        ragged dimension."""
        return torch.nested.nested_tensor_from_jagged(values, self.offsets, jagged_dim=dim)


def jagged_parts(name: str, x: Any) -> Jagged:
    """Returns the parts of x [B, j*, ..., H], a nested tensor.

    Raises:
        ValueError: the strided layout, a ragged dimension other than the second, or holes.
    """
    wanted = f"{name}: x must be a jagged tensor [B, j*, ..., H]"
    if x.layout is not torch.jagged:
        raise ValueError(
            f"{wanted}, got the strided layout of torch.nested; "
            "torch.nested.as_nested_tensor(list(x.unbind()), layout=torch.jagged) converts it."
        )
    if x.lengths() is not None:
        raise ValueError(f"{wanted} without holes, got one with lengths; call x.contiguous().")
    if x.dim() < 3 or ragged_dim(x) != 1:
        sizes = [str(size) for size in x.shape]
        sizes[ragged_dim(x)] = "j*"
        raise ValueError(f"{wanted}, got shape [{', '.join(sizes)}].")
    return Jagged(x.values(), x.offsets())


def values_of(name: str, what: str, t: Any, x: Tensor) -> Any:
    """Returns the values of t, an argument passed with the jagged x, if t is jagged, else t.

    Raises:
        ValueError: t has other sequence lengths than x.
    """
    if not isinstance(t, Tensor) or not t.is_nested:
        return t
    if t.layout is not torch.jagged or t.dim() < 2 or t.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"{name}: {what} must have the offsets of x where it is jagged, got others; make it by "
            "torch.nested.nested_tensor_from_jagged(values, x.offsets())."
        )
    return t.values()


def as_leaf(layer: Any, x: Proxy, *args: Any, **kwargs: Any) -> Proxy:
    """Returns a proxy for the layer's output to torch.fx.symbolic_trace, which makes the layer one
    node, like the modules of torch.nn: the ops that a layer calls depend on x."""
    tracer: Any = x.tracer
    node: Proxy = tracer.create_proxy(
        "call_module", tracer.path_of_module(layer), (x, *args), kwargs
    )
    return node


def takes_jagged(forward: Forward) -> Forward:
    """Decorates `forward` of a per-token layer, which maps x [..., H] to a tensor like x or to a
    named tuple with the field y. The decorated forward also accepts a jagged x, and y then has its
    offsets; other per-token arguments may be jagged. torch.fx sees a leaf."""

    def run_values(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        name = type(self).__name__
        jagged = jagged_parts(name, x)
        args = tuple(values_of(name, f"argument {i + 1}", a, x) for i, a in enumerate(args))
        kwargs = {k: values_of(name, k, v, x) for k, v in kwargs.items()}
        out = forward(self, jagged.values, *args, **kwargs)
        if isinstance(out, Tensor):
            return jagged.like(out)
        return out._replace(y=jagged.like(out.y))

    return _with_nested(forward, run_values)


def takes_dense(forward: Forward) -> Forward:
    """Decorates `forward` of a layer that rejects nested tensors. torch.fx sees a leaf."""

    def refuse(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"{type(self).__name__}: x must be a dense tensor, got a nested one; x.values() are "
            "the tokens of a jagged one, x.unbind() its sequences."
        )

    return _with_nested(forward, refuse)


def leaf_of_fx(forward: Forward) -> Forward:
    """Decorates `forward` of a layer that handles nested tensors itself. torch.fx sees a leaf."""
    return _with_nested(forward, forward)


def _with_nested(forward: Forward, on_nested: Callable[..., Any]) -> Forward:
    @functools.wraps(forward)
    def run(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, Proxy):
            return as_leaf(self, x, *args, **kwargs)
        if x.is_nested:
            return on_nested(self, x, *args, **kwargs)
        return forward(self, x, *args, **kwargs)

    return cast(Forward, run)
