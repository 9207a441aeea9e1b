"""Token embedding whose gradient uses torch's kernel in compiled code."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenEmbedding(nn.Embedding):
    """nn.Embedding, [...] int64 in [0, V) to [..., H].

    In code compiled for a CPU its gradient is the kernel of eager code, because the compiler's own
    kernel adds elements one by one, with atomic operations if there are several threads.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and self.weight.is_cpu and torch.is_grad_enabled():
            return _Embedding.apply(self.weight, input)
        return super().forward(input)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = weight.shape[0]
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        return _gradient(grad, tokens, ctx.rows), None


@torch.library.custom_op("moe_ops_zoo::embedding_gradient", mutates_args=())
def _gradient(grad: Tensor, tokens: Tensor, rows: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(grad.contiguous(), tokens, rows, -1, False)


@_gradient.register_fake
def _(grad: Tensor, tokens: Tensor, rows: int) -> Tensor:
    return grad.new_empty((rows, grad.shape[-1]))
