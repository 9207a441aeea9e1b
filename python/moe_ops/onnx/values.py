"""Values of an ONNX graph that is being built.

Calling an operator of `onnxscript.opset18` adds its node to the graph that torch.onnx.export
builds, and returns the node's result: the functions of this package read like those of
`moe_ops.reference`. Type and shape are known only for the arguments of an op (dynamic sizes are not
integers), not for computed values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import opset18 as op

Value = Any  # ir.Value with the operators of Python.
FLOAT, INT32, INT64 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64
INT8, UINT8 = ir.DataType.INT8, ir.DataType.UINT8


def refuse_float64(name: str, arguments: Iterable[Any]) -> None:
    for value in arguments:
        if isinstance(value, ir.Value) and value.dtype == ir.DataType.DOUBLE:
            raise ValueError(
                f"{name}: tensors of an ONNX export must be float32, bfloat16 or float16, got "
                "float64."
            )


def size(value: Value, dim: int) -> int:
    """Returns a size that is known at export, as those of weights are."""
    found = value.shape[dim]
    if not isinstance(found, int):
        raise ValueError(f"A size of a weight must be a number in an ONNX export, got {found}.")
    return found


def ints(*numbers: int) -> Value:
    """Returns [n] int64."""
    return op.Constant(value_ints=list(numbers))


def int_scalar(number: int) -> Value:
    return op.Constant(value_int=number)


def number(value: float) -> Value:
    """Returns a float32 scalar."""
    return op.Constant(value_float=float(value))


def byte(value: int) -> Value:
    """Returns a uint8 scalar."""
    return op.Constant(value=ir.tensor(value, dtype=UINT8))


def wide(value: Value, dtype: Any = None) -> Value:
    """Casts to float32, the dtype of sums; `dtype` is that of a value whose dtype is unknown."""
    return value if (dtype or value.dtype) == FLOAT else op.Cast(value, to=FLOAT)


def like(value: Value, other: Value, dtype: Any = None) -> Value:
    """Casts a float32 value to the dtype of an argument, or to a given one."""
    target = other.dtype if dtype is None or dtype == -1 else dtype
    return value if target == FLOAT else op.Cast(value, to=target)


def long(value: Value) -> Value:
    return value if value.dtype == INT64 else op.Cast(value, to=INT64)


def reshape(value: Value, *shape: int) -> Value:
    """Reshapes; 0 keeps a size, -1 infers it."""
    return op.Reshape(value, ints(*shape))


def unsqueeze(value: Value, *axes: int) -> Value:
    return op.Unsqueeze(value, ints(*axes))


def columns(value: Value, begin: int, end: int, step: int = 1) -> Value:
    """Slices the last dimension."""
    return op.Slice(value, ints(begin), ints(end), ints(-1), ints(step))


def halves(value: Value) -> Sequence[Value]:
    """Splits the last dimension into halves."""
    parts: Sequence[Value] = op.Split(value, axis=-1, num_outputs=2)
    return parts


def arange(count: Value) -> Value:
    """Returns [count] int64; `count` is an int64 scalar."""
    return op.Range(int_scalar(0), count, int_scalar(1))


def length(value: Value, dim: int = 0) -> Value:
    """Returns a size as an int64 scalar."""
    return op.Squeeze(op.Shape(value, start=dim, end=dim + 1))


def sum_of(value: Value, axis: int, keepdims: bool = False) -> Value:
    return op.ReduceSum(value, ints(axis), keepdims=int(keepdims))
