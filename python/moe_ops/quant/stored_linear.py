"""A dense layer whose weight is as a checkpoint stores it: codes, scales and zero points.

Letters: N rows, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops._private_torch import disabled_torch_function
from moe_ops.formulas.codes import dequantized
from moe_ops.layers.linear import one_expert
from moe_ops.ops import grouped_gemm_quantized
from moe_ops.weight_formats import WeightFormat

_CODES = ("codes", "scale", "zero")


class _MadeWeight(Tensor):
    """A weight that nothing can be written to: adapters are merged by way of `data`."""

    __torch_function__ = disabled_torch_function

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        raise ValueError(
            "StoredLinear: its weight must stay as the checkpoint stores it, got a write to "
            "weight.data; merge adapters into the float model."
        )

    @data.setter
    def data(self, value: Tensor) -> None:
        _ = self.data


class StoredLinear(nn.Linear):
    """nn.Linear with a frozen weight of few bits; x has gradients, the weight has none.

    Buffers: codes, scale and zero (or None) of `WeightFormat.tensors`. Parameter: bias, or None.
    Adapters that are put around an nn.Linear, peft's for instance, find what they look for.

    Args:
        in_features, out_features: I and O.
        format: how the weight is stored.
        bias: whether there is one.
        device: of all tensors.
        dtype: of the bias, and of the weight where something looks at it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: WeightFormat,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.format = format
        self.weight_dtype = dtype or torch.get_default_dtype()
        tensors = format.tensors(out_features, in_features)
        for name, part in zip(_CODES, ("", "_scale", "_zero"), strict=True):
            value = None
            if part in tensors:
                shape, kind = tensors[part]
                value = torch.zeros(shape, dtype=kind, device=device)
            self.register_buffer(name, value)
        empty = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight [O, I] that is computed with, made anew at every look."""
        b: Any = self._buffers
        weight = dequantized(
            b["codes"], b["scale"], b["zero"], format=self.format.label, dtype=torch.float32
        )
        return weight.to(self.weight_dtype).as_subclass(_MadeWeight)

    def forward(self, input: Tensor) -> Tensor:
        b: Any = self._buffers
        rows = input.reshape(-1, self.in_features)
        bias = None if self.bias is None else self.bias.to(rows.dtype)[None]
        zero = None if b["zero"] is None else b["zero"][None]
        offsets = one_expert(rows.shape[0], rows.device)
        codes, scale = b["codes"][None], b["scale"][None]
        y = grouped_gemm_quantized(
            rows, codes, scale, offsets, format=self.format.label, bias=bias, b_zero=zero
        )
        return y.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format.label!r}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredLinear:
        before = {name: self._buffers[name] for name in _CODES}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                if name == "scale":
                    self.weight_dtype = new.dtype
                self._buffers[name] = old.to(new.device)
        return self
