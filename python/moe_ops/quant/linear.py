"""Dense layers of quantized weights.

Letters: N rows, I input features, O output features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops import _verify as verify
from moe_ops import memory
from moe_ops.expert_weights import hooks_for
from moe_ops.layers.inputs import Proxy, as_leaf, jagged_parts
from moe_ops.layers.linear import FewRowsLinear, is_linear_intact, one_expert
from moe_ops.ops import grouped_gemm_quantized
from moe_ops.ops._checks import dtype_name
from moe_ops.weight_formats import WeightFormat

from .config import DEFAULT, WeightConfig
from .formats import dequantize_weight, quantize_weight
from .stored_linear import StoredLinear

_TENSORS = (Tensor, nn.Parameter)
# Parts of names of layers that choose experts: they are small, and an error there turns tokens to
# other experts.
_ROUTERS = ("router", "gate", "gating")
_SMALLEST = 16  # Output features of what is quantized.
# MLA's projection of latents: mla_decode multiplies queries by this weight, and not latents.
_OF_LATENTS = "kv_b_proj"
_ROWS_AT_ONCE = 1024  # That are rounded; a multiple of the rows of a block of fp8.


class QuantizedLinear(nn.Linear):
    """nn.Linear whose weight is quantized, for inference.

    The weight is in two buffers; the state dict has it under its own name, dequantized, and loads
    it from there, so state dicts are those of nn.Linear. `save_pretrained` writes the two buffers
    as those of a `StoredLinear`, which is what such a checkpoint becomes. A gradient of the input
    goes through the dequantized weight, so adapters on top can be trained; the weight has none.

    Buffers:
        q, scale: the stored weight and its scales, as `moe_ops.quant.quantize_weight` makes them.

    Args:
        layer: what it takes the place of.
        config: of a format; its groups must divide I.
        saved: whether the state dict has the weight; not where it is tied to an embedding's.

    Raises:
        ValueError: groups that do not divide, a weight that is not finite.
    """

    q: Tensor
    scale: Tensor
    # True within `stored_form`.
    gives_codes = False

    def __init__(
        self,
        layer: nn.Linear,
        config: WeightConfig = DEFAULT,
        *,
        saved: bool = True,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.how = config.format
        self.format = self.how.label
        self.weight_dtype = layer.weight.dtype
        self.saved = saved
        self.bias = layer.bias
        self.register_buffer("q", None, persistent=False)
        self.register_buffer("scale", None, persistent=False)
        self.fill(layer.weight)
        self.train(layer.training)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Rounds a weight [O, I] into the buffers, some rows at a time."""
        parts = [quantize_weight(w, self.format) for w in weight.detach().split(_ROWS_AT_ONCE)]
        first_q = parts[0][0]
        shape = (self.out_features, first_q.shape[1])
        self.q = memory.new_zeros(*shape, dtype=first_q.dtype, device=weight.device)
        for rows, (q, _) in zip(self.q.split(_ROWS_AT_ONCE), parts, strict=True):
            rows.copy_(q)
        self.scale = torch.cat([scale for _, scale in parts])

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight [O, I] that is computed with, made anew at every look."""
        return dequantize_weight(self.q, self.scale, self.format, self.weight_dtype)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return as_leaf(self, input)  # type: ignore[return-value]
        if input.is_nested:
            jagged = jagged_parts("QuantizedLinear", input)
            return jagged.like(self.forward(jagged.values))
        rows = input.reshape(-1, self.in_features)
        bias = None if self.bias is None else self.bias.to(rows.dtype)[None]
        if verify.takes_own_forward():
            return self._dequantized(input)
        offsets = one_expert(rows.shape[0], rows.device)
        q, scale = self.q[None], self.scale[None]
        y = grouped_gemm_quantized(rows, q, scale, offsets, format=self.format, bias=bias)
        y = y.view(*input.shape[:-1], self.out_features)
        if verify.is_due(self):
            verify.compare(
                self, "linear layer", y, lambda: self._dequantized(input), quantized=True
            )
        return y

    def _dequantized(self, input: Tensor) -> Tensor:
        """Returns the product with the weight that the codes stand for."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format!r}"
        )

    # ------------------------------------------------------------------------------ module hooks

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        before = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != before.dtype:  # A cast means the weight that is stood for.
            self.weight_dtype = self.scale.dtype
            self.scale = before.to(self.scale.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.saved and self.gives_codes:
            destination |= {prefix + "codes": self.q, prefix + "scale": self.scale}
        elif self.saved:
            destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        weight = state_dict.pop(prefix + "weight", None)
        super()._load_from_state_dict(state_dict, prefix, *others)
        *_, strict, missing, _, errors = others
        shape = [self.out_features, self.in_features]
        if weight is None:
            if strict and self.saved:
                missing.append(prefix + "weight")
        elif list(weight.shape) != shape or not weight.is_floating_point():
            errors.append(
                f"QuantizedLinear: {prefix}weight must be floating point of shape {shape}, got "
                f"{dtype_name(weight.dtype)} of shape {list(weight.shape)}."
            )
        else:
            self.fill(weight.to(self.q.device))


@contextlib.contextmanager
def stored_form(model: nn.Module) -> Iterator[None]:
    """Has the state dict of a model hold its quantized dense layers as a `StoredLinear` does."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    try:
        for layer in layers:
            layer.gives_codes = True
        yield
    finally:
        for layer in layers:
            layer.gives_codes = False


def stored_linears(model: nn.Module) -> dict[str, str]:
    """Returns the quantized dense layers that a state dict has, by name, with their formats."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, StoredLinear):
            found[name] = module.format.label
        elif isinstance(module, QuantizedLinear) and module.saved:
            found[name] = module.format
    return found


def find_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns the dense layers of a model that can be quantized, by name: every plain nn.Linear but
    those that choose experts, MLA's projection of latents, and very small ones."""
    found = {}
    for name, layer in model.named_modules():
        parts = name.split(".")
        routes = any(p in _ROUTERS or p.endswith("_gate") for p in parts)
        if type(layer) is nn.Linear and not routes and parts[-1] != _OF_LATENTS:
            if layer.out_features >= _SMALLEST and layer.in_features:
                found[name] = layer
    return found


def quantize_linears(
    model: nn.Module, config: WeightConfig, skip: Collection[str] = ()
) -> dict[str, str]:
    """Makes the dense layers of a model `QuantizedLinear`, in place, and marks the model.

    Args:
        model: what holds them.
        config: of the format. Layers that its groups do not divide take the next smaller ones, and
            stay float if none does.
        skip: shell patterns of names of layers that stay float.

    Returns:
        Name of each layer that is quantized -> its format.
    """
    report, tied = {}, _tied(model)
    for name, layer in find_linears(model).items():
        fitting = config.fitting(layer.in_features)
        if fitting is None or any(fnmatchcase(name, pattern) for pattern in skip):
            continue
        quantized = QuantizedLinear(layer, fitting, saved=id(layer.weight) not in tied)
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = quantized
        report[name] = quantized.format
    for hook in hooks_for(model):
        hook.mark_dense(model)
    return report


class DenseOperands(NamedTuple):
    """A dense layer for ops that read its weight themselves; `format` as they take it."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    format: str


def dense_operands(layer: nn.Module, dtype: torch.dtype) -> DenseOperands | None:
    """Returns weight, scales, bias and format of a dense layer; None where calling it does
    something else, or it has another type."""
    kind = type(layer)
    if not is_linear_intact():
        return None
    if isinstance(layer, QuantizedLinear) and kind is QuantizedLinear:
        return _quantized_operands(layer, "q", layer.how, dtype)
    if isinstance(layer, StoredLinear) and kind is StoredLinear:
        return _quantized_operands(layer, "codes", layer.format, dtype)
    if kind is FewRowsLinear or kind is nn.Linear:
        parameters: Any = layer._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        if type(weight) in _TENSORS and weight.dtype == dtype:
            return DenseOperands(weight, None, bias, "float")
    return None


def _quantized_operands(
    layer: nn.Module, codes: str, how: WeightFormat, dtype: torch.dtype
) -> DenseOperands | None:
    if dtype == torch.float64 or not how.has_kernels:
        return None
    buffers: Any = layer._buffers
    bias: Any = layer.bias
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    return DenseOperands(buffers[codes], buffers["scale"], bias, how.label)


def _tied(model: nn.Module) -> set[int]:
    """Weights that more than one module has."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                owners[id(p)] = owners.get(id(p), 0) + 1
    return {key for key, count in owners.items() if count > 1}
