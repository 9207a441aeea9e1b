"""Dynamic top-p routing against top-2 of the same experts, with and without its entropy loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops.zoo.deepseek import DeepSeek, DeepSeekConfig
from moe_ops.zoo.lm.model import CausalLM, LMLoss
from moe_ops.zoo.topp import TopP, TopPConfig, experts_per_token

from . import command
from .compare import over_steps, series
from .picture import Picture
from .report import Claim, Report
from .text import Domain, heldout_batches, load_domains
from .training import Recipe, Trained, setting, train

# The entropy loss has a larger coefficient than in training of a hundred thousand steps.
BASE = TopPConfig(
    hidden_size=64, num_layers=2, intermediate_size=64, top_p=0.4, entropy_coefficient=1e-2
)
RECIPE = Recipe(steps=500, batch=9, rate=3e-3)
LOSS_TOLERANCE = 0.01
PARTS = 10


def top_two(config: TopPConfig) -> DeepSeekConfig:
    """The same trunk and experts with the 2 likeliest experts for every token."""
    return DeepSeekConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_dense_layers=0,
        num_heads=config.num_heads,
        latent=False,
        head_size=config.hidden_size // config.num_heads,
        rope_interleaved=False,
        intermediate_size=config.intermediate_size,
        num_experts=config.num_experts,
        top_k=2,
        num_shared_experts=0,
        expert_balance_coefficient=config.load_balancing_coefficient,
    )


def run(
    seeds: Sequence[int],
    log: Callable[[str], None],
    base: TopPConfig = BASE,
    recipe: Recipe = RECIPE,
) -> Report:
    """The experiment."""
    domains = load_domains()
    arms: dict[str, Callable[[], CausalLM]] = {
        "top-2": lambda: DeepSeek(top_two(base)),
        "top-p": lambda: TopP(base),
        "top-p, no entropy loss": lambda: TopP(dataclasses.replace(base, entropy_coefficient=0.0)),
    }
    results: dict[str, list[Trained]] = {arm: [] for arm in arms}
    used: dict[str, list[float]] = {arm: [] for arm in arms}
    harder: list[float] = []
    of_parts: list[list[float]] = []
    for seed in seeds:
        for arm, make in arms.items():
            trained = train(make, domains, recipe, seed, watch=step_experts)
            results[arm].append(trained)
            losses, experts = by_token(trained.model, domains, recipe)
            used[arm].append(experts.mean().item())
            if arm == "top-p":
                harder.append(rank_correlation(losses, experts))
                of_parts.append(by_difficulty(losses, experts))
            log(
                f"seed {seed}, {arm}: {trained.loss:.4f} nats a byte, {used[arm][-1]:.2f} experts, "
                f"{trained.seconds:.0f} s"
            )
    made = setting(domains, recipe, seeds)
    made["Model"] = (
        f"p = {base.top_p:g}, {base.num_experts} experts, balance "
        f"{base.load_balancing_coefficient:g}, entropy {base.entropy_coefficient:g}; "
        f"{TopP(base).num_parameters()['total']:,} parameters in all arms"
    )
    report = Report("topp", made, ["held-out loss, nats a byte", "experts a token", "MaxVio"])
    for arm, found in results.items():
        report.arms[arm] = [
            (t.loss, n, t.max_violation) for t, n in zip(found, used[arm], strict=True)
        ]
    pairs = list(zip(results["top-p"], results["top-2"], strict=True))
    report.claims = [
        Claim("top-p uses fewer than 2 experts a token", used["top-p"], "experts", bound=2.0),
        Claim(
            f"its loss is at most {LOSS_TOLERANCE:g} above that of top-2",
            [a.loss - b.loss for a, b in pairs],
            "nats a byte",
            bound=LOSS_TOLERANCE,
        ),
        Claim("harder tokens use more experts (rank correlation)", harder, "", below=False),
        Claim(
            "the entropy loss lowers the number of experts",
            [a - b for a, b in zip(used["top-p"], used["top-p, no entropy loss"], strict=True)],
            "experts",
        ),
    ]
    report.pictures = [
        Picture(
            "difficulty",
            "Experts a token of top-p, held-out tokens ordered by the loss of the next byte",
            "tenth of the tokens, easy to hard",
            "experts, mean of layers",
            "lines",
            {"": series(range(1, PARTS + 1), of_parts)},
        ),
        Picture(
            "experts",
            "Experts a token during training",
            "step",
            "experts, mean of layers",
            "lines",
            over_steps(
                {arm: [t.watched for t in found] for arm, found in results.items()},
                max(1, recipe.steps // 50),
            ),
        ),
    ]
    return report


def step_experts(out: LMLoss) -> float:
    """To watch: experts a token, the mean over layers."""
    counts = torch.stack(list(experts_per_token(out.routing).values()))
    return counts.double().mean().item()


def by_difficulty(losses: Tensor, experts: Tensor) -> list[float]:
    """Mean experts of each tenth of the tokens, in the order of their losses."""
    return [part.mean().item() for part in experts[losses.argsort()].tensor_split(PARTS)]


@torch.no_grad()
def by_token(model: CausalLM, domains: Sequence[Domain], recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Of every held-out token: the loss of the byte after it, and its experts a layer (mean)."""
    model.eval()
    losses, experts = [], []
    for domain in domains:
        for tokens in heldout_batches(domain, recipe.heldout_batches, recipe.batch, recipe.length):
            out = model(tokens[:, :-1], return_routing=True)
            targets = tokens[:, 1:].flatten()
            losses.append(F.cross_entropy(out.logits.flatten(0, 1), targets, reduction="none"))
            counts = torch.stack(list(experts_per_token(out.routing).values()))
            experts.append(counts.double().mean(0))
    return torch.cat(losses), torch.cat(experts)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: the correlation of ranks, equal values sharing their mean rank."""

    def ranks(t: Tensor) -> Tensor:
        _, inverse, counts = t.unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0).double()
        return (last - (counts - 1) / 2)[inverse]

    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


if __name__ == "__main__":
    command.main("topp", run)
