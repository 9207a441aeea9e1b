"""A composition of small byte models, from training to evaluation.

Specialists are trained on one domain each and a generalist on all. A domain without a category
represents prompts unknown to the router. A prompt's score with a model is minus the loss of the
bytes that follow, which makes a table for all prompts and models cheap.

Letters: N prompts, M models, C categories.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops import _files
from moe_ops.zoo.composition import CategoryRouter, Composition, CompositionConfig
from moe_ops.zoo.deepseek import DeepSeek, DeepSeekConfig
from moe_ops.zoo.lm.model import CausalLM

from .. import python_texts
from ..language import fit_once
from ..progress import bar
from ..settings import settings_folder
from ..trainer import Group, train_steps, write_state
from .assignment import assign_models
from .labels import propagate_labels
from .serving import ExpertPool

GENERALIST = "general"


@dataclass(frozen=True)
class Settings:
    """Settings of `train`.

    Attributes:
        domains: names of texts; the last `num_strange` of them have no category.
        hidden_size, num_layers: of every model.
        steps, batch_size, length, rate: of the training of every model; the generalist, which has
            all domains to learn, takes `general_steps`.
        prompts, prompt_length: prompts per domain for training, for validation and for the test,
            and bytes of each; models are scored on an equally long continuation.
        labeled: prompts per category with given labels; other labels are propagated.
        router_steps: of the classifiers.
        budget: maximum number of kept models, including the generalist; 0: all.
        unsure: fraction of the categories' validation prompts sent to the generalist, those with
            the lowest confidence. Strange prompts do not affect the threshold.
    """

    domains: tuple[str, ...] = python_texts.DOMAINS
    num_strange: int = 1
    hidden_size: int = 64
    num_layers: int = 2
    steps: int = 300
    general_steps: int = 300
    batch_size: int = 8
    length: int = 128
    rate: float = 3e-3
    prompts: int = 200
    prompt_length: int = 64
    labeled: int = 20
    router_steps: int = 300
    budget: int = 0
    unsure: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.num_strange < len(self.domains):
            raise ValueError(
                f"Settings: num_strange must be in [0, {len(self.domains)}), got "
                f"{self.num_strange}."
            )

    @property
    def categories(self) -> tuple[str, ...]:
        return self.domains[: len(self.domains) - self.num_strange]

    @property
    def models(self) -> tuple[str, ...]:
        return (*self.categories, GENERALIST)


def dense_model(settings: Settings) -> DeepSeek:
    """Returns a language model of bytes without experts."""
    hidden = settings.hidden_size
    return DeepSeek(
        DeepSeekConfig(
            vocab_size=256,
            hidden_size=hidden,
            num_layers=settings.num_layers,
            num_dense_layers=settings.num_layers,
            dense_intermediate_size=4 * hidden,
            num_heads=max(hidden // 32, 1),
            head_size=min(hidden, 32),
            latent=False,
            rope_interleaved=False,
            num_shared_experts=0,
        )
    )


def train_models(
    settings: Settings,
    texts: Mapping[str, python_texts.Text],
    folder: Path | str,
    *,
    progress: bool = True,
) -> None:
    """Trains the specialists and the generalist, each in a folder of its name in `folder`.

    Finished models are not trained again; interrupted ones continue from their checkpoints.
    """
    for number, name in enumerate(settings.models):
        torch.manual_seed(settings.seed * 1000 + number)
        fit_once(
            Path(folder),
            name,
            dense_model(settings),
            list(texts.values()) if name == GENERALIST else [texts[name]],
            steps=settings.general_steps if name == GENERALIST else settings.steps,
            batch_size=settings.batch_size,
            length=settings.length,
            rate=settings.rate,
            seed=settings.seed * 1000 + number,
            progress=progress,
        )


@dataclass(frozen=True)
class Prompts:
    """Prompts with continuations. tokens [N, 2S]: prompts [N, S] and continuations. domains [N]:
    indices in the settings."""

    tokens: Tensor
    domains: Tensor

    @property
    def prompt(self) -> Tensor:
        return self.tokens[:, : self.tokens.shape[1] // 2]

    def take(self, rows: Tensor) -> Prompts:
        return Prompts(self.tokens[rows], self.domains[rows])


def make_prompts(
    settings: Settings, texts: Mapping[str, python_texts.Text], split: str, domains: Sequence[str]
) -> Prompts:
    """Returns equally many prompts per domain: "train" from the training text, "valid" and "test"
    from alternating halves of the held-out text."""
    count, length = settings.prompts, 2 * settings.prompt_length
    generator = torch.Generator().manual_seed(settings.seed + 77)
    parts = []
    for name in domains:
        if split == "train":
            parts.append(texts[name].draw(count, length, generator))
        else:
            both = texts[name].spread(2 * count, length)
            parts.append(both[(0 if split == "valid" else 1) :: 2])
    numbers = torch.tensor([settings.domains.index(name) for name in domains])
    return Prompts(torch.cat(parts), numbers.repeat_interleave(count))


@torch.no_grad()
def losses_of(model: CausalLM, prompts: Prompts) -> Tensor:
    """Returns [N]: mean loss, in nats per byte, of each prompt's continuation."""
    length = prompts.tokens.shape[1] // 2
    parts = []
    for tokens in prompts.tokens.split(64):
        logits = model(tokens[:, :-1], last=length)
        parts.append(F.cross_entropy(logits.transpose(1, 2), tokens[:, length:], reduction="none"))
    return torch.cat(parts).mean(-1)


