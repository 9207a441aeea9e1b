"""Dense layers of inference: products of few rows.

Letters: N rows, I input features, O output features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting

from moe_ops import _verify as verify
from moe_ops._private_torch import is_plain_eager
from moe_ops.layers import functional
from moe_ops.ops import grouped_gemm

# Up to so many rows a product of one expert is the faster one on the CPU: torch's libraries read
# the weights of such products at a third to a half of the speed of memory.
FEW_ROWS = 64
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; on the CPU, few rows without a gradient go through grouped_gemm, and in the
    batch-invariant mode all rows do.

    Args:
        x: [..., I] float.
        weight: [O, I].
        bias: [O] or None.

    Returns:
        [..., O], summed in fp32 (fp64 for fp64).
    """
    if x.is_nested:
        return F.linear(x, weight, bias)
    if functional.multiplies_by_ops(x):
        return functional.linear(x, weight, bias)
    size = x.shape[-1]
    num_rows = x.numel() // size if size else 0
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if (
        wanted
        or not _is_few(num_rows)
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


def _is_few(num_rows: int) -> bool:
    if not is_exporting():
        return 0 < num_rows <= FEW_ROWS
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    # A comparison would limit an exported program to numbers of rows like that of its example.
    return statically_known_true(num_rows > 0) and statically_known_true(num_rows <= FEW_ROWS)


def _own_forward(cls: type[nn.Module]) -> Any:
    """Returns the forward of a class, or None where something has put another one there."""
    forward: Any = cls.forward
    is_own = forward.__module__ == cls.__module__ and not hasattr(forward, "__wrapped__")
    return forward if is_own else None


# A forward that something puts on nn.Linear later on is called for every layer.
_LINEAR_FORWARD = _own_forward(nn.Linear)


def is_linear_intact() -> bool:
    """Returns whether nn.Linear has its own forward."""
    return nn.Linear.forward is _LINEAR_FORWARD


def in_inference_on_few_rows(x: Tensor) -> bool:
    """Returns whether x [..., I] is a plain tensor of few rows on the CPU, in eager code that wants
    no gradient and that nothing watches: what a step of decoding is."""
    return (
        not is_compiling()
        and not torch.is_grad_enabled()
        and type(x) is Tensor
        and 0 < x.numel() <= FEW_ROWS * x.shape[-1]
        and (x.dtype in _FLOATS or x.dtype == torch.float64)
        and x.device.type == "cpu"
        and is_plain_eager()
    )


_offsets: dict[tuple[int, torch.device], Tensor] = {}


def one_expert(num_rows: int, device: torch.device) -> Tensor:
    """expert_offsets of one expert that has all rows; those of few rows are kept."""
    if is_compiling() or num_rows > FEW_ROWS:
        return torch.tensor([0, num_rows], dtype=torch.int32, device=device)
    key = num_rows, device
    if key not in _offsets:
        with torch.inference_mode(False):
            _offsets[key] = torch.tensor([0, num_rows], dtype=torch.int32, device=device)
    return _offsets[key]


class FewRowsLinear(nn.Linear):
    """nn.Linear through `linear`: the same parameters, sums in another order."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_linear_intact():
            return super().forward(input)
        if verify.takes_own_forward():
            return F.linear(input, self.weight, self.bias)
        y = linear(input, self.weight, self.bias)
        if verify.is_due(self):
            verify.compare(self, "linear layer", y, lambda: F.linear(input, self.weight, self.bias))
        return y


def replace_linears(model: nn.Module) -> dict[str, str]:
    """Makes every plain nn.Linear of a model a `FewRowsLinear`, in place.

    Returns:
        Name of each of them -> "few rows".
    """
    report = {}
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear:
            layer.__class__ = FewRowsLinear
            report[name] = "few rows"
    return report
