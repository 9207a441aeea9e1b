"""A dense model, its networks cut into slices, with routers trained in several ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_ops import _files
from moe_ops._fields import check_choice
from moe_ops.zoo.factorllm import FactorLLM
from moe_ops.zoo.llama import Llama, LlamaConfig

from .. import python_texts
from ..language import fit_once, judge
from ..settings import settings_folder
from .straight_through import StraightThrough

# What teaches the router: the losses of `FactorLLM.distill`, the language model loss, or nothing,
# as in the published training code.
ARMS: dict[str, type[FactorLLM]] = {
    "prior": FactorLLM,
    "straight_through": StraightThrough,
    "released": FactorLLM,
}


@dataclass(frozen=True)
class Settings:
    """Settings of `train`.

    Attributes:
        arms: router training methods, of `ARMS`.
        domains: names of texts.
        dense_steps, steps: of the dense model, which is the teacher, and of each arm.
        rate: of the dense model, `tune_rate` of the arms.
        num_slices, top_k: N and K.
        rows: held-out rows of a domain.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    domains: tuple[str, ...] = python_texts.DOMAINS
    dense_steps: int = 800
    steps: int = 200
    batch_size: int = 8
    length: int = 128
    rate: float = 3e-3
    tune_rate: float = 5e-4
    num_slices: int = 4
    top_k: int = 1
    hidden_size: int = 64
    num_layers: int = 2
    rows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_choice("Settings", "arms", arm, ARMS)


def train(
    folder: Path | str,
    settings: Settings | None = None,
    *,
    texts: Mapping[str, python_texts.Text] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains the dense model, cuts it, trains all arms against it, evaluates; writes and returns
    report.json. "accuracy kept" is the ratio of an arm's accuracy to the dense model's.

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
    how: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "length": settings.length,
        "seed": settings.seed,
        "progress": progress,
    }
    heads = max(settings.hidden_size // 32, 1)
    config = LlamaConfig(
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=min(settings.hidden_size, 32),
        intermediate_size=4 * settings.hidden_size,
    )
    torch.manual_seed(settings.seed)
    dense = fit_once(
        folder, "dense", Llama(config), every, steps=settings.dense_steps, rate=settings.rate, **how
    )
    full = judge(dense, texts, settings.rows, settings.length)
    report: dict[str, Any] = {"settings": now, "arms": {"dense": full}}
    for arm in settings.arms:
        torch.manual_seed(settings.seed + 1)
        model = ARMS[arm].from_dense(dense, num_slices=settings.num_slices, top_k=settings.top_k)
        before = judge(model, texts, settings.rows, settings.length)

        def distilled(rows: Tensor, model: FactorLLM = model) -> Tensor:
            return model.distill(rows, dense).loss

        model = fit_once(
            folder,
            arm,
            model,
            every,
            steps=settings.steps,
            rate=settings.tune_rate,
            loss=distilled if arm == "prior" else None,
            **how,
        )
        found = judge(model, texts, settings.rows, settings.length)
        found["accuracy kept"] = found["accuracy"] / max(full["accuracy"], 1e-12)
        found["loss at the start"] = before["loss"]
        report["arms"][arm] = found
    _files.write_json(folder / "report.json", report)
    return report
