"""JetMoE against a dense model of the same active parameters, and its two losses.

The dense model is a JetMoE with one expert in each half: (K + 1) / 2 times the heads and K times
the width of an expert, so that a token uses as many parameters and a query reads as many features.
Its router has nothing to learn.
"""

from __future__ import annotations

import dataclasses

from moe_ops.zoo.jetmoe import JetMoE, JetMoEConfig

from .compare import curves_picture, loss_picture
from .picture import Picture
from .study import Experiment, Headline, Hypothesis, Job, Results, Study
from .text import DOMAINS
from .training import Recipe, flops_a_token, job, setting, step_violation

CONFIG = JetMoEConfig(
    vocab_size=256,
    hidden_size=64,
    num_layers=2,
    num_kv_heads=2,
    head_size=16,
    intermediate_size=64,
    num_experts=8,
    top_k=2,
    context=128,
    init_std=0.02,
)
WIDE = dataclasses.replace(CONFIG, hidden_size=128, head_size=32, intermediate_size=128)
RECIPE = Recipe(steps=500, batch=9, rate=3e-3)
LONG = dataclasses.replace(RECIPE, steps=2000)
LONGER = dataclasses.replace(RECIPE, steps=3500)


def dense(config: JetMoEConfig) -> JetMoEConfig:
    """Returns a config with one expert in each half and the active parameters of `config`.

    Attention of K experts has K (2 n d H) + 2 n d H parameters per token; one expert with n' heads
    has 4 n' d H.
    """
    heads = config.num_kv_heads * (config.top_k + 1)
    if heads % 2:
        raise ValueError(f"dense: num_kv_heads * (top_k + 1) must be even, got {heads}.")
    return dataclasses.replace(
        config,
        num_kv_heads=heads // 2,
        intermediate_size=config.intermediate_size * config.top_k,
        num_experts=1,
        top_k=1,
    )


def runs(config: JetMoEConfig, recipe: Recipe) -> dict[str, Job]:
    """Returns runs of JetMoE, dense, and JetMoE without each of its losses."""
    both = config.aux_coefficients()

    def made(arm: str, sizes: JetMoEConfig, coefficients: dict[str, float]) -> Job:
        # The dense model's routers have only one expert.
        columns = ("loss",) if arm == "dense" else ("loss", "MaxVio", "z")
        return job(
            arm,
            lambda: JetMoE(sizes),
            recipe,
            columns=columns,
            coefficients=coefficients,
            watch=step_violation,
        )

    return {
        "JetMoE": made("JetMoE", config, both),
        "dense": made("dense", dense(config), {}),
        "no balance loss": made("no balance loss", config, {**both, "load_balancing": 0.0}),
        "no z-loss": made("no z-loss", config, {**both, "router_z": 0.0}),
    }


def study(
    name: str,
    size: str,
    rank: int,
    minutes: float,
    config: JetMoEConfig,
    recipe: Recipe,
    *,
    seeds: int = 5,
    losses: bool = True,
    pilot: tuple[float, float, str] | None = None,
) -> Study:
    """Returns a study at one size; `losses`: includes the arms that lack a loss. pilot: JetMoE's
    loss minus the dense model's, the deviation of one seed, and the source."""
    every = runs(config, recipe)
    arms = every if losses else {arm: every[arm] for arm in ("JetMoE", "dense")}
    expected, deviation, said = pilot or (None, None, "")

    def made() -> dict[str, str]:
        found = setting(DOMAINS, recipe)
        for arm, sizes in (("JetMoE", config), ("Dense", dense(config))):
            model = JetMoE(sizes)
            count = model.num_parameters()
            features = sizes.num_layers * sizes.num_kv_heads * sizes.head_size * sizes.top_k
            flops = flops_a_token(model, recipe.length, features)
            found[arm] = (
                f"{count['active']:,} active parameters of {count['total']:,}, {flops:,} FLOPs a "
                "token"
            )
        return found

    hypotheses = [
        Hypothesis(
            "JetMoE's loss is below that of the dense model",
            lambda r: r.gap("JetMoE", "dense", "loss"),
            "nats a byte",
            key="dense",
            expected=expected,
            deviation=deviation,
            pilot=said,
        )
    ]
    if losses:
        hypotheses += [
            Hypothesis(
                "the balance loss lowers MaxVio",
                lambda r: r.gap("JetMoE", "no balance loss", "MaxVio"),
                "",
                key="balance",
            ),
            Hypothesis(
                "the z-loss lowers the mean of logsumexp^2",
                lambda r: r.gap("JetMoE", "no z-loss", "z"),
                "",
                key="z",
            ),
        ]

    def pictures(results: Results) -> list[Picture]:
        drawn = [loss_picture(results, [arm for arm in arms if arm != "dense"], "dense")]
        routed = [arm for arm in ("JetMoE", "no balance loss") if arm in arms]
        title = "MaxVio of the training batches, mean of routers"
        drawn.append(
            curves_picture(results, routed, recipe.steps, "balance", title, "MaxVio", "watched")
        )
        return drawn

    return Study(name, size, rank, arms, seeds, minutes, hypotheses, made, pictures)


EXPERIMENT = Experiment(
    "jetmoe",
    (
        study(
            "jetmoe-500", "0.6 MB, H 64", 35, 0.35, CONFIG, RECIPE,
            pilot=(-0.029, 0.029, "seeds 0 to 2 at this size"),
        ),
        study(
            "jetmoe-2000", "2.3 MB, H 64", 10, 0.9, CONFIG, LONG,
            pilot=(-0.088, 0.026, "seeds 0 to 2 at this size"),
        ),
        study(
            "jetmoe-wide", "4 MB, H 128", 50, 4.0, WIDE, LONGER, losses=False,
            pilot=(-0.088, 0.026, "seeds 0 to 2 of 2.3 MB, H 64"),
        ),
    ),
    (
        Headline(
            "dense", "lower loss than a dense model of as many active parameters",
            "JetMoE-8B beats Llama2-7B, 70 % less inference compute", "quality",
            shown="0.6 MB are too little to see it: with four times the text the gap is wider and "
            "its spread over seeds a quarter",
        ),
        Headline(
            "balance", "the balance loss evens the load", "used, not ablated", "mechanism",
            shown="without it one expert ends at 3.3 times its share",
        ),
        Headline(
            "z", "the z-loss keeps logits small", "used, not ablated", "mechanism",
            shown="it is what the loss minimises",
        ),
    ),
)  # fmt: skip
