"""MoFME: experts that modulate one network against whole ones, on photos in generated weather."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.studies.mofme.rivals import Restoration, RivalConfig
from bench.studies.mofme.training import count_parameters, evaluate
from bench.studies.mofme.weather import (
    PHOTOS,
    TEST,
    WEATHER,
    crops,
    degrade,
    load_photos,
    missing_photos,
)
from moe_ops.zoo.mofme import MoFMEConfig

from ..study import Experiment, Headline, Hypothesis, Job, Run, Study
from ..training import Recipe, train_drawn

FULL, PLAIN = "FiLM experts, uncertainty router", "FiLM experts"
WHOLE, DENSE, WIDE = "FFN experts", "dense", "dense, wide"
ARMS: dict[str, dict[str, Any]] = {
    DENSE: {"experts": "dense"},
    WIDE: {"experts": "dense", "mlp_ratio": 8},
    WHOLE: {"experts": "ffn", "router": "plain"},
    PLAIN: {"experts": "film", "router": "plain"},
    FULL: {"experts": "film", "router": "uncertainty"},
}
# In dB: what the authors call as good.
WITHIN = 0.1


@dataclass(frozen=True)
class Plan:
    """Training of each arm, and crops of the test."""

    config: MoFMEConfig
    steps: int
    batch: int
    crop: int = 32
    rate: float = 2e-3
    test: int = 300


SMALL = Plan(MoFMEConfig.tiny(), steps=1000, batch=18)


def one(arm: str, plan: Plan) -> Job:
    """A run: one model on the crops that a seed draws."""

    def perform(seed: int, run: Run) -> dict[str, Any]:
        missing = missing_photos()
        if missing:
            raise FileNotFoundError(
                f"mofme: all photos must be installed, got none of {', '.join(missing)}: "
                "pip install torch-moe-ops[studies]"
            )
        photos, kept = load_photos()
        fresh = torch.Generator().manual_seed(1_000_000 + seed)
        test = degrade(crops(kept, plan.test, plan.crop, fresh), fresh)
        torch.manual_seed(seed)
        model = Restoration(RivalConfig(**{**vars(plan.config), **ARMS[arm]}))

        def loss(draw: torch.Generator) -> Tensor:
            batch = degrade(crops(photos, plan.batch, plan.crop, draw), draw)
            return F.smooth_l1_loss(model(batch.degraded)[0], batch.clean)

        recipe = Recipe(steps=plan.steps, rate=plan.rate, weight_decay=0.01)
        train_drawn(model, loss, recipe, seed, run)
        found = evaluate(model, test, progress=False)
        counts = count_parameters(model)
        row = {
            "PSNR": found["psnr"],
            **{f"PSNR, {kind}": found[f"psnr {kind}"] for kind in WEATHER},
            "information": found.get("information"),
            "expert parameters": float(counts["experts"]) or None,
            "active parameters": float(counts["active"]),
        }
        return {"rows": {arm: row}}

    return perform


def study(name: str, size: str, rank: int, minutes: float, plan: Plan) -> Study:
    def ahead(a: str, b: str) -> Any:
        return lambda r: r.gap(a, b, "PSNR")

    hypotheses = [
        Hypothesis(
            "FiLM experts with an uncertainty router are at most 0.1 dB behind FFN experts",
            ahead(FULL, WHOLE), "dB", bound=-WITHIN, below=False, key="within",
        ),
        Hypothesis(
            "they are ahead of a dense network as wide as two FFN experts",
            ahead(FULL, WIDE), "dB", below=False, key="dense",
        ),
        Hypothesis(
            "FFN experts are ahead of that dense network", ahead(WHOLE, WIDE), "dB", below=False,
            key="experts",
        ),
        Hypothesis(
            "the uncertainty router is ahead of a plain one", ahead(FULL, PLAIN), "dB",
            below=False, key="uncertainty",
        ),
        Hypothesis(
            "experts tell more than 0.01 nats about the weather",
            lambda r: r.of(FULL, "information"), "nats", bound=0.01, below=False, key="weather",
        ),
    ]  # fmt: skip

    def made() -> dict[str, str]:
        config = plan.config
        return {
            "Data": f"crops of {plan.crop} pixels of {len(PHOTOS)} photos at half size, in rain, "
            f"snow or haze of random strength; {', '.join(TEST)} are kept for the test, "
            f"{plan.test} crops a seed",
            "Model": f"H {config.hidden_size}, {config.num_layers} layers, patches of "
            f"{config.patch_size}, E {config.num_experts}, K {config.top_k}, networks of "
            f"{config.mlp_ratio} H ({WIDE}: 8 H), {config.channels} channels of convolutions",
            "Training": f"smooth L1, AdamW {plan.rate:g} (warm-up 50, cosine to a tenth), weight "
            f"decay 0.01, {plan.steps} steps of {plan.batch} crops",
        }

    runs = {arm: one(arm, plan) for arm in ARMS}
    return Study(name, size, rank, runs, 5, minutes, hypotheses, made)


EXPERIMENT = Experiment(
    "mofme",
    (study("mofme-photos", "H 96", 45, 1.3, SMALL),),
    (
        Headline(
            "within", "FiLM experts are at most 0.1 dB behind FFN experts",
            "as good or better, 72 % fewer parameters", "quality",
            not_shown="two trainings differ by 0.3 dB, with 75 % fewer parameters of experts",
        ),
        Headline(
            "dense", "and ahead of a dense network as wide", "0.1 to 0.2 dB ahead of baselines",
            "quality",
        ),
        Headline("experts", "so are FFN experts", "not stated at equal width", "quality"),
        Headline(
            "uncertainty", "the uncertainty router is better than a plain one",
            "well-calibrated weights", "mechanism",
            not_shown="behind in all five seeds, by 0.4 dB in one",
        ),
        Headline("weather", "experts tell the weather", "not compared", "mechanism"),
    ),
)  # fmt: skip
