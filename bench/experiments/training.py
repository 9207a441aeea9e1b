"""Training of one arm of an experiment, and what is measured of it afterwards."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_ops.layers import RoutingStats
from moe_ops.zoo.lm.model import CausalLM, LMLoss

from .text import Domain, heldout_batches, train_batches


@dataclass(frozen=True)
class Recipe:
    """AdamW with warm-up and a cosine to a tenth of the rate."""

    steps: int
    batch: int = 15
    length: int = 128
    rate: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    heldout_batches: int = 6

    def rate_at(self, step: int) -> float:
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))

    def __str__(self) -> str:
        return (
            f"{self.steps} steps of {self.batch} x {self.length} bytes, AdamW, rate {self.rate:g} "
            f"(warm-up {self.warmup}, cosine to a tenth), weight decay {self.weight_decay:g}, "
            f"gradient norm at most {self.clip:g}"
        )


@dataclass
class Trained:
    """A model after training.

    heldout: domain -> cross-entropy in nats a byte. curve: training cross-entropy a step. watched:
    what `train` was asked to watch, one number a step.
    routing: counts over the held-out text. z: mean over layers of the router z-loss there.
    """

    model: CausalLM
    heldout: dict[str, float]
    curve: list[float] = field(default_factory=list)
    watched: list[float] = field(default_factory=list)
    routing: RoutingStats = field(default_factory=RoutingStats)
    z: float = 0.0
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Mean over domains of the held-out cross-entropy."""
        return sum(self.heldout.values()) / len(self.heldout)

    @property
    def max_violation(self) -> float:
        """Mean over layers of MaxVio, over all domains together."""
        return mean_violation(self.routing)


def mean_violation(stats: RoutingStats) -> float:
    """MaxVio, the mean over layers."""
    found = [stats.max_violation(layer) for layer in stats.layers]
    return sum(found) / len(found)


def step_violation(out: LMLoss) -> float:
    """To watch: the mean over layers of the batch's MaxVio."""
    stats = RoutingStats()
    for r in out.routing:
        stats.update(r.routing.topk_ids, r.router.num_experts, layer=r.layer)
    return mean_violation(stats)


def train(
    make: Callable[[], CausalLM],
    domains: Sequence[Domain],
    recipe: Recipe,
    seed: int,
    *,
    coefficients: Mapping[str, float] | None = None,
    prepare: Callable[[Any, torch.optim.Optimizer], None] | None = None,
    watch: Callable[[LMLoss], float] | None = None,
) -> Trained:
    """Trains the model of `make`, built under the seed, on batches that the seed decides.

    `prepare` is called with model and optimiser before the first step, `watch` with what each step
    computes.
    """
    torch.manual_seed(seed)
    model = make()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95))
    if prepare is not None:
        prepare(model, optimizer)
    curve, watched, start = [], [], time.perf_counter()
    batches = train_batches(domains, recipe.steps, recipe.batch, recipe.length, seed)
    for step, tokens in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        out = model.loss(tokens, coefficients=coefficients)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        curve.append(out.cross_entropy.item())
        if watch is not None:
            watched.append(watch(out))
    trained = Trained(model, {}, curve, watched, seconds=time.perf_counter() - start)
    evaluate(trained, domains, recipe)
    return trained


@torch.no_grad()
def evaluate(trained: Trained, domains: Sequence[Domain], recipe: Recipe) -> None:
    """Fills in what is measured on the held-out text."""
    model = trained.model.eval()
    z, calls = 0.0, 0
    for domain in domains:
        batches = heldout_batches(domain, recipe.heldout_batches, recipe.batch, recipe.length)
        total = 0.0
        for tokens in batches:
            out = model.loss(tokens, coefficients={"router_z": 0.0})
            total += out.cross_entropy.item() / len(batches)
            z += out.aux_losses["router_z"].item() / len(out.routing)
            calls += 1
            for r in out.routing:
                trained.routing.update(r.routing.topk_ids, r.router.num_experts, layer=r.layer)
        trained.heldout[domain.name] = total
    trained.z = z / calls


def flops_a_token(model: CausalLM, length: int, attention_features: int) -> int:
    """Of a forward pass: two for each parameter that a token passes through (an embedding that is
    also the output's weight counts once, one that is not does not), and four for each feature of
    the attention's heads and each of the (length + 1) / 2 keys a query sees on average."""
    active = model.num_parameters()["active"]
    if model.lm_head is not None:
        active -= model.embed_tokens.weight.numel()
    return 2 * active + round(4 * attention_features * (length + 1) / 2)


def setting(domains: Sequence[Domain], recipe: Recipe, seeds: Sequence[int]) -> dict[str, str]:
    """What the reports of all systems say about how they were made. Called at the end of a run."""
    minutes = time.process_time() / 60
    return {
        "Data": f"bytes of {', '.join(d.name for d in domains)}, equal shares, the last tenth of "
        "each held out",
        "Training": str(recipe),
        "Seeds": ", ".join(map(str, seeds)),
        "Machine": f"{torch.get_num_threads()} thread(s), {minutes:.1f} minutes of CPU time, torch "
        f"{torch.__version__}, Python {platform.python_version()}",
    }
