"""Shared parts of the experiments on trained models: a subject model, its text, its loss."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ops import surgery
from moe_ops.zoo.deepseek import DeepSeek

from . import subject
from .study import Run
from .text import Domain, heldout_batches

# Sequences of training text that a profile of a domain is made of, and of held-out text.
PROFILED = 24
JUDGED = 48
BATCH = 8


@dataclass(frozen=True)
class Loaded:
    """A subject model and its domains, by name, in their order."""

    model: DeepSeek
    domains: dict[str, Domain]
    length: int

    def profiled(self, domain: str, seed: int, count: int = PROFILED) -> list[Tensor]:
        """Batches [BATCH, length + 1] from random places of the training text."""
        generator = torch.Generator().manual_seed(seed)
        rows = [self.domains[domain].drawn(self.length, generator) for _ in range(count)]
        return list(torch.stack(rows).split(BATCH))

    def judged(self, domain: str) -> list[Tensor]:
        """Held-out batches, always the same."""
        return heldout_batches(self.domains[domain], JUDGED // BATCH, BATCH, self.length)

    def losses(self) -> dict[str, float]:
        """Domain -> held-out nats a byte of the model as it is now."""
        return {
            name: surgery.super_experts.mean_loss(self.model, self.judged(name))
            for name in self.domains
        }


def load(name: str, seed: int, run: Run) -> Loaded:
    """Trains the model where it is not there yet; raises Paused when the time is over."""
    minutes = (run.deadline - time.monotonic()) / 60
    model = subject.load(name, seed, minutes=minutes, tell=lambda line: None)
    made = subject.SUBJECTS[name]
    domains = {domain.name: domain for domain in subject.domains_of(made)}
    return Loaded(model, domains, made.recipe.length)


@contextmanager
def among(model: DeepSeek, keep: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Only these experts, as if the model were pruned."""
    with surgery.override_routing(model, surgery.rules.only(keep)):
        yield


def described(name: str) -> dict[str, str]:
    """The setting of a study on a subject model."""
    made = subject.SUBJECTS[name]
    config = made.config
    return {
        "Model": (
            f"`bench.studies.subject` {name}: H {config.hidden_size}, {config.num_layers} "
            f"layers, {config.num_experts} experts of {config.intermediate_size}, "
            f"{config.top_k} a token, {config.num_shared_experts} shared; a model a seed"
        ),
        "Data": f"bytes of {', '.join(made.domains)}, equal shares",
        "Training": str(made.recipe),
    }
