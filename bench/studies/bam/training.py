"""A dense seed, specialists that continue its training, and mixtures of them, on small texts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_ops import _files
from moe_ops._fields import check_choice
from moe_ops.zoo.bam import BAM, BAMConfig

from .. import python_texts
from ..language import fit_once, judge
from ..settings import settings_folder

# Mixtures made from the dense models; "dense" continues training the seed.
ARMS: dict[str, dict[str, Any]] = {
    "own K/V": {},
    "shared K/V": {"attention": "shared_kv"},
    "top-2": {"attention_top_k": 2},
    "top-1": {"attention_top_k": 1},
    "BTX": {"attention": "dense"},
    "dense": {},
}
OWN_SHARE = 9  # Of ten steps of a specialist, the tenth is of the first domain.


@dataclass(frozen=True)
class Settings:
    """Settings of `train`.

    Attributes:
        arms: of `ARMS`.
        domains: names of texts. The first is general text; each other one has a specialist.
        seed_steps, specialist_steps, steps: of the seed, of each specialist, and of each arm.
        rate: of the seed; the others have half of it.
        rows: held-out rows of a domain.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    domains: tuple[str, ...] = python_texts.DOMAINS
    seed_steps: int = 600
    specialist_steps: int = 300
    steps: int = 200
    batch_size: int = 8
    length: int = 128
    rate: float = 3e-3
    hidden_size: int = 64
    num_layers: int = 2
    rows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_choice("Settings", "arms", arm, ARMS)
        if len(self.domains) < 2:
            raise ValueError(
                f"Settings: domains must be two or more, got {', '.join(self.domains)}."
            )


def train(
    folder: Path | str,
    settings: Settings | None = None,
    *,
    texts: Mapping[str, python_texts.Text] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains the seed, the specialists and all arms, evaluates; writes and returns report.json.

    Finished parts are not repeated; interrupted ones continue from their checkpoints.

    Args:
        texts: the domains' texts by name; None: texts from Python's standard library.

    Raises:
        ValueError: the folder has other settings.
    """
    settings = settings or Settings()
    folder, now = settings_folder(folder, settings, "models", ("arms", "rows"))
    texts = python_texts.load(settings.domains) if texts is None else texts
    every = [texts[name] for name in settings.domains]

    def fitted(
        name: str, model: BAM, text: Sequence[python_texts.Text], steps: int, rate: float
    ) -> BAM:
        return fit_once(
            folder, name, model, text, steps=steps, batch_size=settings.batch_size,
            length=settings.length, rate=rate, seed=settings.seed, progress=progress,
        )  # fmt: skip

    def judged(model: BAM) -> dict[str, float]:
        return judge(model, texts, settings.rows, settings.length)

    heads = max(settings.hidden_size // 32, 1)
    config = BAMConfig(
        num_experts=1,
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=min(settings.hidden_size, 32),
        intermediate_size=4 * settings.hidden_size,
    )
    torch.manual_seed(settings.seed)
    first = fitted("seed", BAM(config), every, settings.seed_steps, settings.rate)
    models = [first]
    for name in settings.domains[1:]:
        text = [texts[name]] * OWN_SHARE + [every[0]]
        start = copy.deepcopy(first)
        models.append(
            fitted(f"specialist-{name}", start, text, settings.specialist_steps, settings.rate / 2)
        )
    report: dict[str, Any] = {"settings": now, "arms": {"seed": judged(first)}}
    for arm in settings.arms:
        torch.manual_seed(settings.seed + 1)
        made = copy.deepcopy(first) if arm == "dense" else BAM.from_dense(models, **ARMS[arm])
        before = judged(made)["loss"]
        file = arm.lower().replace("/", "").replace(" ", "-")
        made = fitted(file, made, every, settings.steps, settings.rate / 2)
        report["arms"][arm] = {**judged(made), "loss at the start": before}
    _files.write_json(folder / "report.json", report)
    return report
