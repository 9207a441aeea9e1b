"""Training of WideNet and its controls, on text or on images, and their evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops import _files
from moe_ops._fields import check_choice
from moe_ops.viz import plot_expert_scores
from moe_ops.viz._canvas import import_matplotlib
from moe_ops.zoo.widenet import TRUNKS, WideNetLM, WideNetViT

from .. import python_texts
from ..settings import settings_folder
from ..trainer import Group, Lesson, train_steps
from .controls import ControlConfig, ControlLM, ControlViT, build
from .depths import across_depths, depth_loads
from .images import warped_digits

# Fields of the config that make the models of the comparison; "dense" ones have one network as wide
# as a token's K experts.
DENSE: dict[str, Any] = {"num_experts": 1, "top_k": 1}
ARMS: dict[str, dict[str, Any]] = {
    "widenet": {},
    "shared-norms": {"sharing": "shared_norms"},
    "dense-own-norms": DENSE,
    "dense-shared-norms": {**DENSE, "sharing": "shared_norms"},
    "unshared": {**DENSE, "sharing": "none"},
    "unshared-experts": {"sharing": "none"},
}
# Rows of an evaluation's batch.
ROWS = 64


def lesson(
    model: WideNetLM | WideNetViT,
    loss: Callable[[torch.Generator], Any],
    *,
    rate: float = 2e-3,
    warm_up: int = 50,
    weight_decay: float = 0.1,
) -> Lesson:
    """The model's own loss; the published run has LAMB, a rate of 0.01, 4096 images a step.

    Args:
        loss: from the generator of the run to what the model's `loss` returns for a batch.
        weight_decay: of matrices alone.
    """

    def step_loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        out = loss(generator)
        return {"loss": out.loss, "cross_entropy": out.cross_entropy, **out.aux_losses}

    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() > 1]
    others = [p for p in parameters if p.dim() <= 1]
    groups = [Group(matrices, rate, warm_up, weight_decay), Group(others, rate, warm_up)]
    return Lesson(groups, step_loss)


@dataclass(frozen=True)
class Settings:
    """Settings of `train`.

    Attributes:
        arms: of `ARMS`.
        trunk: "language": bytes of `domains`; "vision": digits that are drawn anew in each step.
        num_layers: the depth. intermediate_size: of an expert.
        steps, batch_size, rate: of each arm. length: bytes of a sequence.
        image_size, patch_size: of "vision".
        rows: of the evaluation: sequences of each domain, or 10 times as many images.
        pictures: 1: experts by depth are drawn, 0: they are not, which needs no matplotlib.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    trunk: str = "language"
    domains: tuple[str, ...] = python_texts.DOMAINS
    hidden_size: int = 64
    num_layers: int = 6
    intermediate_size: int = 64
    num_experts: int = 4
    top_k: int = 2
    steps: int = 1000
    batch_size: int = 16
    length: int = 128
    rate: float = 2e-3
    image_size: int = 16
    patch_size: int = 4
    rows: int = 64
    pictures: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("Settings", "trunk", self.trunk, TRUNKS)
        for arm in self.arms:
            check_choice("Settings", "arms", arm, ARMS)


