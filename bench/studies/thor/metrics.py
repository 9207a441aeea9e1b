"""Measures of how good translations are, and of how much experts disagree. Letters: B sentences, D
draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import stdev

import torch
from torch import Tensor

from moe_ops.zoo.thor.model import PAD, Thor

_ORDERS = range(1, 7)


def chrf(found: Sequence[str], wanted: Sequence[str]) -> float:
    """chrF2 of a corpus, 0 to 100: the F-score, recall counting twice, of precision and recall of
    character n-grams without blanks, each averaged over n = 1 to 6. Orders of which one side has
    none are left out.

    Source: Popovic 2015 (chrF, WMT). Equals sacrebleu's corpus score with its defaults.
    """
    if len(found) != len(wanted):
        raise ValueError(f"chrf: found must have {len(wanted)} texts, got {len(found)}.")
    shares = []
    for n in _ORDERS:
        both = [(_grams(a, n), _grams(b, n)) for a, b in zip(found, wanted, strict=True)]
        hits = sum(sum((a & b).values()) for a, b in both)
        ours, theirs = (sum(sum(pair[i].values()) for pair in both) for i in (0, 1))
        if ours and theirs:
            shares.append((hits / ours, hits / theirs))
    if not shares:
        return 0.0
    precision, recall = (sum(part) / len(shares) for part in zip(*shares, strict=True))
    total = 4 * precision + recall
    return 100 * 5 * precision * recall / total if total else 0.0


def _grams(text: str, n: int) -> Counter[str]:
    joined = "".join(text.split())
    return Counter(joined[i : i + n] for i in range(len(joined) - n + 1))


@torch.no_grad()
def mean_loss(
    model: Thor,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    level: str | None = None,
    generator: torch.Generator | None = None,
) -> float:
    """Nats a target token, without smoothing and dropout.

    Args:
        batches: of target and source.
        level: None: the mean of all experts; else they are drawn, see `Thor.draw_experts`.
    """
    before = model.training
    model.eval()
    total, tokens = 0.0, 0
    for target, source in batches:
        experts = None if level is None else _draw(model, target, source, level, generator)
        count = int((target != PAD).sum())
        total += float(model.loss(target, source, experts=experts, passes=1).cross_entropy) * count
        tokens += count
    model.train(before)
    return total / tokens


def _draw(
    model: Thor, target: Tensor, source: Tensor, level: str, generator: torch.Generator | None
) -> tuple[Tensor | None, Tensor]:
    batch, both = len(target), target.shape[1] + source.shape[1]
    encoder = None
    if len(model.encoder_layers):
        encoder = model.draw_experts(level, "encoder", batch, source.shape[1], generator)
        both = target.shape[1]
    return encoder, model.draw_experts(level, "decoder", batch, both, generator)


def spread(
    model: Thor, batches: Sequence[tuple[Tensor, Tensor]], *, draws: int = 8, seed: int = 0
) -> dict[str, float]:
    """Measures how much depends on which experts are drawn, one per layer for all sentences.

    Returns:
        "deviation" of the mean loss over the draws, in nats a token, and the mean "drawn loss".
    """
    generator = torch.Generator().manual_seed(seed)
    losses = [mean_loss(model, batches, level="batch", generator=generator) for _ in range(draws)]
    return {"deviation": stdev(losses), "drawn loss": sum(losses) / draws}


@torch.no_grad()
def disagreement(model: Thor, batches: Sequence[tuple[Tensor, Tensor]], *, seed: int = 0) -> float:
    """Symmetric KL divergence between two draws, one of each layer and sentence: nats a token."""
    generator = torch.Generator().manual_seed(seed)
    before = model.training
    model.eval()
    parts = []
    for target, source in batches:
        draws = [_draw(model, target, source, "sentence", generator) for _ in range(2)]
        encoder = [d[0] for d in draws if d[0] is not None]
        both = torch.cat(encoder, 1) if encoder else None, torch.cat([d[1] for d in draws], 1)
        parts.append(float(model.loss(target, source, experts=both, passes=2).consistency))
    model.train(before)
    return sum(parts) / len(parts)
