"""Calls of inference-only experts while gradients are enabled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class WithoutBackward(torch.autograd.Function):
    """Autograd function that runs inference-only experts with gradients enabled.

    apply(x, topk_weights, topk_ids, experts, on_input) calls `experts._run` with the other
    arguments. Backward raises NotImplementedError with the message `experts.no_gradient`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: Any, on_input: bool
    ) -> Tensor:
        ctx.sentence = experts.no_gradient
        y: Tensor = experts._run(x, topk_weights, topk_ids, on_input)
        return y

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(ctx.sentence)
