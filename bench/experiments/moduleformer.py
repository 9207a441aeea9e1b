"""ModuleFormer: informative routing, pruning after concentration, learning with added experts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from moe_ops.zoo.moduleformer import ModuleFormer, ModuleFormerConfig

from . import command
from .compare import Series, series
from .picture import Picture
from .report import Claim, Report
from .text import Domain, heldout_batches, load_domains
from .training import Recipe, Trained, evaluate, setting, train

BASE = ModuleFormerConfig(
    vocab_size=256,
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    attention_size=32,
    intermediate_size=64,
    num_attention_experts=4,
    num_mlp_experts=8,
    gate_size=32,
)
RECIPE = Recipe(steps=500, batch=9, rate=3e-3)
BALANCE = 0.1
CONCENTRATION = 0.1
# Shares of tokens below which experts go, and the rise of the loss that is allowed.
THRESHOLDS = (0.001, 0.003, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4)
LOSS_ALLOWED = 0.01


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
    told: dict[str, list[dict[str, float]]] = {}
    cuts: dict[str, list[list[tuple[float, float]]]] = {}

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
            told.setdefault(arm, []).append(layer_information(trained.model, domains, recipe))
            note(arm, trained, information=_mean(told[arm][-1].values()))
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
            cuts.setdefault(arm, []).append(pruned(tuned, domains[0], tuning))
            note(arm, tuned, pruned=allowed_share(cuts[arm][-1]))

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

    made = setting(domains, recipe, seeds)
    made["Data"] += f"; tuned to {domains[0].name}; new is {new.name}"
    made["Training"] += f"; {tuning.steps} steps of tuning"
    count = ModuleFormer(base).num_parameters()
    made["Model"] = (
        f"{count['total']:,} parameters, {count['active']:,} active; balance {BALANCE:g}, "
        f"concentration {CONCENTRATION:g}"
    )
    columns = [
        "held-out loss, nats a byte",
        "information, nats",
        "pruned",
        "forgotten, nats a byte",
    ]
    return Report(
        "moduleformer",
        made,
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
        pictures(told, cuts, measured),
    )


def pictures(
    told: Mapping[str, list[dict[str, float]]],
    cuts: Mapping[str, list[list[tuple[float, float]]]],
    measured: Mapping[str, list[float]],
) -> list[Picture]:
    """Information of each layer, loss against experts that went, learning against forgetting."""
    layers: Series = {
        arm: series(list(found[0]), [list(f.values()) for f in found])
        for arm, found in told.items()
    }
    points: Series = {}
    for arm, found in cuts.items():
        shares, rises = zip(*(point for points in found for point in points), strict=True)
        points[arm] = {"x": list(shares), "y": [100 * rise for rise in rises]}
    changes: Series = {}
    for arm in ("added experts", "all parameters"):
        gained, forgotten = measured[f"{arm} gained"], measured[f"{arm} forgotten"]
        rows = [[-g, f] for g, f in zip(gained, forgotten, strict=True)]
        changes[arm] = series(["new domain", "old domains"], rows)
    return [
        Picture(
            "information",
            "Mutual information of expert and domain",
            "",
            "nats",
            "bars",
            layers,
        ),
        Picture(
            "pruned",
            "Loss after pruning, of every seed and threshold",
            "share of experts that went",
            "rise of the held-out loss, %",
            "points",
            points,
        ),
        Picture(
            "forgotten",
            "Held-out loss after learning the new domain, against before",
            "",
            "difference, nats a byte",
            "bars",
            changes,
        ),
    ]


@torch.no_grad()
def layer_information(
    model: ModuleFormer, domains: Sequence[Domain], recipe: Recipe
) -> dict[str, float]:
    """Routed layer -> mutual information of expert and domain, from counts."""
    counts: dict[str, list[torch.Tensor]] = {}
    for domain in domains:
        batches = heldout_batches(domain, recipe.heldout_batches, recipe.batch, recipe.length)
        for layer, frequency in model.expert_frequencies(batches).items():
            counts.setdefault(layer, []).append(frequency)
    found = {}
    for layer, rows in counts.items():
        joint = torch.stack(rows)
        joint = joint / joint.sum()
        independent = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
        total = torch.xlogy(joint, joint) - torch.xlogy(joint, independent)
        found[layer.removeprefix("layers.")] = total.sum().item()
    return found


def pruned(trained: Trained, domain: Domain, recipe: Recipe) -> list[tuple[float, float]]:
    """For each threshold the share of experts that goes, and the rise of the domain's held-out loss
    as a share of it. Frequencies are of training text."""
    model = trained.model
    text = dataclasses.replace(domain, heldout=domain.train)
    batches = heldout_batches(text, recipe.heldout_batches, recipe.batch, recipe.length)
    frequencies = model.expert_frequencies(batches)
    total, found = sum(len(f) for f in frequencies.values()), []
    for threshold in THRESHOLDS:
        smaller = copy.deepcopy(model)
        kept = smaller.prune(frequencies, threshold)
        after = Trained(smaller, {})
        evaluate(after, [domain], recipe)
        share = 1 - sum(map(len, kept.values())) / total
        found.append((share, after.loss / trained.heldout[domain.name] - 1))
    return found


def allowed_share(cuts: Sequence[tuple[float, float]]) -> float:
    """The largest share of experts that goes at the allowed rise."""
    return max((share for share, rise in cuts if rise <= LOSS_ALLOWED), default=0.0)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


if __name__ == "__main__":
    command.main("moduleformer", run)
