"""Super experts: a planted one is found, and what the experts that are found are worth."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from moe_ops import surgery
from moe_ops.zoo.deepseek import DeepSeek

from .compare import Series
from .on_subject import Loaded, described, load
from .picture import Picture
from .study import Experiment, Headline, Hypothesis, Job, Results, Run, Study

CONTROLS = 3
PLACES = (0, 1, 2)  # Layers, each with the expert that BOS goes to.
SIZE, STEPS, RATE = 100.0, 200, 1e-4
PROFILED = 6  # Sequences of a domain.
SEED = "all arms of a seed"


def text(there: Loaded, seed: int, count: int = PROFILED) -> list[Tensor]:
    """Batches of all domains."""
    rows = [row for d in there.domains for t in there.profiled(d, seed, count) for row in t]
    return list(torch.stack(rows).split(8))


def natural(name: str) -> Job:
    """Every expert of the model zeroed, beside its largest output, by layer."""

    def perform(seed: int, run: Run) -> dict[str, Any]:
        there = load(name, seed, run)
        model, batches = there.model, text(there, seed)
        found = surgery.profile_experts(model, batches)
        costs = surgery.measure_ablation(
            model, [(n, e) for n, layer in found.layers.items() for e in range(layer.num_experts)],
            batches,
        )  # fmt: skip
        report = surgery.evaluate_super_experts(model, found, batches, controls=CONTROLS)
        within = []
        for layer_name, layer in found.layers.items():
            of_layer = torch.tensor([costs[layer_name, e] for e in range(layer.num_experts)])
            within.append(rank_correlation(layer.largest_output(), of_layer))
        sinks = torch.tensor(report.sinks)
        row = {
            "experts": float(len(report.experts)),
            "damage": fmean(report.damage) if report.damage else None,
            "rank correlation": fmean(within),
            "largest sink": float(sinks.max()),
            "decay": None if report.decay != report.decay else report.decay,
        }
        listed = {
            n: [costs[n, e] for e in range(layer.num_experts)] for n, layer in found.layers.items()
        }
        return {
            "rows": {"found": row},
            "damage": listed,
            "largest": report.largest,
            "report": report.to_dict() | {"decay": row["decay"]},
        }

    return perform


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def plant(model: DeepSeek, layer: str, tokens: Tensor, size: float) -> int:
    """Makes the expert that BOS goes to first in a layer write `size` into one channel there: one
    hidden neuron answers to the layer's input at BOS. Returns the expert."""
    seen: dict[str, Tensor] = {}
    (routed,) = surgery.find_routed_layers(model, [layer])

    def watcher(x: Tensor, routing: Any) -> None:
        seen.setdefault("x", x[0].clone())
        seen.setdefault("ids", routing.topk_ids[0, :1].clone())
        seen.setdefault("weight", routing.topk_weights[0, :1].clone())

    handles = routed.watch(watcher)
    with torch.no_grad():
        model(tokens[:1])
    for handle in handles:
        handle.remove()
    x, expert = seen["x"], int(seen["ids"])
    bank: Any = routed.experts
    width = bank.intermediate_size
    with torch.no_grad():
        # Gate and up are 8 at BOS, and far from it silu is near 0.
        direction = 8.0 * x / x.square().sum()
        bank.w_gate_up[expert, 0] = direction
        bank.w_gate_up[expert, width] = direction
        bank.w_down[expert, :, 0] = 0.0
        bank.w_down[expert, 0, 0] = size / 64.0
    return expert


def planted(name: str) -> Job:
    """One expert per model, in each of the first layers; then a short training around it."""

    def perform(seed: int, run: Run) -> dict[str, Any]:
        rows: dict[str, dict[str, float]] = {}
        places = {}
        for place in PLACES:
            there = load(name, seed, run)
            model, batches = there.model, text(there, seed)
            before = surgery.profile_experts(model, batches)
            layer = list(before)[place]
            usual = float(before[layer].largest_output().median())
            expert = plant(model, layer, batches[0], SIZE * usual)
            surgery.tune(model, text(there, seed + 1, 4 * PROFILED), STEPS, rate=RATE)
            model.eval()
            after = surgery.profile_experts(model, batches)
            found = surgery.find_super_experts(after)
            hits = [(one.layer, one.expert) for one in found.experts]
            controls = surgery.super_experts.matched_controls(after[layer], expert, CONTROLS)
            costs = surgery.measure_ablation(
                model, [(layer, e) for e in (expert, *controls)], batches
            )
            cost, *others = costs.values()
            largest = float(after[layer].largest_output()[expert])
            rows[f"layer {place}"] = {
                "found": float((layer, expert) in hits),
                "others": float(sum(hit != (layer, expert) for hit in hits)),
                "of the threshold": largest / found.threshold,
                "damage": cost,
                "of its controls'": cost / max(1e-6, *map(abs, others)),
            }
            places[layer] = hits
        first = next(iter(rows.values()))
        together = {name: fmean(row[name] for row in rows.values()) for name in first}
        return {"rows": {**rows, "all": together}, "places": places}

    return perform


