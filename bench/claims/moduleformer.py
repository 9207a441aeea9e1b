"""ModuleFormer: informative routing, pruning after concentration, learning with added experts."""

from __future__ import annotations

import copy
import dataclasses
import platform
from collections.abc import Callable, Mapping, Sequence

import torch

from moe_ops.zoo.moduleformer import ModuleFormer, ModuleFormerConfig

from .report import Claim, Report
from .text import Domain, heldout_batches, load_domains
from .training import Recipe, Trained, evaluate, train

BASE = ModuleFormerConfig(
    vocab_size=256,
    hidden_size=128,
    num_layers=3,
    num_heads=2,
    attention_size=64,
    intermediate_size=128,
    num_attention_experts=4,
    num_mlp_experts=8,
    gate_size=64,
)
RECIPE = Recipe(steps=200)
BALANCE = 0.01
CONCENTRATION = 0.1
# Shares of tokens below which experts go; the largest that costs at most this much is taken.
THRESHOLDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3)
LOSS_ALLOWED = 1.01


def run(
    seeds: Sequence[int],
    log: Callable[[str], None],
    base: ModuleFormerConfig = BASE,
    recipe: Recipe = RECIPE,
) -> Report:
    """The experiment. The domain that is fine-tuned to is the first; the new one is the last."""
    domains = load_domains()
    *old, new = domains
    tuning = dataclasses.replace(recipe, steps=max(1, recipe.steps // 2))
    numbers: dict[str, list[list[float | None]]] = {}
    measured: dict[str, list[float]] = {}

    def note(arm: str, trained: Trained, **more: float) -> None:
        row = [trained.loss, more.get("information"), more.get("pruned"), more.get("forgotten")]
        numbers.setdefault(arm, []).append(row)
        for name, value in more.items():
            measured.setdefault(f"{arm} {name}", []).append(value)
        log(
            f"{arm}: {trained.loss:.4f} nats a byte, "
            + str({k: f"{v:.3f}" for k, v in more.items()})
        )

    for seed in seeds:
        losses = {"mutual information": "mutual_information", "balance": "load_balancing"}
        for arm, name in losses.items():
            coefficients = {name: BALANCE}
            trained = train(
                lambda: ModuleFormer(base), domains, recipe, seed, coefficients=coefficients
            )
            note(arm, trained, information=information(trained.model, domains, recipe))
            if arm == "mutual information":
                pretrained = trained.model
        for arm, strength in (("concentrated", CONCENTRATION), ("plainly tuned", 0.0)):
            tuned = train(
                lambda pretrained=pretrained: copy.deepcopy(pretrained),
                domains[:1],
                tuning,
                seed,
                coefficients={"concentration": strength},
            )
            note(arm, tuned, pruned=pruned_share(tuned, domains[0], tuning))

        first = train(
            lambda: ModuleFormer(base),
            old,
            recipe,
            seed,
            coefficients={"mutual_information": BALANCE},
        )
        before = first.loss
        for arm in ("added experts", "all parameters"):
            model = copy.deepcopy(first.model)
            if arm == "added experts":
                model.insert_experts(attention=1, mlp=2)
            taught = train(
                lambda model=model: model,
                [new],
                tuning,
                seed,
                coefficients={"mutual_information": 0.0},
                prepare=lambda m, optimizer: m.hold_frozen(optimizer),
            )
            again = Trained(taught.model, {})
            evaluate(again, old, recipe)
            start = Trained(first.model, {})
            evaluate(start, [new], recipe)
            note(arm, taught, forgotten=again.loss - before, gained=start.loss - taught.loss)

    def difference(a: str, b: str) -> list[float]:
        return [x - y for x, y in zip(measured[a], measured[b], strict=True)]

    setting: Mapping[str, str] = {
        "Data": f"bytes of {', '.join(d.name for d in domains)}, equal shares, the last tenth of "
        f"each held out; tuned to {domains[0].name}; new is {new.name}",
        "Training": f"{recipe}; {tuning.steps} steps of tuning",
        "Model": f"{ModuleFormer(base).num_parameters()['total']:,} parameters, "
        f"{ModuleFormer(base).num_parameters()['active']:,} active; balance {BALANCE:g}, "
        f"concentration {CONCENTRATION:g}",
        "Seeds": ", ".join(map(str, seeds)),
        "Machine": f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
    }
    columns = [
        "held-out loss, nats a byte",
        "information, nats",
        "pruned",
        "forgotten, nats a byte",
    ]
    return Report(
        "moduleformer",
        setting,
        columns,
        dict(numbers),
        [
            Claim(
                "experts tell more about the domain with the mutual-information loss",
                difference("mutual information information", "balance information"),
                "nats",
                below=False,
            ),
            Claim(
                "concentration lets a larger share of experts go at 1 % of loss",
                difference("concentrated pruned", "plainly tuned pruned"),
                "of all",
                below=False,
            ),
            Claim(
                "added experts learn the new domain",
                measured["added experts gained"],
                "nats a byte",
                below=False,
            ),
            Claim(
                "they forget less than tuning everything",
                difference("added experts forgotten", "all parameters forgotten"),
                "nats a byte",
            ),
        ],
    )


@torch.no_grad()
def information(model: ModuleFormer, domains: Sequence[Domain], recipe: Recipe) -> float:
    """Mutual information of expert and domain, from counts; the mean over routed layers."""
    counts: dict[str, list[torch.Tensor]] = {}
    for domain in domains:
        batches = heldout_batches(domain, recipe.heldout_batches, recipe.batch, recipe.length)
        for layer, frequency in model.expert_frequencies(batches).items():
            counts.setdefault(layer, []).append(frequency)
    found = []
    for rows in counts.values():
        joint = torch.stack(rows)
        joint = joint / joint.sum()
        independent = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
        found.append((torch.xlogy(joint, joint) - torch.xlogy(joint, independent)).sum())
    return torch.stack(found).mean().item()


def pruned_share(trained: Trained, domain: Domain, recipe: Recipe) -> float:
    """Largest share of experts that can go at the allowed rise of the domain's loss. Frequencies
    are of training text, the loss is of the held-out one."""
    model = trained.model
    text = dataclasses.replace(domain, heldout=domain.train)
    batches = heldout_batches(text, recipe.heldout_batches, recipe.batch, recipe.length)
    frequencies = model.expert_frequencies(batches)
    total, best = sum(len(f) for f in frequencies.values()), 0.0
    for threshold in THRESHOLDS:
        smaller = copy.deepcopy(model)
        kept = smaller.prune(frequencies, threshold)
        after = Trained(smaller, {})
        evaluate(after, [domain], recipe)
        if after.loss <= LOSS_ALLOWED * trained.heldout[domain.name]:
            best = max(best, 1 - sum(map(len, kept.values())) / total)
    return best
