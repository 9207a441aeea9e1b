"""Composition of Experts: whole language models behind a router that classifies prompts.

Example:
    composition = zoo.create_model("composition")
    composition.route(embeddings).models             # which model answers each prompt

Jain et al. 2024, Composition of Experts: A Modular Compound AI System Leveraging Large Language
Models, arXiv 2412.01868.

Letters: B prompts, D size of an embedding, C categories, M models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._presets import preset

__all__ = ["CategoryRouter", "Composition", "CompositionConfig"]


@dataclass(frozen=True)
class CompositionConfig:
    """Categories, models and sizes.

    Attributes:
        categories: names of the C categories.
        models: names of the M models. sizes: their parameters.
        generalist: the model for prompts with an uncertain category.
        embedding_size: D. hidden_size: of the classifier; 0: it is linear.
        budget: maximum total parameters of the kept models; 0: no bound.
        threshold: confidence below which the generalist answers, in [0, 1] or above: 0 is never.
    """

    categories: tuple[str, ...]
    models: tuple[str, ...]
    sizes: tuple[int, ...]
    generalist: str
    embedding_size: int
    hidden_size: int = 0
    budget: int = 0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.models) or not self.models:
            raise ValueError(
                f"CompositionConfig: sizes must be {len(self.models)} like models, got "
                f"{len(self.sizes)}."
            )
        if self.generalist not in self.models:
            raise ValueError(
                f"CompositionConfig: generalist must be one of {', '.join(self.models)}, got "
                f"{self.generalist!r}."
            )
        if not self.categories:
            raise ValueError("CompositionConfig: categories must be one or more, got none.")

    tiny = preset(
        "Three specialists of bytes and a generalist.",
        categories=("reference", "code", "maths"),
        models=("reference", "code", "maths", "general"),
        sizes=(4, 4, 4, 4),
        generalist="general",
        embedding_size=128,
    )
    open_models = preset(
        "Models that the paper composes, with embeddings of a model of 7 billion parameters. The "
        "categories are ours.",
        categories=("general", "code", "maths", "medicine", "finance", "law", "other languages"),
        models=("Qwen2-7B", "gemma-2-9b", "gemma-2-27b", "Llama-3.1-70B", "Qwen2-72B"),
        sizes=(7_600_000_000, 9_200_000_000, 27_200_000_000, 70_600_000_000, 72_700_000_000),
        generalist="gemma-2-27b",
        embedding_size=4096,
    )


class CategoryRouter(nn.Module):
    """Classifier of embeddings [B, D] with logits [B, C].

    Embeddings are standardized with `mean` and `scale` [D], buffers that the caller fills. With
    `hidden_size` 0 the classifier is linear, otherwise it has one hidden layer.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, embedding_size: int, num_categories: int, hidden_size: int = 0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(embedding_size))
        self.register_buffer("scale", torch.ones(embedding_size))
        if hidden_size:
            self.classifier: nn.Module = nn.Sequential(
                nn.Linear(embedding_size, hidden_size),
                nn.GELU(),
                nn.Linear(hidden_size, num_categories),
            )
        else:
            self.classifier = nn.Linear(embedding_size, num_categories)

    def forward(self, embeddings: Tensor) -> Tensor:
        logits: Tensor = self.classifier((embeddings - self.mean) / self.scale)
        return logits


class Routed(NamedTuple):
    """Routing of prompts. models [B]: selected model. categories [B]: the most likely category.
    confidence [B]: its probability."""

    models: Tensor
    categories: Tensor
    confidence: Tensor


class Composition(nn.Module):
    """Two-stage router: `router` predicts a prompt's category, and `model_of` maps it to a model.

    Buffers to be filled: model_of [C] int64, initially the generalist's index, and threshold, a
    scalar. bench/studies/composition has the paper's assignment under a budget.
    """

    model_of: Tensor
    threshold: Tensor

    def __init__(self, config: CompositionConfig) -> None:
        super().__init__()
        self.config = config
        count = len(config.categories)
        self.router = CategoryRouter(config.embedding_size, count, config.hidden_size)
        self.register_buffer("model_of", torch.full((count,), self.generalist))
        self.register_buffer("threshold", torch.tensor(config.threshold, dtype=torch.float64))

    @property
    def generalist(self) -> int:
        """Returns the index of the generalist."""
        return self.config.models.index(self.config.generalist)

    @torch.no_grad()
    def route(self, embeddings: Tensor) -> Routed:
        """Routes prompts with embeddings [B, D]."""
        confidence, categories = self.router(embeddings).softmax(-1).max(-1)
        models = self.model_of[categories]
        unsure = confidence.double() < self.threshold
        return Routed(models.masked_fill(unsure, self.generalist), categories, confidence)

    forward = route