@torch.no_grad()
def embed_bytes(model: CausalLM, tokens: Tensor) -> Tensor:
    """Returns [N, 2D]: mean and deviation of the head's input over each prompt [N, S]."""
    parts = []
    for rows in tokens.split(256):
        hidden = model(rows, head=False)
        parts.append(torch.cat([hidden.mean(1), hidden.std(1, correction=0)], dim=-1))
    return torch.cat(parts)


def make_pool(settings: Settings, folder: Path | str, capacity: int) -> ExpertPool:
    """Returns the models of a folder as a pool with at most `capacity` in memory."""

    def load(name: str) -> CausalLM:
        return DeepSeek.from_pretrained(Path(folder) / name)

    sizes = dict.fromkeys(settings.models, 1)
    return ExpertPool(load, sizes, max(capacity, 2), pinned=(GENERALIST,))


def loss_table(
    settings: Settings, pool: ExpertPool, prompts: Prompts, progress: bool = True
) -> Tensor:
    """Returns [N, M]: the loss of each prompt with each model."""
    columns = []
    with bar(len(settings.models), "score the models", progress) as shown:
        for name in settings.models:
            model: Any = pool.get(name)
            columns.append(losses_of(model, prompts))
            shown.update()
    return torch.stack(columns, dim=1)


def fit_router(
    router: CategoryRouter,
    embeddings: Tensor,
    labels: Tensor,
    *,
    steps: int = 300,
    batch_size: int = 64,
    rate: float = 1e-2,
    weight_decay: float = 1e-2,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> dict[str, list[float]]:
    """Trains the router by cross-entropy on prompts [N, D] with labels [N]; returns the loss by
    step."""
    with torch.no_grad():
        router.mean.copy_(embeddings.mean(0))
        router.scale.copy_(embeddings.std(0, correction=0).clamp(min=1e-6))

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(labels), (batch_size,), generator=generator)
        return {"loss": F.cross_entropy(router(embeddings[rows]), labels[rows])}

    settings: dict[str, Any] = {"steps": steps, "seed": seed, "progress": progress}
    groups = [Group(list(router.parameters()), rate, weight_decay=weight_decay)]
    return train_steps(
        "fit the category router", router, groups, loss, checkpoint=checkpoint, **settings
    )


