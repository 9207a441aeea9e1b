"""Dense layers of inference: products of few rows, and weights of 8 or 4 bits.

Letters: N rows, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from moe_ops import _verify as verify
from moe_ops import memory
from moe_ops._private_torch import is_plain_eager
from moe_ops.ops import grouped_gemm, grouped_gemm_quantized
from moe_ops.ops._checks import dtype_name
from moe_ops.quant.formats import dequantize_weight, quantize_weight
from moe_ops.weight_formats import GROUP_SIZES

from .inputs import Proxy, as_leaf, jagged_parts

# Up to so many rows a product of one expert is the faster one on the CPU: torch's libraries read
# the weights of such products at a third to a half of the speed of memory.
FEW_ROWS = 64
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TENSORS = (Tensor, nn.Parameter)
# Parts of names of layers that choose experts: they are small, and an error there turns tokens to
# other experts.
_ROUTERS = ("router", "gate", "gating")
_SMALLEST = 16  # Output features of what is quantised.


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; on the CPU, few rows without a gradient go through grouped_gemm.

    Args:
        x: [..., I] float.
        weight: [O, I].
        bias: [O] or None.

    Returns:
        [..., O], summed in fp32 (fp64 for fp64).
    """
    if x.is_nested:
        return F.linear(x, weight, bias)
    size = x.shape[-1]
    num_rows = x.numel() // size if size else 0
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if (
        wanted
        or not 0 < num_rows <= FEW_ROWS
        or x.dtype != weight.dtype
        or x.dtype not in _FLOATS
        or x.device.type != "cpu"
        or torch.is_autocast_enabled("cpu")
    ):
        return F.linear(x, weight, bias)
    rows = x.reshape(num_rows, size)
    offsets = one_expert(num_rows, x.device)
    y = grouped_gemm(rows, weight[None], offsets, bias=None if bias is None else bias[None])
    return y.view(*x.shape[:-1], -1)


def _own_forward(cls: type[nn.Module]) -> Any:
    """Returns the forward of a class, or None where something has put another one there."""
    forward: Any = cls.forward
    is_own = forward.__module__ == cls.__module__ and not hasattr(forward, "__wrapped__")
    return forward if is_own else None


# A forward that something puts on nn.Linear later on is called for every layer.
_LINEAR_FORWARD = _own_forward(nn.Linear)


def in_inference_on_few_rows(x: Tensor) -> bool:
    """Whether x [..., I] is a plain tensor of few rows on the CPU, in eager code that wants no
    gradient and that nothing watches: what a step of decoding is."""
    return (
        not is_compiling()
        and not torch.is_grad_enabled()
        and type(x) is Tensor
        and 0 < x.numel() <= FEW_ROWS * x.shape[-1]
        and (x.dtype in _FLOATS or x.dtype == torch.float64)
        and x.device.type == "cpu"
        and is_plain_eager()
    )


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
    if nn.Linear.forward is not _LINEAR_FORWARD:
        return None
    if isinstance(layer, QuantizedLinear) and kind is QuantizedLinear:
        if dtype == torch.float64:
            return None
        buffers: Any = layer._buffers
        bias: Any = layer.bias
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        return DenseOperands(buffers["q"], buffers["scale"], bias, layer.format)
    if kind is FewRowsLinear or kind is nn.Linear:
        parameters: Any = layer._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        if type(weight) in _TENSORS and weight.dtype == dtype:
            return DenseOperands(weight, None, bias, "float")
    return None


_offsets: dict[tuple[int, torch.device], Tensor] = {}


def one_expert(num_rows: int, device: torch.device) -> Tensor:
    """expert_offsets of one expert that has all rows; those of few rows are kept."""
    if num_rows > FEW_ROWS or torch.compiler.is_compiling():
        return torch.tensor([0, num_rows], dtype=torch.int32, device=device)
    key = num_rows, device
    if key not in _offsets:
        with torch.inference_mode(False):
            _offsets[key] = torch.tensor([0, num_rows], dtype=torch.int32, device=device)
    return _offsets[key]


