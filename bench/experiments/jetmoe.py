"""JetMoE against a dense model of the same active parameters, and its two losses.

The dense model is a JetMoE with one expert in each half: (K + 1) / 2 times the heads and K times
the width of an expert, so that a token passes through as many parameters and a query sees as many
features. It has no router to learn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from moe_ops.zoo.jetmoe import JetMoE, JetMoEConfig

from . import command
from .compare import against, over_steps
from .picture import Picture
from .report import Claim, Report
from .text import load_domains
from .training import Recipe, Trained, flops_a_token, setting, step_violation, train

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
RECIPE = Recipe(steps=500, batch=9, rate=3e-3)


def dense(config: JetMoEConfig) -> JetMoEConfig:
    """One expert in each half, with the active parameters of `config`.

    Attention of K experts: K (2 n d H) + 2 n d H parameters a token; of one with n' heads:
    4 n' d H.
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


def run(
    seeds: Sequence[int],
    log: Callable[[str], None],
    config: JetMoEConfig = CONFIG,
    recipe: Recipe = RECIPE,
) -> Report:
    """The experiment. Arms: JetMoE, dense, JetMoE without either of its losses."""
    domains = load_domains()
    both = config.aux_coefficients()
    arms = {
        "JetMoE": (config, both),
        "dense": (dense(config), {}),
        "no balance loss": (config, {**both, "load_balancing": 0.0}),
        "no z-loss": (config, {**both, "router_z": 0.0}),
    }
    results: dict[str, list[Trained]] = {arm: [] for arm in arms}
    for seed in seeds:
        for arm, (sizes, coefficients) in arms.items():
            trained = train(
                lambda sizes=sizes: JetMoE(sizes),
                domains,
                recipe,
                seed,
                coefficients=coefficients,
                watch=step_violation,
            )
            results[arm].append(trained)
            log(f"seed {seed}, {arm}: {trained.loss:.4f} nats a byte, {trained.seconds:.0f} s")

    sparse, plain = results["JetMoE"], results["dense"]
    made = setting(domains, recipe, seeds)
    for arm, trained in (("JetMoE", sparse[0]), ("Dense", plain[0])):
        model, sizes = trained.model, trained.model.config
        count = model.num_parameters()
        features = sizes.num_layers * sizes.num_kv_heads * sizes.head_size * sizes.top_k
        flops = flops_a_token(model, recipe.length, features)
        made[arm] = (
            f"{count['active']:,} active parameters of {count['total']:,}, {flops:,} FLOPs a token"
        )
    report = Report("jetmoe", made, ["held-out loss, nats a byte", "MaxVio", "z"])
    for arm, found in results.items():
        routed = arm != "dense"  # Its routers have nothing to choose.
        report.arms[arm] = [
            (t.loss, t.max_violation if routed else None, t.z if routed else None) for t in found
        ]

    def differences(other: str, of: Callable[[Trained], float]) -> list[float]:
        return [of(a) - of(b) for a, b in zip(sparse, results[other], strict=True)]

    report.claims = [
        Claim(
            "JetMoE's loss is below that of the dense model",
            differences("dense", lambda t: t.loss),
            "nats a byte",
        ),
        Claim(
            "the balance loss lowers MaxVio",
            differences("no balance loss", lambda t: t.max_violation),
            "",
        ),
        Claim("the z-loss lowers the mean of logsumexp^2", differences("no z-loss", _z), ""),
    ]
    routed = ("JetMoE", "no balance loss")
    report.pictures = [
        Picture(
            "loss",
            "Held-out loss against the dense model, same seed",
            "",
            "difference, nats a byte",
            "bars",
            against(results, "dense"),
        ),
        Picture(
            "balance",
            "MaxVio of the training batches, mean of routers",
            "step",
            "MaxVio",
            "lines",
            over_steps(
                {arm: [t.watched for t in results[arm]] for arm in routed},
                max(1, recipe.steps // 50),
            ),
        ),
    ]
    return report


def _z(trained: Trained) -> float:
    return trained.z


if __name__ == "__main__":
    command.main("jetmoe", run)
