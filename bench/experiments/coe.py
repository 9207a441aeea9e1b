"""Chain-of-Experts: two iterations of K / 2 experts against one of K, gates and residuals.

All arms have the same experts. Iterations run the shared expert again, so two iterations of K / 2
are 2 + K expert calls a token where one iteration of K is 1 + K.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from moe_ops.zoo.coe import CoE, CoEConfig

from . import command
from .compare import against, over_steps
from .picture import Picture
from .report import Claim, Report
from .text import load_domains
from .training import Recipe, Trained, setting, train

BASE = CoEConfig(hidden_size=64, num_layers=2, num_heads=4, kv_rank=32, intermediate_size=32)
RECIPE = Recipe(steps=500, batch=9, rate=3e-3)


def arms_of(base: CoEConfig) -> dict[str, CoEConfig]:
    """The arms, name -> config; 4 experts a token in one iteration, or 2 in each of two."""

    def made(iterations: int, **more: bool) -> CoEConfig:
        return dataclasses.replace(base, num_iterations=iterations, top_k=4 // iterations, **more)

    published = {"outer_residual": False}
    return {
        "one iteration": made(1),
        "two iterations": made(2),
        "two, one gate": made(2, own_gates=False),
        "one iteration, published residual": made(1, **published),
        "two iterations, published residual": made(2, **published),
    }


def run(
    seeds: Sequence[int],
    log: Callable[[str], None],
    base: CoEConfig = BASE,
    recipe: Recipe = RECIPE,
) -> Report:
    """The experiment."""
    domains, arms = load_domains(), arms_of(base)
    results: dict[str, list[Trained]] = {arm: [] for arm in arms}
    for seed in seeds:
        for arm, config in arms.items():
            trained = train(lambda config=config: CoE(config), domains, recipe, seed)
            results[arm].append(trained)
            log(f"seed {seed}, {arm}: {trained.loss:.4f} nats a byte, {trained.seconds:.0f} s")
    made = setting(domains, recipe, seeds)
    for arm, found in results.items():
        config = arms[arm]
        calls = config.num_iterations * (config.top_k + config.num_shared_experts)
        total = found[0].model.num_parameters()["total"]
        made[arm] = f"{total:,} parameters, {calls} expert calls a token and layer"
    report = Report("coe", made, ["held-out loss, nats a byte", "MaxVio"])
    for arm, found in results.items():
        report.arms[arm] = [(t.loss, t.max_violation) for t in found]

    def claim(statement: str, a: str, b: str) -> Claim:
        pairs = zip(results[a], results[b], strict=True)
        return Claim(statement, [x.loss - y.loss for x, y in pairs], "nats a byte")

    published = "{}, published residual"
    report.claims = [
        claim("two iterations of 2 are better than one of 4", "two iterations", "one iteration"),
        claim(
            "with the published residual too",
            published.format("two iterations"),
            published.format("one iteration"),
        ),
        claim("own gates are better than one for both", "two iterations", "two, one gate"),
        claim(
            "keeping the stream is better than the published residual",
            "two iterations",
            published.format("two iterations"),
        ),
    ]
    report.pictures = [
        Picture(
            "loss",
            "Held-out loss against one iteration of 4, same seed",
            "",
            "difference, nats a byte",
            "bars",
            against(results, "one iteration"),
        ),
        Picture(
            "training",
            "Training loss",
            "step",
            "nats a byte",
            "lines",
            over_steps(
                {arm: [t.curve for t in found] for arm, found in results.items()},
                max(1, recipe.steps // 20),
            ),
        ),
    ]
    return report


if __name__ == "__main__":
    command.main("coe", run)