def make_config(settings: Settings, arm: str) -> ControlConfig:
    sizes = {"num_experts": settings.num_experts, "top_k": settings.top_k, **ARMS[arm]}
    width = settings.intermediate_size
    return ControlConfig(
        trunk=settings.trunk,
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        num_heads=max(settings.hidden_size // 16, 1),
        intermediate_size=width * (settings.top_k if sizes["num_experts"] == 1 else 1),
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        **sizes,
    )


def make_loss(
    settings: Settings, model: nn.Module, texts: Mapping[str, python_texts.Text]
) -> Callable[[torch.Generator], Any]:
    """Returns the function that `fit` calls at each step for the loss."""
    own = list(texts.values())

    def of_text(generator: torch.Generator) -> Any:
        share = -(-settings.batch_size // len(own))
        rows = [text.draw(share, settings.length + 1, generator) for text in own]
        return model.loss(torch.cat(rows)[: settings.batch_size])  # type: ignore[operator]

    def of_images(generator: torch.Generator) -> Any:
        batch = warped_digits(settings.batch_size, settings.image_size, generator)
        return model.loss(*batch)  # type: ignore[operator]

    return of_text if settings.trunk == "language" else of_images


@torch.no_grad()
def _held_out(
    model: WideNetLM | WideNetViT, settings: Settings, texts: Mapping[str, python_texts.Text]
) -> Iterator[tuple[Any, Tensor | None]]:
    """Yields what `model.loss` returns for each batch of held-out text or fresh images, and whose
    labels they are: None of text."""
    model.eval()
    if isinstance(model, WideNetLM):
        for text in texts.values():
            for rows in text.spread(settings.rows, settings.length + 1).split(ROWS):
                yield model.loss(rows), None
    else:
        fresh = torch.Generator().manual_seed(settings.seed + 10_000)
        for _ in range(-(-10 * settings.rows // ROWS)):
            images, labels = warped_digits(ROWS, settings.image_size, fresh)
            yield model.loss(images, labels), labels


def evaluate(
    model: WideNetLM | WideNetViT, settings: Settings, texts: Mapping[str, python_texts.Text]
) -> tuple[dict[str, float], Tensor | None]:
    """On held-out text or fresh images: "loss" in nats a byte or an image, "accuracy" of images,
    the number of parameters, and the numbers of `across_depths` where there are routers; beside
    them [depths, E], the share of each depth's choices that an expert has, None without routers."""
    losses, depths, loads, right = [], [], [], []
    for out, labels in _held_out(model, settings, texts):
        losses.append(out.cross_entropy)
        if out.routing:
            depths.append(across_depths(out.routing))
            loads.append(depth_loads(out.routing))
        if labels is not None:
            right.append((out.logits.argmax(-1) == labels).float().mean())
    found: dict[str, float] = {"parameters": model.num_parameters()["total"]}
    if right:
        found["accuracy"] = float(torch.stack(right).mean())
    found["loss"] = float(torch.stack(losses).mean())
    for name in depths[0] if depths else ():
        found[name] = sum(of[name] for of in depths) / len(depths)
    return found, torch.stack(loads).mean(0) if loads else None


def draw(loads: Mapping[str, Tensor | None], path: Path) -> None:
    """Each depth's choices by expert, as `evaluate` returns them, a panel a model that has experts;
    nothing where none has."""
    panels = {name: list(of) for name, of in loads.items() if of is not None}
    if panels:
        num_layers = max(map(len, panels.values()))
        plot_expert_scores(
            panels,
            layer_names=[f"depth {i + 1}" for i in range(num_layers)],
            title="Share of each depth's choices",
            path=path,
        )


def train(
    folder: Path | str,
    settings: Settings | None = None,
    *,
    texts: Mapping[str, python_texts.Text] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains each arm on the same batches and evaluates it, draws experts by depth (experts.png);
    writes and returns report.json.

    What is done is not done again; what was cut goes on from its checkpoint. A model's folder is
    one of `from_pretrained`.

    Args:
        texts: of "language", by name; None: those that Python has.

    Raises:
        ValueError: the folder is of other settings. ImportError: the picture needs matplotlib.
    """
    settings = settings or Settings()
    if settings.pictures:
        import_matplotlib()
    folder, now = settings_folder(folder, settings, "models", ("arms", "rows", "pictures"))
    if texts is None:
        texts = python_texts.load(settings.domains) if settings.trunk == "language" else {}
    report: dict[str, Any] = {"settings": now, "arms": {}}
    loads = {}
    for arm in settings.arms:
        config, place = make_config(settings, arm), folder / arm
        if (place / "config.json").exists():
            kind = ControlLM if settings.trunk == "language" else ControlViT
            model: WideNetLM | WideNetViT = kind.from_pretrained(place)
        else:
            torch.manual_seed(settings.seed)
            model = build(config)
            state = folder / f"{arm}.training.pt"
            taught = lesson(model, make_loss(settings, model, texts), rate=settings.rate)
            train_steps(
                "fit widenet", model, *taught, steps=settings.steps, seed=settings.seed,
                checkpoint=state, progress=progress,
            )  # fmt: skip
            model.save_pretrained(place)
            state.unlink()
        report["arms"][arm], loads[arm] = evaluate(model, settings, texts)
    if settings.pictures:
        draw(loads, folder / "experts.png")
    _files.write_json(folder / "report.json", report)
    return report