def pictures(results: Results) -> list[Picture]:
    """Damage against the largest output, of all experts of all seeds."""
    points: Series = {}
    pairs = zip(results.every(SEED, "damage"), results.every(SEED, "largest"), strict=True)
    for damage, largest in pairs:
        for layer, of_layer in zip(damage, largest, strict=True):
            one = points.setdefault(layer.removesuffix(".mlp"), {"x": [], "y": []})
            one["x"] += of_layer
            one["y"] += damage[layer]
    title = "Loss added by zeroing an expert, against its largest output"
    return [Picture("damage", title, "max |output|", "nats a byte", "points", points)]


# Of 16 experts, trained on 8 MB: mean of four layers' correlations, and its standard error.
PILOT = "a pilot of one model, whose spread is a guess"


def study(name: str, size: str, rank: int, minutes: float, model: str) -> Study:
    hypotheses = [
        Hypothesis(
            "the model has a super expert",
            lambda r: r.of("found", "experts"), "experts", 0.99, False, key="natural",
        ),
        Hypothesis(
            "within a layer, the larger an expert's output the more it costs",
            lambda r: r.of("found", "rank correlation"), "", 0.0, False, key="rank",
            expected=0.24, deviation=0.13, pilot=PILOT,
        ),
        Hypothesis(
            "a head has a sink at BOS",
            lambda r: r.of("found", "largest sink"), "of attention", 0.3, False, key="sink",
            expected=0.02, deviation=0.02, pilot=PILOT,
        ),
    ]  # fmt: skip

    def made() -> dict[str, str]:
        return {
            **described(model),
            "Controls": f"the {CONTROLS} experts of the layer whose load is nearest",
            "Text": f"{PROFILED} sequences of each domain",
        }

    return Study(name, size, rank, {SEED: natural(model)}, 5, minutes, hypotheses, made, pictures)


def planted_study(name: str, size: str, rank: int, minutes: float, model: str) -> Study:
    hypotheses = [
        Hypothesis(
            "the planted expert is found",
            lambda r: r.of("all", "found"), "of all", 0.99, False, key="found",
        ),
        Hypothesis(
            "and nothing else", lambda r: r.of("all", "others"), "experts", 0.01, key="others",
        ),
        Hypothesis(
            "zeroing the planted expert costs more than 5 times the worst of its controls",
            lambda r: r.of("all", "of its controls'"), "times", 5.0, False, key="damage",
        ),
    ]  # fmt: skip

    def made() -> dict[str, str]:
        return {
            **described(model),
            "Planted": (
                f"in each of layers {', '.join(map(str, PLACES))}, a model each: the expert of BOS "
                f"writes {SIZE:g} times the median largest output into one channel; {STEPS} steps "
                "of training follow"
            ),
            "Controls": f"the {CONTROLS} experts of the layer whose load is nearest",
            "Columns": (
                "found: whether the detector names the planted expert; others: what it names "
                "beside; of the threshold: the planted expert's largest output over what the "
                "detector asks for; damage: nats a byte that zeroing it adds, also over the "
                "largest of its controls"
            ),
        }

    return Study(name, size, rank, {SEED: planted(model)}, 5, minutes, hypotheses, made)


EXPERIMENT = Experiment(
    "super_experts",
    (
        planted_study("super_experts-planted", "planted", 43, 6.0, "subject"),
        study("super_experts-subject", "16 experts", 44, 4.0, "subject"),
    ),
    (
        Headline(
            "found", "a planted super expert is found", "3 of 6144 in Qwen3-30B-A3B", "mechanism",
            not_shown="in 4 of 15 places the training that follows takes the large output back",
        ),
        Headline("others", "and nothing else", "random experts cost nothing", "mechanism"),
        Headline(
            "natural", "a trained model has some", "1 of 256 in Mixtral, 3 of 6144 in Qwen3",
            "mechanism", contradicted="the largest outputs are those of the last layer",
        ),
        Headline(
            "damage", "a super expert costs 5 times its controls",
            "perplexity 8.7 to 59.9 without 3 of 6144", "quality",
            untestable="these models have no super experts and no attention sinks, and a planted "
            "large output is at a token that attention does not use; a model with both, such as "
            "Mixtral, would test it",
        ),
        Headline(
            "rank", "the size of outputs tells what an expert is worth", "not compared",
            "mechanism", shown="a little, and within a layer alone",
        ),
        Headline(
            "sink", "sinks form", "they decay by 0.9 without super experts", "mechanism",
            contradicted="likely: a model of 4 layers needs none",
        ),
    ),
)  # fmt: skip