def compose(
    settings: Settings,
    pool: ExpertPool,
    texts: Mapping[str, python_texts.Text],
    progress: bool = True,
) -> tuple[Composition, dict[str, Any]]:
    """Creates router, map and threshold from the trained models of a pool, and evaluates them.

    Returns:
        The composition, and a dict of JSON: mean test losses, in nats a byte, of the ways to choose
        a model, on prompts of the categories ("known") and of the other domains ("strange").
    """
    general: Any = pool.get(GENERALIST)
    train = make_prompts(settings, texts, "train", settings.categories)
    valid = make_prompts(settings, texts, "valid", settings.domains)
    test = make_prompts(settings, texts, "test", settings.domains)
    parts = (train, valid, test)
    embedded = [embed_bytes(general, part.prompt) for part in parts]
    losses = [loss_table(settings, pool, part, progress) for part in parts]

    given = _few_labels(train.domains, settings)
    labels = propagate_labels(F.normalize(embedded[0] - embedded[0].mean(0), dim=-1), given)
    sizes = tuple(sum(p.numel() for p in general.parameters()) for _ in settings.models)
    composition = Composition(
        CompositionConfig(
            settings.categories,
            settings.models,
            sizes,
            GENERALIST,
            embedding_size=embedded[0].shape[1],
            budget=settings.budget * sizes[0],
        )
    )
    how: dict[str, Any] = {
        "steps": settings.router_steps,
        "seed": settings.seed,
        "progress": progress,
    }
    fit_router(composition.router, embedded[0], labels, **how)

    count = len(settings.categories)
    known = valid.domains < count
    scores = torch.stack([-losses[1][valid.domains == c].mean(0) for c in range(count)])
    found = assign_models(composition, scores, torch.full((count,), float(settings.prompts)))
    confidence = composition.route(embedded[1][known]).confidence
    threshold = float(confidence.double().quantile(settings.unsure)) if settings.unsure else 0.0
    composition.threshold.fill_(threshold)

    # The controls: classifiers of the best model of each prompt, among the same models, trained on
    # all training prompts or on those with given categories.
    kept = torch.tensor(found.kept)
    best = losses[0][:, kept].argmin(-1)
    choices = []
    for rows in (torch.ones_like(given, dtype=torch.bool), given >= 0):
        by_prompt = CategoryRouter(embedded[0].shape[1], len(kept))
        fit_router(by_prompt, embedded[0][rows], best[rows], **how)
        with torch.no_grad():
            choices.append(kept[by_prompt(embedded[2]).argmax(-1)])

    final = composition.route(embedded[2])
    best_single = int(kept[losses[1][known][:, kept].mean(0).argmin()])
    ways = {
        "composition": _at(losses[2], final.models),
        "without the threshold": _at(losses[2], composition.model_of[final.categories]),
        "per-prompt labels": _at(losses[2], choices[0]),
        "per-prompt labels, as few": _at(losses[2], choices[1]),
        "best single model": losses[2][:, best_single],
        "generalist": losses[2][:, composition.generalist],
        "mean of the kept models": losses[2][:, kept].mean(-1),
        "best kept model of each prompt": losses[2][:, kept].amin(-1),
    }
    where = {"known": test.domains < count, "strange": test.domains >= count}
    report = {
        "settings": dataclasses.asdict(settings),
        "kept": [settings.models[m] for m in found.kept],
        "model of category": {
            c: settings.models[m]
            for c, m in zip(settings.categories, composition.model_of.tolist(), strict=True)
        },
        "threshold": threshold,
        "right labels": float((labels == train.domains).float().mean()),
        "right categories": float(
            (final.categories == test.domains)[where["known"]].float().mean()
        ),
        "to the generalist": {
            name: float((final.confidence.double() < threshold)[rows].float().mean())
            for name, rows in where.items()
            if bool(rows.any())
        },
        "losses": {
            way: {name: float(loss[rows].mean()) for name, rows in where.items() if rows.any()}
            for way, loss in ways.items()
        },
        "loading": dataclasses.asdict(pool.counts),
    }
    return composition, report


def _at(losses: Tensor, models: Tensor) -> Tensor:
    return losses.gather(1, models[:, None])[:, 0]


def _few_labels(domains: Tensor, settings: Settings) -> Tensor:
    """Returns the labels of the first prompts of each category, -1 for the others."""
    place = torch.arange(len(domains)) % settings.prompts
    return domains.masked_fill(place >= settings.labeled, -1)


def train(
    folder: Path | str,
    settings: Settings | None = None,
    *,
    texts: Mapping[str, python_texts.Text] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains the missing models, composes and evaluates; writes and returns the report.

    Args:
        folder: contains the models and report.json. Existing models are reused; they must have been
            trained with these settings.
        texts: the domains' texts by name; None: texts from Python's standard library.

    Raises:
        ValueError: the folder has other settings.
    """
    settings = settings or Settings()
    # Settings applied after training may differ: another budget can reuse the models.
    free = ("budget", "prompts", "prompt_length", "labeled", "router_steps", "unsure")
    folder, _ = settings_folder(folder, settings, "models", free)
    texts = python_texts.load(settings.domains) if texts is None else texts
    train_models(settings, texts, folder, progress=progress)
    pool = make_pool(settings, folder, 2)
    composition, report = compose(settings, pool, texts, progress)
    _files.write_json(folder / "report.json", report)
    write_state(folder / "composition.pt", composition.state_dict())
    return report
