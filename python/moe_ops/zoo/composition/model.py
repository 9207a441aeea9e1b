"""The composition: router, map from categories to models, and generation with a pool.

Letters: B prompts, S tokens of each, D size of an embedding, C categories, M models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .assignment import Assignment, assign
from .router import CategoryRouter
from .serving import ExpertPool


@dataclass(frozen=True)
class CompositionConfig:
    """Categories, models and sizes.

    Attributes:
        categories: names of the C categories.
        models: names of the M models. sizes: their parameters.
        generalist: the model of prompts whose category is not sure.
        embedding_size: D. hidden_size: of the classifier; 0: it is linear.
        budget: parameters of all models that are kept; 0: no bound.
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

    PRESETS: ClassVar[tuple[str, ...]] = ("tiny", "open_models")

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

    @classmethod
    def tiny(cls) -> CompositionConfig:
        """Three specialists of bytes and a generalist, as the command trains them."""
        categories = ("reference", "code", "maths")
        return cls(
            categories, (*categories, "general"), (4, 4, 4, 4), "general", embedding_size=128
        )

    @classmethod
    def open_models(cls) -> CompositionConfig:
        """Models that the paper composes, with embeddings of a model of 7 billion parameters. The
        categories are ours."""
        return cls(
            ("general", "code", "maths", "medicine", "finance", "law", "other languages"),
            ("Qwen2-7B", "gemma-2-9b", "gemma-2-27b", "Llama-3.1-70B", "Qwen2-72B"),
            (7_600_000_000, 9_200_000_000, 27_200_000_000, 70_600_000_000, 72_700_000_000),
            "gemma-2-27b",
            embedding_size=4096,
        )


class Routed(NamedTuple):
    """models [B]: where prompts go. categories [B]: the likeliest. confidence [B]: of these."""

    models: Tensor
    categories: Tensor
    confidence: Tensor


class Composition(nn.Module):
    """Two steps: a prompt's category by `router`, then the category's model by `model_of`.

    Buffers: model_of [C] int64, the generalist's number until `assign` is called; threshold, a
    scalar.
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
        """Its number."""
        return self.config.models.index(self.config.generalist)

    def assign(self, scores: Tensor, counts: Tensor, **settings: Any) -> Assignment:
        """Maps categories to models under the config's budget; the generalist is always kept.

        Args:
            scores: [C, M], higher is better. counts: [C], prompts of each category.
            settings: `budget`, `mean_budget` and `required` of `assign`, instead of the config's.
        """
        settings.setdefault("budget", self.config.budget or None)
        settings.setdefault("required", (self.generalist,))
        found = assign(scores, counts, self.config.sizes, **settings)
        self.model_of.copy_(found.models)
        return found

    @torch.no_grad()
    def route(self, embeddings: Tensor) -> Routed:
        """Where prompts with embeddings [B, D] go."""
        confidence, categories = self.router(embeddings).softmax(-1).max(-1)
        models = self.model_of[categories]
        unsure = confidence.double() < self.threshold
        return Routed(models.masked_fill(unsure, self.generalist), categories, confidence)

    forward = route

    @torch.no_grad()
    def generate(
        self,
        prompts: Tensor,
        num_tokens: int,
        pool: ExpertPool,
        embed: Callable[[Tensor], Tensor],
        **settings: Any,
    ) -> Tensor:
        """Continues prompts [B, S] of one length, each with the model it goes to.

        Each model is asked for once, those that are there already first, so that a call loads no
        model twice.

        Args:
            pool: of models with `generate(tokens, num_tokens, **settings)`, by the config's names.
            embed: from prompts to embeddings [B, D].
            settings: of the models' `generate`.

        Returns:
            [B, S + num_tokens].
        """
        if prompts.dim() != 2:
            raise ValueError(
                f"Composition: prompts must be [B, S], got shape {list(prompts.shape)}."
            )
        if not len(prompts):
            return prompts.new_empty(0, prompts.shape[1] + num_tokens)
        goes_to = self.route(embed(prompts)).models.to(prompts.device)
        out = prompts.new_empty(len(prompts), prompts.shape[1] + num_tokens)
        for number in visiting_order(goes_to, self.config.models, pool.resident):
            rows = (goes_to == number).nonzero()[:, 0]
            model: Any = pool.get(self.config.models[number])
            out[rows] = model.generate(prompts[rows], num_tokens, **settings)
        return out


def visiting_order(models: Tensor, names: Sequence[str], resident: Sequence[str]) -> list[int]:
    """The models that are needed, each once: first those that are there, by number in each half."""
    return sorted(set(models.tolist()), key=lambda m: (names[m] not in resident, m))
