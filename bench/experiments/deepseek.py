"""DeepSeekMoE: finer and shared experts at equal compute, and balance by a bias.

Three layouts with the same expert parameters, all and a token's: 8 experts of which 2 are used
(GShard's); 7, of which 1 is used, and a shared one; 31 of a quarter of the width, of which 7 are
used, and a shared one. The fourth and fifth arm are the third with sigmoid scores, balanced by a
loss or by a bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from moe_ops.layers import Router, RouterOutput
from moe_ops.zoo.deepseek import DeepSeek, DeepSeekConfig

from . import command
from .compare import against, over_steps, series
from .picture import Picture
from .report import Claim, Report
from .text import Domain, load_domains
from .training import Recipe, Trained, evaluate, flops_a_token, setting, step_violation, train

BALANCE = 0.01
# Published runs move the bias by 0.001 in each of many thousand steps.
BIAS_RATE = 0.01
WIDTH = 64
BASE = DeepSeekConfig(
    hidden_size=64,
    num_layers=2,
    num_dense_layers=0,
    num_heads=4,
    latent=False,
    head_size=16,
    rope_interleaved=False,
    expert_balance_coefficient=BALANCE,
)
RECIPE = Recipe(steps=500, batch=9, rate=3e-3)
MAX_VIOLATION_FACTOR = 3.0


def layouts(base: DeepSeekConfig, width: int = WIDTH) -> dict[str, DeepSeekConfig]:
    """The arms, name -> config."""

    def made(experts: int, top_k: int, shared: int, part: int, **more: object) -> DeepSeekConfig:
        return dataclasses.replace(
            base,
            num_experts=experts,
            top_k=top_k,
            num_shared_experts=shared,
            intermediate_size=width // part,
            **more,
        )

    sigmoid = {"score_func": "sigmoid", "renormalize": True}
    return {
        "8 experts": made(8, 2, 0, 1),
        "7 + 1 shared": made(7, 1, 1, 1),
        "31 + 1 shared, quarter width": made(31, 7, 1, 4),
        "balance by a loss": made(31, 7, 1, 4, **sigmoid),
        "balance by a bias": made(
            31, 7, 1, 4, **sigmoid, expert_bias=True, bias_update_rate=BIAS_RATE,
            expert_balance_coefficient=0.0,
        ),
    }  # fmt: skip


def run(
    seeds: Sequence[int],
    log: Callable[[str], None],
    base: DeepSeekConfig = BASE,
    recipe: Recipe = RECIPE,
    width: int = WIDTH,
) -> Report:
    """The experiment."""
    domains, arms = load_domains(), layouts(base, width)
    results: dict[str, list[Trained]] = {arm: [] for arm in arms}
    without_shared, without_first = [], []
    for seed in seeds:
        for arm, config in arms.items():
            trained = train(
                lambda config=config: DeepSeek(config),
                domains,
                recipe,
                seed,
                prepare=_balance if config.expert_bias else None,
                watch=step_violation,
            )
            results[arm].append(trained)
            log(f"seed {seed}, {arm}: {trained.loss:.4f} nats a byte, {trained.seconds:.0f} s")
        fine = results["31 + 1 shared, quarter width"][-1]
        without_first.append(loss_without_first_expert(fine, domains, recipe) - fine.loss)
        without_shared.append(loss_without_shared_expert(fine, domains, recipe) - fine.loss)

    made = setting(domains, recipe, seeds)
    made["Balance"] = f"loss {BALANCE:g}, bias rate {BIAS_RATE:g} a step"
    for arm, found in results.items():
        model = found[0].model
        count = model.num_parameters()
        flops = flops_a_token(
            model, recipe.length, base.num_layers * base.num_heads * base.head_size
        )
        made[arm] = (
            f"{count['active']:,} active parameters of {count['total']:,}, {flops:,} FLOPs a token"
        )
    report = Report("deepseek", made, ["held-out loss, nats a byte", "MaxVio"])
    for arm, found in results.items():
        report.arms[arm] = [(t.loss, t.max_violation) for t in found]

    coarse, shared, fine, by_loss, by_bias = results.values()

    def differences(a: list[Trained], b: list[Trained]) -> list[float]:
        return [x.loss - y.loss for x, y in zip(a, b, strict=True)]

    nats = "nats a byte"
    report.claims = [
        Claim("a shared expert lowers the loss", differences(shared, coarse), nats),
        Claim("finer experts lower it further", differences(fine, shared), nats),
        Claim(
            "taking the shared expert away (for one more routed one) costs more than taking away "
            "the first routed one",
            [a - b for a, b in zip(without_shared, without_first, strict=True)],
            nats,
            below=False,
        ),
        Claim(
            "MaxVio with the loss over MaxVio with the bias",
            [
                a.max_violation / max(b.max_violation, 1e-9)
                for a, b in zip(by_loss, by_bias, strict=True)
            ],
            "times",
            bound=MAX_VIOLATION_FACTOR,
            below=False,
        ),
        Claim(
            "the bias costs less than 0.01 of loss",
            differences(by_bias, by_loss),
            nats,
            bound=0.01,
        ),
    ]
    balanced = {arm: [t.watched for t in results[arm]] for arm in list(results)[-2:]}
    removed = {"shared": without_shared, "first routed": without_first}
    report.pictures = [
        Picture(
            "loss",
            "Held-out loss against 8 experts of full width, same seed",
            "",
            "difference, nats a byte",
            "bars",
            against({arm: results[arm] for arm in list(results)[:3]}, "8 experts"),
        ),
        Picture(
            "balance",
            "MaxVio of the training batches, mean of layers",
            "step",
            "MaxVio",
            "lines",
            over_steps(balanced, max(1, recipe.steps // 50)),
        ),
        Picture(
            "removed",
            "Held-out loss added by taking an expert away from 31 + 1 shared",
            "expert",
            "nats a byte",
            "bars",
            {"": series(list(removed), list(zip(*removed.values(), strict=True)))},
        ),
    ]
    return report


def _balance(model: DeepSeek, optimizer: torch.optim.Optimizer) -> None:
    model.balance_after(optimizer)


def loss_without_first_expert(trained: Trained, domains: Sequence[Domain], recipe: Recipe) -> float:
    """Held-out loss when no token uses the routed expert it weights most."""

    def drop(router: Router, args: object, out: RouterOutput) -> RouterOutput:
        first = out.topk_weights.argmax(-1, keepdim=True)
        return out._replace(topk_ids=out.topk_ids.scatter(1, first, -1))

    routers = [m for m in trained.model.modules() if isinstance(m, Router)]
    handles = [router.register_forward_hook(drop) for router in routers]
    try:
        changed = Trained(trained.model, {})
        evaluate(changed, domains, recipe)
    finally:
        for handle in handles:
            handle.remove()
    return changed.loss


def loss_without_shared_expert(
    trained: Trained, domains: Sequence[Domain], recipe: Recipe
) -> float:
    """Held-out loss without the shared expert and with one more routed one."""
    layers = [block.mlp for block in trained.model.layers]
    shared = [layer.shared_experts for layer in layers]
    try:
        for layer in layers:
            layer.shared_experts = None
            layer.router.top_k += 1
        changed = Trained(trained.model, {})
        evaluate(changed, domains, recipe)
    finally:
        for layer, module in zip(layers, shared, strict=True):
            layer.shared_experts = module
            layer.router.top_k -= 1
    return changed.loss


if __name__ == "__main__":
    command.main("deepseek", run)
