"""ExpertFlow's token scheduler, which batches sequences that use similar experts.

Letters: B sequences, S tokens per sequence, L calls of experts per step, E experts.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .predictor import ExpertPredictor


def num_active(routes: Tensor) -> int:
    """Returns the number of experts that a batch uses, summed over calls, for routes [B, L, E]
    bool."""
    return int(routes.any(0).sum())


def split_batch_by_experts(
    routes: Tensor, *, rounds: int = 10, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Splits sequences into two halves that use few experts each.

    It runs balanced 2-means on the rows of `routes`, then exchanges pairs of sequences as long as
    this lowers the total number of experts that both halves use.

    Args:
        routes: [B, L, E] bool, the experts that each sequence uses or is predicted to use.
        rounds: maximum number of 2-means iterations, and of exchange passes.
        generator: for the first center; None takes the first sequence.

    Returns:
        Indices of both halves, in order, (B + 1) // 2 and B // 2 of them.

    Raises:
        ValueError: fewer than two sequences, or routes of another shape.

    Source: He et al. 2024 (ExpertFlow, arXiv 2410.17954), section on the token scheduler.
    """
    if routes.dim() != 3 or routes.dtype != torch.bool or len(routes) < 2:
        raise ValueError(
            f"split_batch_by_experts: routes must be bool [B, L, E] of two sequences at least, got "
            f"{str(routes.dtype).removeprefix('torch.')} of shape {list(routes.shape)}."
        )
    rows = routes.flatten(1).float()
    num = len(rows)
    half = (num + 1) // 2
    first = 0 if generator is None else int(torch.randint(num, (1,), generator=generator))
    centers = torch.stack((rows[first], rows[(rows - rows[first]).abs().sum(1).argmax()]))
    order = torch.arange(num, device=rows.device)
    for _ in range(rounds):
        # Distance difference to both centers: the closest half goes to the first.
        distance = (rows[:, None] - centers[None]).abs().sum(-1)
        new = (distance[:, 0] - distance[:, 1]).argsort(stable=True)
        if torch.equal(new, order):
            break
        order = new
        centers = torch.stack((rows[order[:half]].mean(0), rows[order[half:]].mean(0)))
    left, right = order[:half].tolist(), order[half:].tolist()
    _exchange(routes.flatten(1), left, right, rounds)
    return torch.tensor(sorted(left)), torch.tensor(sorted(right))


def _exchange(rows: Tensor, left: list[int], right: list[int], rounds: int) -> None:
    """Swaps pairs in place while that lowers the number of experts in use."""
    counts = [rows[half].sum(0) for half in (left, right)]
    for _ in range(rounds):
        swapped = False
        for i in range(len(left)):
            for j in range(len(right)):
                moved = rows[right[j]].long() - rows[left[i]].long()
                new = [counts[0] + moved, counts[1] - moved]
                if _in_use(new) < _in_use(counts):
                    left[i], right[j] = right[j], left[i]
                    counts = new
                    swapped = True
        if not swapped:
            return


def _in_use(counts: list[Tensor]) -> int:
    return sum(int((c > 0).sum()) for c in counts)


def generate_in_halves(
    model: Any, tokens: Tensor, num_tokens: int, predictor: ExpertPredictor, **options: Any
) -> Tensor:
    """Generates from a batch split into two by predicted experts, one after the other.

    Args:
        model: a zoo `CausalLM`, or a model of transformers.
        tokens: [B, S] prompts of one length.
        num_tokens: number of new tokens, see `CausalLM.generate`; `max_new_tokens` of transformers.
        predictor: of the model's routes; experts with a probability over one half count as used.
        options: of the model's `generate`, used for both halves: none with a row per sequence.
            Sampling uses the generator in another order than a single call with all prompts.

    Returns:
        [B, S + n], rows in the order of `tokens`; a half that ended earlier is padded with the last
        token of each of its rows.
    """
    routes = (predictor.chances(tokens) > 0.5).any(1)
    halves = split_batch_by_experts(routes.cpu())
    ours = "num_tokens" in inspect.signature(model.generate).parameters
    options["num_tokens" if ours else "max_new_tokens"] = num_tokens
    results = [model.generate(tokens[half.to(tokens.device)], **options) for half in halves]
    length = max(result.shape[1] for result in results)
    out = tokens.new_empty(len(tokens), length)
    for half, result in zip(halves, results, strict=True):
        tail = result[:, -1:].expand(-1, length - result.shape[1])
        out[half.to(tokens.device)] = torch.cat((result, tail), 1)
    return out
