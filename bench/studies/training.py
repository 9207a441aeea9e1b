"""Training of one arm of an experiment, and what is measured of it afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_ops.layers import ExpertLoadStats
from moe_ops.zoo.lm.model import CausalLM, LMLoss

from .study import Job, Run
from .text import Domain, heldout_batches, load_domains, train_batches
from .trainer import take_steps

# Points of a curve that is kept.
POINTS = 50


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
    what `train` was asked to watch, one number per step. of_domain: counts over the held-out text
    of each. z: mean over layers of the router z-loss there.
    """

    model: CausalLM
    heldout: dict[str, float]
    curve: list[float] = field(default_factory=list)
    watched: list[float] = field(default_factory=list)
    of_domain: dict[str, ExpertLoadStats] = field(default_factory=dict)
    z: float = 0.0

    @property
    def loss(self) -> float:
        """Mean over domains of the held-out cross-entropy."""
        return sum(self.heldout.values()) / len(self.heldout)

    @property
    def routing(self) -> ExpertLoadStats:
        """Counts over the held-out text of all domains together."""
        stats = ExpertLoadStats()
        for part in self.of_domain.values():
            stats.merge(part)
        return stats

    @property
    def max_violation(self) -> float:
        """Mean over layers of MaxVio, over all domains together."""
        return mean_violation(self.routing)


def mean_violation(stats: ExpertLoadStats) -> float:
    """MaxVio, the mean over layers; 0 without any."""
    found = [stats.max_violation(layer) for layer in stats.layers]
    return sum(found) / max(1, len(found))


def step_violation(out: LMLoss) -> float:
    """To watch: the mean over layers of the batch's MaxVio."""
    stats = ExpertLoadStats()
    for r in out.routing:
        stats.update(r.routing.topk_ids, r.router.num_experts, layer=r.layer)
    return mean_violation(stats)


class Controller(Protocol):
    """A controller that acts on a model after each step of training, with a state of its own."""

    def after(self, step: int, out: LMLoss) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class DrawnTraining:
    """The state of a training on rows that a generator draws: what a run saves and goes on from.

    Attributes:
        done: steps that are done. found: what was measured on the way; add to it in place.
    """

    def __init__(
        self,
        run: Run,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        draw: torch.Generator,
        found: dict[str, Any],
    ) -> None:
        self._model, self._optimizer, self._draw = model, optimizer, draw
        self.found, self.done = found, 0
        saved = run.load()
        if saved is not None:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            draw.set_state(saved["draw"])
            torch.set_rng_state(saved["noise"])
            self.found, self.done = saved["found"], saved["done"]

    def state(self) -> dict[str, Any]:
        return {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "draw": self._draw.get_state(),
            "noise": torch.get_rng_state(),
            "found": self.found,
            "done": self.done,
        }


def adamw(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Weight decay is of matrices alone."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95))


def train_drawn(
    model: torch.nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    recipe: Recipe,
    seed: int,
    run: Run,
) -> list[float]:
    """Trains a model on batches that `loss` draws; the losses by step.

    A run whose state was saved goes on from it, with the bits of one that was not cut.
    """
    draw, optimizer = torch.Generator().manual_seed(seed), adamw(model, recipe)
    training = DrawnTraining(run, model, optimizer, draw, {"curve": []})
    curve: list[float] = training.found["curve"]

    def after(step: int, parts: Mapping[str, Tensor]) -> None:
        curve.append(parts["loss"].item())
        training.done += 1
        run.step(training.done, recipe.steps, training.state)

    model.train()
    take_steps(
        optimizer,
        lambda step: {"loss": loss(draw)},
        range(training.done, recipe.steps),
        rate=recipe.rate_at,
        clip=(list(model.parameters()), recipe.clip),
        after=after,
    )
    model.eval()
    return curve


def train(
    make: Callable[[], CausalLM],
    domains: Sequence[Domain],
    recipe: Recipe,
    seed: int,
    *,
    coefficients: Mapping[str, float] | None = None,
    prepare: Callable[[Any, torch.optim.Optimizer], Controller | None] | None = None,
    watch: Callable[[LMLoss], float] | None = None,
    run: Run | None = None,
) -> Trained:
    """Trains the model of `make`, built under the seed, on batches that the seed decides.

    `prepare` is called with model and optimizer before the first step, and may return what acts
    after each; `watch` is called with what each step computes. A `run` whose state was saved goes
    on from it, with the bits of one that was not cut.
    """
    run = run or Run()
    torch.manual_seed(seed)
    model = make()
    optimizer = adamw(model, recipe)
    controller = prepare(model, optimizer) if prepare is not None else None
    curve: list[float] = []
    watched: list[float] = []

    def state() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "controller": controller.state_dict() if controller else {},
            "noise": torch.get_rng_state(),
            "curve": curve,
            "watched": watched,
        }

    saved = run.load()
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if controller is not None:
            controller.load_state_dict(saved["controller"])
        torch.set_rng_state(saved["noise"])
        curve, watched = saved["curve"], saved["watched"]
    batches = train_batches(domains, recipe.steps, recipe.batch, recipe.length, seed)
    left = islice(batches, len(curve), None)
    out: LMLoss

    def loss(step: int) -> dict[str, Tensor]:
        nonlocal out
        out = model.loss(next(left), coefficients=coefficients)
        return {"loss": out.loss}

    def after(step: int, parts: Mapping[str, Tensor]) -> None:
        curve.append(out.cross_entropy.item())
        if watch is not None:
            watched.append(watch(out))
        if controller is not None:
            controller.after(step, out)
        run.step(step + 1, recipe.steps, state)

    take_steps(
        optimizer,
        loss,
        range(len(curve), recipe.steps),
        rate=recipe.rate_at,
        clip=(list(model.parameters()), recipe.clip),
        after=after,
    )
    trained = Trained(model, {}, curve, watched)
    evaluate(trained, domains, recipe)
    return trained


