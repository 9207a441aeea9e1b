"""Cross-entropy of a language model's head, without the logits of all tokens in memory.

Letters: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Targets that do not count, as in F.cross_entropy.
IGNORED = -100
# Logits of a chunk. 2^17 in fp32 are 512 KiB of an L2; a GPU wants enough rows to fill it.
CHUNK_LOGITS = {"cpu": 1 << 17, "cuda": 1 << 25}
# The fewest tokens of a chunk. With fewer, reading the weight of a large vocabulary for each chunk
# would cost more than its products.
MIN_CHUNK = 256


def head_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, token_mask: Tensor | None = None
) -> Tensor:
    """The mean of F.cross_entropy of the logits ``x @ weight.T``, which are widened to fp32.

    In training, chunks of tokens go through product, softmax and both gradients one after the
    other, so that what is kept are the gradients of x and of weight. Code that is being compiled or
    runs under autocast is left to torch.

    Args:
        x: [T, H]; float64, float32, bfloat16 or float16.
        weight: [V, H] in x's dtype.
        targets: [T] int64 in [0, V); without a mask also -100, a token that does not count.
        token_mask: [T] bool, True where a token counts.

    Returns:
        A scalar in fp32 (fp64 for fp64). Without a mask the mean over no token is NaN, with one it
        is 0.
    """
    if (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled(x.device.type)
        or not (x.requires_grad or weight.requires_grad)
    ):
        return _formula(x, weight, targets, token_mask)
    counted = targets != IGNORED if token_mask is None else token_mask
    count = counted.sum()
    # Reading one element costs the CPU nothing; a GPU would be waited for.
    all_count = counted.is_cpu and int(count) == counted.numel()
    total = _SumOfChunks.apply(x, weight, targets, None if all_count else counted)
    return total / (count if token_mask is None else count.clamp(min=1))


def _formula(x: Tensor, weight: Tensor, targets: Tensor, token_mask: Tensor | None) -> Tensor:
    if token_mask is None:
        return F.cross_entropy(_logits(x, weight), targets)
    return _sum(x, weight, targets, token_mask) / token_mask.sum().clamp(min=1)


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    return logits if logits.dtype == torch.float64 else logits.float()


def _sum(x: Tensor, weight: Tensor, targets: Tensor, counted: Tensor | None) -> Tensor:
    losses = F.cross_entropy(_logits(x, weight), targets, reduction="none")
    return (losses if counted is None else losses.masked_fill(~counted, 0.0)).sum()


class _SumOfChunks(torch.autograd.Function):
    """Sum over counted tokens (None: all); its gradients are computed at once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, counted: Tensor | None
    ) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        most = CHUNK_LOGITS["cpu" if x.is_cpu else "cuda"] // max(len(weight), 1)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        # Sums over chunks are not rounded to a half type in between.
        grad_w = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=wide, device=x.device)
        if counted is not None:
            targets = targets.masked_fill(~counted, 0)
        for rows in _chunks(len(x), max(most, MIN_CHUNK)):
            part, at = x[rows], targets[rows, None]
            scores = torch.log_softmax((part @ weight.t()).to(wide), 1)
            losses = scores.gather(1, at)
            grad = scores.exp_().scatter_add_(1, at, losses.new_full((1, 1), -1.0).expand_as(at))
            grad = grad.to(x.dtype)
            if counted is not None:
                skipped = ~counted[rows, None]
                losses = losses.masked_fill(skipped, 0.0)
                part = part.masked_fill(skipped, 0.0)
            total -= losses.sum()
            if grad_x is not None:
                torch.mm(grad, weight, out=grad_x[rows])
                if counted is not None:
                    grad_x[rows].masked_fill_(skipped, 0.0)
            if grad_w is None:
                continue
            if grad_w.dtype == x.dtype:
                grad_w.addmm_(grad.t(), part)
            else:
                grad_w += grad.t() @ part
        grad_w = None if grad_w is None else grad_w.to(weight.dtype)
        ctx.save_for_backward(x, weight, targets, counted, grad_x, grad_w)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, targets, counted, grad_x, grad_w = ctx.saved_tensors
        if torch.is_grad_enabled():  # The gradient is to be differentiated.
            wanted = [t for t in (x, weight) if t.requires_grad]
            total = _sum(x, weight, targets, counted)
            grads = iter(torch.autograd.grad(total, wanted, grad, create_graph=True))
            return *(next(grads) if t.requires_grad else None for t in (x, weight)), None, None
        return (
            None if grad_x is None else grad_x * grad,
            None if grad_w is None else grad_w * grad,
            None,
            None,
        )


def _chunks(count: int, most: int) -> list[slice]:
    """Equal parts of [0, count), of at most `most`."""
    parts = -(-count // most)
    return [slice(count * i // parts, count * (i + 1) // parts) for i in range(parts)]
