"""Computation of all experts on all tokens, and mixtures of their outputs, without routing.

Letters: T tokens, G inputs, E experts, H input size, I intermediate size, O output size, M
mixtures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_ops.ops._autograd import in_transform
from moe_ops.ops._checks import accumulate_dtype, check_positive
from moe_ops.ops.all_experts_ffn import all_experts_ffn
from moe_ops.ops.grouped_gemm import grouped_gemm
from moe_ops.ops.mix_expert_outputs import mix_expert_outputs

from .functional import multiplies_by_ops
from .inputs import takes_dense


class Segment(NamedTuple):
    """Inputs start .. start + num - 1, each read by `size` consecutive experts, beginning with
    `expert`."""

    start: int
    num: int
    expert: int
    size: int


def segments(input_ids: Sequence[int]) -> tuple[Segment, ...]:
    """Splits experts into a minimal number of segments; each segment is one batched GEMM."""
    runs: list[list[int]] = []  # input, first expert, number of experts
    for e, i in enumerate(input_ids):
        if runs and runs[-1][0] == i:
            runs[-1][2] += 1
        else:
            runs.append([i, e, 1])
    found: list[Segment] = []
    for i, e, size in runs:
        last = found[-1] if found else None
        if last is not None and last.size == size and last.start + last.num == i:
            found[-1] = last._replace(num=last.num + 1)
        else:
            found.append(Segment(i, 1, e, size))
    return tuple(found)


def expert_inputs(
    x: Tensor, input_ids: Sequence[int] | None, num_experts: int, hidden_size: int
) -> tuple[Tensor, list[int]]:
    """Returns the inputs of `Experts.outputs` as [T, G, H], and the input index of each expert."""
    name, e, h = "Experts.outputs", num_experts, hidden_size
    if x.dim() not in (2, 3) or x.shape[-1] != h:
        raise ValueError(f"{name}: x must be [T, {h}] or [T, G, {h}], got shape {list(x.shape)}.")
    if x.dim() == 2:
        if input_ids is not None:
            raise ValueError(
                f"{name}: input_ids must come with x [T, G, H], got shape {list(x.shape)}."
            )
        return x[:, None], [0] * e
    num_inputs = x.shape[1]
    if input_ids is None:
        size, rest = divmod(e, max(num_inputs, 1))
        if rest or not size:
            raise ValueError(
                f"{name}: x must have a number of inputs that divides {e} experts (or come "
                f"with input_ids), got shape {list(x.shape)}."
            )
        return x, [i // size for i in range(e)]
    ids = [int(i) for i in input_ids]
    if len(ids) != e or min(ids) < 0 or max(ids) >= num_inputs:
        raise ValueError(f"{name}: input_ids must be {e} numbers in [0, {num_inputs}), got {ids}.")
    return x, ids


# Maximum number of weight elements for all_experts_ffn; larger weights do not stay in cache between
# its blocks.
ALL_EXPERTS_FFN_WEIGHTS = 1 << 22


def fits_all_experts_ffn(x: Tensor, w_up: Tensor, w_down: Tensor) -> bool:
    """Returns whether all_experts_ffn supports these operands and is faster."""
    small = w_up.numel() + w_down.numel() <= ALL_EXPERTS_FFN_WEIGHTS
    return x.device.type == "cpu" and small


def low_rank_maps(x: Tensor, down: Tensor, up: Tensor, input_ids: Sequence[int]) -> Tensor:
    """Computes y[:, e] = x[:, input_ids[e]] down[e]^T up[e]^T: x [T, G, H], down [E, R, H], up [E,
    O, R]."""
    if fits_all_experts_ffn(x, down, up):
        ids = torch.tensor(input_ids, dtype=torch.int32, device=x.device)
        return all_experts_ffn(x, down, up, ids, activation="none")
    low = grouped_linear(x, down, None, segments(input_ids))
    return grouped_linear(low, up, None)


def grouped_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, plan: Sequence[Segment] | None = None
) -> Tensor:
    """Computes y[:, e] = x[:, input of e] w[e]^T + bias[e]: [T, G, H] and [E, O, H] to a dense [T,
    E, O].

    `plan` assigns an input to each expert; None: expert e reads input e.
    """
    plan = segments(range(w.shape[0])) if plan is None else plan
    if multiplies_by_ops(x):
        ids = [s.start + i for s in plan for i in range(s.num) for _ in range(s.size)]
        rows = torch.cat([x[:, i] for i in ids])
        offsets = torch.arange(len(ids) + 1, device=x.device) * x.shape[0]
        y = grouped_gemm(rows, w, offsets, bias=bias)
        return y.unflatten(0, (len(ids), x.shape[0])).transpose(0, 1)
    if _own_backward(x, w):
        # Each GEMM writes its columns of the result in place, which autograd's bmm cannot.
        return _GroupedLinear.apply(x, w, bias, tuple(plan))
    parts = []
    for start, count, expert, size in plan:
        span = slice(expert, expert + count * size)
        part = w[span].reshape(count, -1, w.shape[2]).transpose(1, 2)
        inputs = x[:, start : start + count].transpose(0, 1)
        y = torch.bmm(inputs, part)
        if bias is not None:
            y = y + bias[span].reshape(count, 1, -1)
        parts.append(y.transpose(0, 1).unflatten(2, (size, -1)).flatten(1, 2))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _own_backward(a: Tensor, b: Tensor) -> bool:
    """Returns whether the layouts below are faster: in other cases torch loops over them or casts
    operands."""
    return (
        a.device.type == "cpu"
        and a.dtype == b.dtype
        and a.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not in_transform()
    )


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, plan: tuple[Segment, ...]
    ) -> Tensor:
        ctx.plan, ctx.has_bias = plan, bias is not None
        ctx.save_for_backward(x, w)
        num_tokens, (num_experts, out_size, _) = x.shape[0], w.shape
        y = x.new_empty(num_tokens, num_experts, out_size)
        w = w.contiguous()
        for segment in plan:
            inputs, weight = _inputs(x, segment), _weights(w, segment)
            _product(inputs, weight.transpose(1, 2), _columns(y, segment))
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        need_x, need_w, need_bias, _ = ctx.needs_input_grad
        grad, w = grad.contiguous(), w.contiguous()
        grad_x = grad_w = grad_bias = None
        if need_x:
            grad_x = x.new_zeros(x.shape) if _leaves_gaps(x, ctx.plan) else x.new_empty(x.shape)
            written: set[int] = set()
            for segment in ctx.plan:
                out, weight = _inputs(grad_x, segment), _weights(w, segment)
                inputs = range(segment.start, segment.start + segment.num)
                if written.isdisjoint(inputs):
                    _product(_columns(grad, segment), weight, out)
                else:
                    out.baddbmm_(_columns(grad, segment), weight)
                written.update(inputs)
        if need_w:
            grad_w = torch.empty_like(w)
            for segment in ctx.plan:
                columns = _columns(grad, segment).transpose(1, 2)
                _product(columns, _inputs(x, segment), _weights(grad_w, segment))
        if ctx.has_bias and need_bias:
            grad_bias = grad.sum(0)
        return grad_x, grad_w, grad_bias, None


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.shape[0] == 1:
        torch.mm(a[0], b[0], out=out[0])
    else:
        torch.bmm(a, b, out=out)


def _inputs(x: Tensor, segment: Segment) -> Tensor:
    """Returns a view [count, T, H]."""
    return x[:, segment.start : segment.start + segment.num].transpose(0, 1)


def _weights(w: Tensor, segment: Segment) -> Tensor:
    """Returns a view [count, size * O, H]."""
    span = w[segment.expert : segment.expert + segment.num * segment.size]
    return span.view(segment.num, -1, w.shape[2])


def _columns(y: Tensor, segment: Segment) -> Tensor:
    """Returns a view [count, T, size * O] of a dense [T, E, O]."""
    span = y[:, segment.expert : segment.expert + segment.num * segment.size]
    shape = (span.shape[0], segment.num, segment.size * y.shape[2])
    return span.as_strided(shape, (y.stride(0), shape[2], 1)).transpose(0, 1)


def _leaves_gaps(x: Tensor, plan: Sequence[Segment]) -> bool:
    """Returns whether the segments fail to cover every input exactly once."""
    seen = [i for start, count, *_ in plan for i in range(start, start + count)]
    return sorted(seen) != list(range(x.shape[1]))


def mix_outputs(
    outputs: Tensor, weights: Tensor, *, activation: str = "none", factor: Tensor | None = None
) -> Tensor:
    """Mixes the outputs of all experts: y[t, m] = sum_e weights[t, m, e] * act(outputs[t, e]).

    Args:
        outputs: [T, E, O].
        weights: [T, E] for one mixture, or [T, M, E]; in the dtype of `outputs`.
        activation: "none", "relu", "silu" or "sigmoid".
        factor: [T / r, O], or [T / r, M, O]: y[t] is multiplied by factor[t / r]. Or None.

    Returns:
        [T, O], or [T, M, O].

    Raises:
        ValueError: shapes that do not match, an unknown activation.
    """
    _check_mixture("mix_outputs", outputs, weights)
    one = weights.dim() == 2
    w = weights[:, None] if one else weights
    if factor is not None and one:
        factor = factor[:, None]
    if outputs.device.type == "cpu" or multiplies_by_ops(outputs):
        y = mix_expert_outputs(outputs, w, factor=factor, activation=activation)[0]
    else:
        y = torch.bmm(w, _ACTIVATIONS[activation](outputs))
        if factor is not None:
            repeats = y.shape[0] // max(factor.shape[0], 1)
            y = (y.unflatten(0, (factor.shape[0], repeats)) * factor[:, None]).flatten(0, 1)
    return y[:, 0] if one else y


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


def _check_mixture(name: str, outputs: Tensor, weights: Tensor) -> None:
    expected = outputs.shape[:2]
    if (
        outputs.dim() != 3
        or weights.dim() not in (2, 3)
        or ((weights.shape[0], weights.shape[-1]) != tuple(expected))
    ):
        raise ValueError(
            f"{name}: weights must be {list(expected)} or [T, M, E] like outputs "
            f"{list(outputs.shape)}, got shape {list(weights.shape)}."
        )


class ExpertBatchNorm(nn.Module):
    """Batch normalization of each expert's output, in one call for all experts.

    Each of the E * O features has its own scale, shift and running statistics, like one
    `nn.BatchNorm1d(O)` per expert.

    Parameters and buffers: weight, bias, running_mean, running_var, all [E, O];
    num_batches_tracked.

    Args:
        num_experts, size: E and O.
        eps, momentum: as in `nn.BatchNorm1d`.
        device, dtype: of the parameters.

    Training needs at least two tokens; `eval()` uses the running statistics.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_experts: int,
        size: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("ExpertBatchNorm", num_experts=num_experts, size=size)
        self.num_experts, self.size, self.eps, self.momentum = num_experts, size, eps, momentum
        shape = (num_experts, size)
        self.weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(shape, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    @takes_dense
    def forward(self, outputs: Tensor) -> Tensor:
        """Normalizes [T, E, O] to [T, E, O]."""
        num_tokens = outputs.shape[0]
        self._start(outputs)
        if num_tokens == 0:
            return outputs
        y = F.batch_norm(
            outputs.reshape(num_tokens, -1),
            self.running_mean.view(-1),
            self.running_var.view(-1),
            self.weight.view(-1),
            self.bias.view(-1),
            self.training,
            self.momentum,
            self.eps,
        )
        return y.view_as(outputs)

    def mix(self, outputs: Tensor, weights: Tensor, activation: str = "silu") -> Tensor:
        """Computes `mix_outputs` of the normalized outputs without storing them.

        Args:
            outputs: [T, E, O].
            weights: [T, M, E].
            activation: see `mix_outputs`.

        Returns:
            [T, M, O].
        """
        _check_mixture("ExpertBatchNorm.mix", outputs, weights)
        if outputs.device.type != "cpu":
            return mix_outputs(self(outputs), weights, activation=activation)
        self._start(outputs)
        acc = accumulate_dtype(outputs.dtype)
        y, mean, var = mix_expert_outputs(
            outputs,
            weights,
            norm_weight=self.weight.to(acc),
            norm_bias=self.bias.to(acc),
            mean=None if self.training else self.running_mean.to(acc),
            var=None if self.training else self.running_var.to(acc),
            activation=activation,
            eps=self.eps,
        )
        if self.training:
            with torch.no_grad():
                num_tokens = outputs.shape[0]
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                unbiased = (var * (num_tokens / (num_tokens - 1))).to(self.running_var.dtype)
                self.running_var.lerp_(unbiased, self.momentum)
        return y

    def _start(self, outputs: Tensor) -> None:
        """Checks the shape, and counts a training batch."""
        if outputs.shape[1:] != (self.num_experts, self.size):
            raise ValueError(
                f"ExpertBatchNorm: outputs must be [T, {self.num_experts}, {self.size}], got shape "
                f"{list(outputs.shape)}."
            )
        if not self.training:
            return
        if outputs.shape[0] < 2:
            raise ValueError(
                "ExpertBatchNorm: outputs must have at least 2 tokens in training, got "
                f"{outputs.shape[0]}."
            )
        self.num_batches_tracked.add_(1)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, size={self.size}"
