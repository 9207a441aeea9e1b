"""Experts for inference alone, called while gradients are enabled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class WithoutBackward(torch.autograd.Function):
    """Lets a forward with gradients enabled run, as inference code often leaves them.

    apply(x, topk_weights, topk_ids, experts, on_input): `experts._run` of the others. A backward
    raises NotImplementedError with the sentence `experts.no_gradient`.
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