def job(
    arm: str,
    make: Callable[[], CausalLM],
    recipe: Recipe,
    *,
    domains: Callable[[], Sequence[Domain]] = load_domains,
    measure: Callable[[Trained, Sequence[Domain], Recipe], Mapping[str, Any]] = lambda *_: {},
    columns: Sequence[str] = ("loss", "MaxVio"),
    **options: Any,
) -> Job:
    """A run of a study: `train` with these options, and what is kept of it.

    `measure` adds to the result; what it gives under "row" adds to the arm's row. `columns` are
    those of "loss", "MaxVio" and "z" that the arm has; a row has all three.
    """

    def perform(seed: int, run: Run) -> dict[str, Any]:
        there = domains()
        trained = train(make, there, recipe, seed, run=run, **options)
        all_of_them = {"loss": trained.loss, "MaxVio": trained.max_violation, "z": trained.z}
        row = {name: value if name in columns else None for name, value in all_of_them.items()}
        measured = dict(measure(trained, there, recipe))
        row.update(measured.pop("row", {}))
        kept = {"curve": thinned(trained.curve), "watched": thinned(trained.watched)}
        return {"rows": {arm: row}, "heldout": trained.heldout, **kept, **measured}

    return perform


def thinned(values: Sequence[float], points: int = POINTS) -> list[float]:
    """Means of about `points` equal blocks; a rest shorter than a block goes."""
    every = max(1, len(values) // points)
    count = len(values) // every
    return [sum(values[i * every : (i + 1) * every]) / every for i in range(count)]


@torch.no_grad()
def evaluate(trained: Trained, domains: Sequence[Domain], recipe: Recipe) -> None:
    """Fills in what is measured on the held-out text."""
    model = trained.model.eval()
    z, calls = 0.0, 0
    for domain in domains:
        batches = heldout_batches(domain, recipe.heldout_batches, recipe.batch, recipe.length)
        total = 0.0
        stats = trained.of_domain[domain.name] = ExpertLoadStats()
        for tokens in batches:
            out = model.loss(tokens, coefficients={"router_z": 0.0})
            total += out.cross_entropy.item() / len(batches)
            # A dense model has no router.
            z += out.aux_losses["router_z"].item() / max(1, len(out.routing))
            calls += 1
            for r in out.routing:
                stats.update(r.routing.topk_ids, r.router.num_experts, layer=r.layer)
        trained.heldout[domain.name] = total
    trained.z = z / calls


def mutual_information(counts: Tensor) -> float:
    """Returns the mutual information of the row and the column of a table of counts, in nats."""
    joint = counts / counts.sum()
    independent = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
    total = torch.xlogy(joint, joint) - torch.xlogy(joint, independent)
    return total.sum().item()


@torch.no_grad()
def mixture_violation(
    model: CausalLM, domains: Sequence[Domain], recipe: Recipe, batches: int, seed: int
) -> float:
    """MaxVio, the mean over layers, of that many batches of training text together."""
    model.eval()
    stats = ExpertLoadStats()
    fresh: Iterable[Tensor] = train_batches(domains, batches, recipe.batch, recipe.length, seed)
    for tokens in fresh:
        for r in model(tokens[:, :-1], return_routing=True).routing:
            stats.update(r.routing.topk_ids, r.router.num_experts, layer=r.layer)
    return mean_violation(stats)


def flops_a_token(model: CausalLM, length: int, attention_features: int) -> int:
    """Returns the operations a token of a forward pass: two for each parameter that a token passes
    through (an embedding that is also the output's weight counts once, one that is not does not),
    and four for each feature of the attention's heads and each of the (length + 1) / 2 keys a query
    sees on average."""
    active = model.num_parameters()["active"]
    if model.lm_head is not None:
        active -= model.embed_tokens.weight.numel()
    return 2 * active + round(4 * attention_features * (length + 1) / 2)


def setting(domains: Sequence[str], recipe: Recipe) -> dict[str, str]:
    """Returns what the studies of all language models say about how they are made."""
    return {
        "Data": f"bytes of {', '.join(domains)}, equal shares, the last tenth of each held out",
        "Training": f"{recipe}: {recipe.steps * recipe.batch * recipe.length / 1e6:.2g} MB",
    }