class FewRowsLinear(nn.Linear):
    """nn.Linear through `linear`: the same parameters, sums in another order."""

    def forward(self, input: Tensor) -> Tensor:
        if nn.Linear.forward is not _LINEAR_FORWARD:
            return super().forward(input)
        if verify.takes_own_forward():
            return F.linear(input, self.weight, self.bias)
        y = linear(input, self.weight, self.bias)
        if verify.is_due(self):
            verify.compare(self, "linear layer", y, lambda: F.linear(input, self.weight, self.bias))
        return y


class QuantizedLinear(nn.Linear):
    """nn.Linear whose weight is stored in 8 or 4 bits, for inference.

    The weight is in two buffers; the state dict has it under its own name, dequantised, and loads
    it from there, so checkpoints are those of nn.Linear. A gradient of the input goes through the
    dequantised weight, so adapters on top can be trained; the weight itself has none.

    Buffers:
        q: int8 [O, I], or uint8 [O, I/2] with two numbers of 4 bits a byte.
        scale: fp32 [O], or [O, I/G]. `moe_ops.quant.quantize_weight` defines both formats.

    Args:
        layer: what it takes the place of.
        format: "int8", or "int4 g32", "int4 g64" or "int4 g128" with groups that divide I.
        saved: whether the state dict has the weight; not where it is tied to an embedding's.

    Raises:
        ValueError: an unknown format, groups that do not divide, a weight that is not finite.
    """

    q: Tensor
    scale: Tensor

    def __init__(
        self,
        layer: nn.Linear,
        format: str = "int4 g64",
        *,
        saved: bool = True,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.format = format
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
        parts = [quantize_weight(w, self.format) for w in weight.detach().split(1024)]
        first_q, first_scale = parts[0]
        shape = (self.out_features, first_q.shape[1])
        self.q = memory.new_zeros(*shape, dtype=first_q.dtype, device=weight.device)
        self.scale = first_scale.new_empty(self.out_features, *first_scale.shape[1:])
        torch.cat([q for q, _ in parts], out=self.q)
        torch.cat([scale for _, scale in parts], out=self.scale)

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
        if self.saved:
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


def fitting_group(in_features: int, group_size: int | None) -> int | None:
    """The largest group of 4-bit weights that divides a row, at most `group_size` (64); or None."""
    most = 64 if group_size is None else group_size
    return max((g for g in GROUP_SIZES if g <= most and in_features % g == 0), default=None)


def replace_linears(
    model: nn.Module, weights: str | None, group_size: int | None, skip: Collection[str] = ()
) -> dict[str, str]:
    """Makes every plain nn.Linear of a model one of the classes above, in place.

    Args:
        weights: None, "int8" or "int4". Layers that choose experts, very small ones and those that
            no group divides stay float.
        group_size: of int4, at most; None is 64.
        skip: last parts of names of layers that stay float.

    Returns:
        Name of each of them -> what it is now.
    """
    report, tied = {}, _tied(model)
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear:
            continue
        parts = name.split(".")
        routes = any(p in _ROUTERS or p.endswith("_gate") for p in parts)
        group = fitting_group(layer.in_features, group_size) if weights == "int4" else None
        small = layer.out_features < _SMALLEST or layer.in_features == 0
        stays = routes or small or (weights == "int4" and group is None)
        if weights is None or stays or parts[-1] in skip:
            layer.__class__ = FewRowsLinear
            report[name] = "few rows"
            continue
        saved = id(layer.weight) not in tied
        quantized = QuantizedLinear(
            layer, weights if group is None else f"{weights} g{group}", saved=saved
        )
        model.get_submodule(".".join(parts[:-1]))._modules[parts[-1]] = quantized
        report[name] = quantized.format
    return report


def _tied(model: nn.Module) -> set[int]:
    """Weights that more than one module has."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                owners[id(p)] = owners.get(id(p), 0) + 1
    return {key for key, count in owners.items() if count > 1}
