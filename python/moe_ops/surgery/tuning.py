"""Short training after experts were removed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def tune(
    model: nn.Module,
    batches: Iterable[Any],
    steps: int,
    *,
    rate: float = 1e-4,
    weight_decay: float = 0.0,
    max_norm: float = 1.0,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Trains a model for a few steps, in place, with AdamW, clipped gradients, and a learning rate
    that rises over the first tenth of the steps and then falls linearly to 0.

    Args:
        model: the model.
        batches: inputs of the loss, repeated as needed.
        steps: at least 1.
        rate, weight_decay, max_norm: maximum learning rate, weight decay, maximum gradient norm.
        loss: (model, batch) -> scalar. None: the next-token loss of a language model of the zoo
            (`model.loss(tokens)`, with its auxiliary losses) or of transformers (a tensor of tokens
            [B, S], or keyword arguments with `input_ids`).
        progress: called with the number of each step, from 1, and its loss.

    Returns:
        The loss of each step.

    Raises:
        ValueError: no batch, or no step.
        FloatingPointError: a loss that is not finite; weights are those before that step.
    """
    examples = list(batches)
    if steps < 1 or not examples:
        raise ValueError(f"tune: there must be steps and batches, got {steps} and {len(examples)}.")
    of_batch = _next_token_loss if loss is None else loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay)
    warm_up = max(1, steps // 10)
    training = {module: module.training for module in model.modules()}
    losses = []
    model.train()
    try:
        for step, batch in zip(range(1, steps + 1), itertools.cycle(examples), strict=False):
            share = min(step / warm_up, (steps - step + 1) / max(1, steps - warm_up))
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, share)
            optimizer.zero_grad(set_to_none=True)
            value = of_batch(model, batch)
            if not bool(torch.isfinite(value)):
                raise FloatingPointError(
                    f"tune: the loss must be finite, got {float(value.detach())} at step {step}."
                )
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
            optimizer.step()
            losses.append(float(value.detach()))
            if progress is not None:
                progress(step, losses[-1])
    finally:
        for module, was in training.items():
            module.training = was
        model.zero_grad(set_to_none=True)
    return losses


def _next_token_loss(model: Any, batch: Any) -> Tensor:
    if callable(getattr(model, "loss", None)) and isinstance(batch, Tensor):
        value: Tensor = model.loss(batch).loss
        return value
    inputs = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    value = model(**{**inputs, "labels": inputs["input_ids"]}).loss
    return value
