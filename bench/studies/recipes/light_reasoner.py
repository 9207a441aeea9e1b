"""LightReasoner: a model is fine-tuned towards what it says more than an amateur does, on the
tokens where the two differ. The amateur may be the model itself with weaker routing.

    from moe_ops import surgery

    weak = lambda: surgery.override_routing(model, surgery.rank(2), renormalize=True)
    lesson = make_lesson(model, tokens, weak)
    lesson_loss(model, lesson).backward()

Letters: B sequences, S tokens of each, V vocabulary, n tokens that are learned from.

Source: Wang et al. 2025 (LightReasoner: Can Small Language Models Teach Large Language Models
Reasoning?, arXiv 2510.07962).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Weaker = Callable[[], AbstractContextManager[Any]]


def divergence(expert: Tensor, amateur: Tensor) -> Tensor:
    """KL(expert || amateur) in nats of logits [..., V], in fp32."""
    p, q = expert.float().log_softmax(-1), amateur.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def contrastive_target(expert: Tensor, amateur: Tensor, alpha: float = 0.2) -> Tensor:
    """[..., V]: softmax of log p_expert - log p_amateur over the tokens with p_expert >= alpha max
    p_expert, 0 elsewhere; of logits."""
    if not 0 < alpha <= 1:
        raise ValueError(f"contrastive_target: alpha must be in (0, 1], got {alpha}.")
    p, q = expert.float().log_softmax(-1), amateur.float().log_softmax(-1)
    likely = p >= p.amax(-1, keepdim=True) + math.log(alpha)
    return (p - q).masked_fill(~likely, -torch.inf).softmax(-1)


class Lesson(NamedTuple):
    """tokens [B, S]; mask [B, S] bool, True where the next token is learned; targets [n, V], one
    row a True of the mask, in its order; divergence [B, S] of the two models."""

    tokens: Tensor
    mask: Tensor
    targets: Tensor
    divergence: Tensor


@torch.no_grad()
def make_lesson(
    model: nn.Module,
    tokens: Tensor,
    amateur: Weaker | nn.Module,
    *,
    alpha: float = 0.2,
    beta: float = 0.4,
    counted: Tensor | None = None,
) -> Lesson:
    """Returns what a model can learn from its difference to an amateur.

    Args:
        model: of the zoo or of transformers, tokens [B, S] -> logits [B, S, V]; runs in `eval()`.
        tokens: [B, S]; in the paper prompts with what the model goes on to say.
        amateur: another model of the same vocabulary, or a function that returns a context in which
            the model itself is weaker.
        alpha: of `contrastive_target`. beta: tokens are learned where the divergence is larger.
        counted: [B, S] bool, False where nothing is learned (prompts, padding).
    """
    was_training = model.training
    model.eval()
    try:
        strong = _logits(model, tokens)
        if isinstance(amateur, nn.Module):
            weak = _logits(amateur, tokens)
        else:
            with amateur():
                weak = _logits(model, tokens)
    finally:
        model.train(was_training)
    away = divergence(strong, weak)
    mask = away > beta
    if counted is not None:
        mask &= counted
    targets = contrastive_target(strong[mask], weak[mask], alpha)
    return Lesson(tokens, mask, targets, away)


def lesson_loss(model: nn.Module, lesson: Lesson) -> Tensor:
    """Mean over the chosen tokens of KL(target || model); 0 where there are none."""
    said = _logits(model, lesson.tokens)[lesson.mask].float().log_softmax(-1)
    target = lesson.targets
    lost = (torch.special.xlogy(target, target) - target * said).sum()
    return lost / max(1, len(target))


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    output: Any = model(tokens)
    return output if isinstance(output, Tensor) else output.logits
