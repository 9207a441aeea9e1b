"""Training and evaluation of small language models on texts, shared by several models' commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops import _files, zoo
from moe_ops.layers import update_expert_bias
from moe_ops.zoo.lm.model import CausalLM

from . import python_texts
from .python_texts import Text
from .settings import settings_folder
from .trainer import Group, train_once, train_steps

Model = TypeVar("Model", bound=CausalLM)


def fit_once(
    folder: Path,
    name: str,
    model: Model,
    texts: Sequence[Text],
    *,
    steps: int,
    batch_size: int,
    length: int,
    rate: float,
    seed: int,
    loss: Callable[[Tensor], Tensor] | None = None,
    progress: bool = True,
) -> Model:
    """Returns the trained model, stored in a folder of its name in `folder`.

    A finished model is not trained again; an interrupted one continues from its checkpoint.

    Args:
        texts: each step draws rows from one of them, in turn.
        length: predicted bytes per row.
        loss: of rows [batch_size, length + 1]; None: the model's own.
    """

    has_bias = any(name.endswith("expert_bias") for name, _ in model.named_buffers())

    def of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = texts[step % len(texts)].draw(batch_size, length + 1, generator)
        value = model.loss(rows).loss if loss is None else loss(rows)
        if has_bias:
            update_expert_bias(model, rate=model.config.bias_update_rate)
        return {"loss": value}

    def fit(checkpoint: Path) -> None:
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        groups = [Group(matrices, rate, 30, 0.1), Group(others, rate, 30)]
        what = f"train {name}"
        how: Any = {"steps": steps, "seed": seed, "checkpoint": checkpoint, "progress": progress}
        train_steps(what, model, groups, of_step, **how)

    return train_once(
        model,
        folder,
        name,
        fit,
        kept="{name}/config.json",
        read=lambda model, file: type(model).from_pretrained(file.parent),
        write=lambda model, file: model.save_pretrained(file.parent),
    ).eval()


@torch.no_grad()
def judge(model: Any, texts: Mapping[str, Text], rows: int, length: int) -> dict[str, float]:
    """Returns held-out nats per byte by text, their mean as "loss", and as "accuracy" the fraction
    of bytes that were the most likely."""
    before = model.training
    model.eval()
    losses, hits = {}, []
    for name, text in texts.items():
        found = []
        for tokens in text.spread(rows, length + 1).split(16):
            logits, target = model(tokens[:, :-1]), tokens[:, 1:]
            found.append(F.cross_entropy(logits.transpose(1, 2), target, reduction="none"))
            hits.append((logits.argmax(-1) == target).double().mean(-1))
        losses[name] = float(torch.cat(found).mean())
    model.train(before)
    mean = sum(losses.values()) / len(losses)
    return {**losses, "loss": mean, "accuracy": float(torch.cat(hits).mean())}


@dataclass(frozen=True)
class Settings:
    """Settings of `train`.

    Attributes:
        preset: of the model, with a vocabulary of bytes.
        domains: names of texts.
        rows: held-out rows per domain.
    """

    preset: str = "tiny"
    domains: tuple[str, ...] = python_texts.DOMAINS
    steps: int = 800
    batch_size: int = 8
    length: int = 128
    rate: float = 3e-3
    rows: int = 64
    seed: int = 0


def train(
    system: str,
    folder: Path | str,
    settings: Settings | None = None,
    *,
    texts: Mapping[str, Text] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains a language model of the zoo on texts from Python's standard library; writes and
    returns report.json.

    Raises:
        ValueError: the folder has other settings.
    """
    settings = settings or Settings()
    folder, now = settings_folder(folder, settings, "models", ("rows",))
    texts = python_texts.load(settings.domains) if texts is None else texts
    torch.manual_seed(settings.seed)
    model = fit_once(
        folder,
        system,
        zoo.create_model(system, settings.preset),
        [texts[name] for name in settings.domains],
        steps=settings.steps,
        batch_size=settings.batch_size,
        length=settings.length,
        rate=settings.rate,
        seed=settings.seed,
        progress=progress,
    )
    found = judge(model, texts, settings.rows, settings.length)
    report = {"settings": now, "arms": {system: found}}
    _files.write_json(folder / "report.json", report)
    return report
