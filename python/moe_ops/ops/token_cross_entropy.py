"""token_cross_entropy: the cross-entropy of each token and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.ops._register import (
    accumulate_dtype,
    call,
    check_dim,
    check_float,
    check_index,
    check_same_device,
    check_size,
    register_autocast_keep,
    register_cpu_only,
    register_fake,
    register_no_gradient,
)
from moe_ops.reference.token_cross_entropy import token_cross_entropy as _formula

_OP = "token_cross_entropy"


def token_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What a loss that computes its gradient in the forward pass needs of logits.

    ``losses[t] = log sum_v exp(logits[t, v]) - logits[t, targets[t]]`` and ``grad[t] =
    softmax(logits[t])`` minus one at the target, the gradient of losses[t]; one pass over memory.
    On CUDA tensors, and in code that is being compiled, it is this formula in torch's operations.

    Args:
        logits: [T, V]; float64, float32, bfloat16 or float16, any strides.
        targets: [T], int32 or int64, in [0, V); -100: the token counts for nothing, its loss and
            its gradient are zero.

    Returns:
        losses: [T] float32 (float64 for float64).
        grad: [T, V] in logits' dtype, computed in fp32 (fp64 for fp64).

    Raises:
        ValueError: wrong dtype, rank or size, a target out of range (on the CPU).
        NotImplementedError: where a gradient is wanted: `grad` is that.
    """
    if logits.is_cuda or torch.compiler.is_compiling():
        _check(logits, targets)
        return _formula(logits, targets)
    losses, grad = call(torch.ops.moe_ops.token_cross_entropy, logits, targets)
    return losses, grad


def _check(logits: Tensor, targets: Tensor) -> None:
    check_float(_OP, "logits", logits)
    check_dim(_OP, "logits", logits, 2, "[T, V]")
    check_index(_OP, "targets", targets)
    check_dim(_OP, "targets", targets, 1, "[T]")
    check_size(_OP, "targets", targets, 0, logits.shape[0], "T")
    check_same_device(_OP, logits=logits, targets=targets)


@register_fake(_OP)
def _(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    _check(logits, targets)
    losses = logits.new_empty((logits.shape[0],), dtype=accumulate_dtype(logits.dtype))
    return losses, logits.new_empty(tuple(logits.shape))


register_no_gradient(_OP, "on logits.detach()")
register_autocast_keep(_OP)
register_cpu_only(_OP, "call moe_ops.token_cross_entropy, which is torch's operations there")
