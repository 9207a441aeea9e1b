"""``python -m bench.studies published --model ID``: methods for trained models, on a published one.

Super Experts, SCMoE, PreMoe, UNCURL and ExpertFlow run on one checkpoint and one text. The command
prints the cost first, and downloads weights and computes with ``--yes`` alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bench.harness.arguments import whole
from moe_ops import memory, surgery
from moe_ops._files import write_text
from moe_ops.cli import hub
from moe_ops.offload import BeladyPolicy, PredictivePolicy, train_predictor
from moe_ops.surgery.routed_layers import find_routed_layers

from .expertflow import hit_rate, routes_of
from .on_subject import among

# Checkpoints of language models with routed experts that transformers reads without remote code.
MODELS = {
    "allenai/OLMoE-1B-7B-0924": "olmoe",
    "Qwen/Qwen1.5-MoE-A2.7B": "qwen2_moe",
    "Qwen/Qwen3-30B-A3B": "qwen3_moe",
    "deepseek-ai/DeepSeek-V2-Lite": "deepseek_v2",
    "jetmoe/jetmoe-8b": "jetmoe",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral",
}
PART = 0.5  # Of the experts: kept by PreMoe and UNCURL, and of ExpertFlow's cache.
CONTROLS = 3  # Per super expert.
RANDOM = 3  # Draws of experts, as PreMoe's control.
PREDICTOR_STEPS = 600
# Passes over the profiling and the test text, without those of super experts: profiles with the
# experts' outputs compute these twice. The other passes: one over each ablated expert.
PROFILE_PASSES, TEST_PASSES = 3, 10


@dataclass(frozen=True)
class Cost:
    """The resources that a run needs.

    Attributes:
        download: bytes; 0 for a local folder.
        memory: bytes of the weights.
        active: parameters that a token uses; attention experts are all counted.
        tokens: of all passes, without ablated experts.
        seconds: of these passes at the measured speed of matrix multiplication.
    """

    download: int
    memory: int
    active: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        download, held, free = (
            f"{num_bytes / 2**30:.2f} GiB"
            for num_bytes in (self.download, self.memory, memory.available_memory())
        )
        return (
            f"download {download}, weights in memory {held} ({free} available), {self.tokens} "
            f"tokens with {self.active / 1e6:.1f} M active parameters each: at least "
            f"{self.seconds / 60:.1f} min on this machine, and for every super expert found up to "
            f"{1 + CONTROLS} more passes over the test text"
        )


def cost_of(model: str, rows: int, length: int, dtype: torch.dtype) -> Cost:
    """Returns the cost of a run; downloads only config.json."""
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(_config(model), dtype=dtype)
    layers = find_routed_layers(built, caller="published")
    if not layers:
        raise ValueError(f"published: --model must have routed experts, got {model}.")
    total = sum(p.numel() for p in built.parameters())
    unused = 0.0
    for layer in layers:
        held = sum(p.numel() for p in layer.experts.parameters()) if layer.experts else 0
        unused += held * (1 - layer.top_k / layer.num_experts)
    active = round(total - unused)
    tokens = rows * length * (PROFILE_PASSES + TEST_PASSES)
    num_bytes = total * dtype.itemsize
    return Cost(
        download=0 if Path(model).exists() else num_bytes,
        memory=num_bytes,
        active=active,
        tokens=tokens,
        seconds=2.0 * active * tokens / _speed(dtype),
    )


def _config(model: str) -> Any:
    return AutoConfig.from_pretrained(Path(hub.config_file("published", model)))


def _speed(dtype: torch.dtype, size: int = 512) -> float:
    """Returns the measured floating-point operations per second of matrix multiplication."""
    a = torch.randn(size, size).to(dtype)
    a @ a
    start, times = time.perf_counter(), 5
    for _ in range(times):
        a @ a
    return 2.0 * size**3 * times / (time.perf_counter() - start)


def batches_of(tokenizer: Any, text: str, rows: int, length: int) -> tuple[list[Tensor], ...]:
    """Returns profiling and test batches of one sequence each, alternating in the text.

    Raises:
        ValueError: the text has too few tokens.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    needed = 2 * rows * length
    if len(ids) < needed:
        raise ValueError(f"published: --text must have {needed} tokens, got {len(ids)}.")
    cut = torch.tensor(ids[:needed]).view(2 * rows, 1, length)
    return list(cut[0::2]), list(cut[1::2])


@torch.no_grad()
def measure(model: nn.Module, profiled: list[Tensor], tested: list[Tensor], seed: int) -> Any:
    """Returns the numbers of all methods, by method. The model is pruned at the end.

    Args:
        model: a language model of transformers or of the zoo, in eval mode.
        profiled, tested: batches [1, S] of tokens, with at least two tokens each.
        seed: of the predictor, the clusters and the random experts.
    """
    profile = surgery.profile_experts(model, profiled, all_outputs=True)
    report = surgery.evaluate_super_experts(model, profile, tested, controls=CONTROLS, sinks=False)
    found = {
        "super_experts": {
            "experts": len(report.experts),
            "loss": report.loss,
            "loss without them": report.without,
            "damage of one": report.damage,
            "damage of a matched one": [fmean(c) for c in report.control_damage if c],
        },
        "scmoe": contrasted(model, tested),
        "premoe": pruned(model, profile, tested, report.loss, seed),
        "expertflow": cached(model, profiled, tested, seed),
    }
    return {**found, "uncurl": merged(model, profile, tested, report.loss, seed)}


def contrasted(model: nn.Module, tested: Sequence[Tensor]) -> dict[str, float]:
    """Accuracies of the next token: of the model, of its second-ranked experts, and contrasted."""
    hits, count = {"model": 0, "weak": 0, "contrasted": 0}, 0
    for tokens in tested:
        strong = _logits(model, tokens)
        with surgery.override_routing(model, surgery.rules.rank(2), renormalize=True):
            weak = _logits(model, tokens)
        both = surgery.self_contrast.contrast(strong, weak)
        for arm, logits in zip(hits, (strong, weak, both), strict=True):
            hits[arm] += int((logits[:, :-1].argmax(-1) == tokens[:, 1:]).sum())
        count += tokens[:, 1:].numel()
    return {f"accuracy, {arm}": hit / count for arm, hit in hits.items()}


def _logits(model: Any, tokens: Tensor) -> Tensor:
    output = model(tokens)
    logits: Tensor = getattr(output, "logits", output)
    return logits.float()


def pruned(
    model: nn.Module,
    profile: surgery.ExpertProfile,
    tested: Sequence[Tensor],
    before: float,
    seed: int,
) -> dict[str, float]:
    """Losses added with half the experts: by PreMoe's criterion, by others, and random ones."""

    def cost(scores: Mapping[str, Tensor]) -> float:
        with among(model, surgery.select_experts(model, scores, PART)):
            return surgery.super_experts.mean_loss(model, tested) - before

    found = {by: cost(surgery.score_experts(profile, by)) for by in ("tcess", "gate_norm")}
    generator = torch.Generator().manual_seed(seed)
    draws = [
        {n: torch.rand(of.num_experts, generator=generator) for n, of in profile.layers.items()}
        for _ in range(RANDOM)
    ]
    return {**found, "random": fmean(cost(draw) for draw in draws)}


def merged(
    model: nn.Module,
    profile: surgery.ExpertProfile,
    tested: Sequence[Tensor],
    before: float,
    seed: int,
) -> dict[str, float]:
    """Losses added with half the experts: the most frequent ones kept, or UNCURL's groups merged
    (in place, so that no second copy is needed)."""
    keep = surgery.select_experts(model, surgery.score_experts(profile, "frequency"), PART)
    with among(model, keep):
        dropped = surgery.super_experts.mean_loss(model, tested) - before
    number = len(next(iter(keep.values())))
    groups = surgery.uncurl_groups(profile, number, seed=seed)
    load = {name: layer.load for name, layer in profile.layers.items()}
    order = surgery.align_neurons(model, groups)
    surgery.merge_experts(model, groups, weights=load, neuron_order=order)
    after = surgery.super_experts.mean_loss(model, tested) - before
    return {"frequent ones kept": dropped, "merged": after}


def cached(
    model: nn.Module, profiled: list[Tensor], tested: list[Tensor], seed: int
) -> dict[str, float]:
    """Hit rates of a cache of half the experts; the test text is decoded one sequence at a time."""
    config: Any = model.config
    with torch.enable_grad():
        trace = routes_of(model, profiled)
        predictor = train_predictor(trace, config.vocab_size, steps=PREDICTOR_STEPS, seed=seed)
    test = routes_of(model, tested)
    steps = torch.ones(len(test.tokens), 2, dtype=test.steps.dtype)
    test = type(test)(test.ids, test.tokens, steps, test.banks, test.num_experts)
    top_k = test.ids.shape[2]
    return {
        "LRU": hit_rate(test, PART, "lru", 0),
        "predicted": hit_rate(test, PART, PredictivePolicy(predictor.stream()), top_k),
        "optimum": hit_rate(test, PART, BeladyPolicy(test), top_k),
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.studies published",
        description="Runs Super Experts, SCMoE, PreMoe, UNCURL and ExpertFlow on a trained "
        f"checkpoint. Known ids: {', '.join(MODELS)}.",
    )
    parser.add_argument("--model", required=True, help="id on the Hugging Face hub, or a folder")
    parser.add_argument("--text", required=True, type=Path, help="UTF-8 text of about one domain")
    parser.add_argument("--rows", type=whole(1, 10**6), default=16, help="sequences, twice (16)")
    parser.add_argument("--length", type=whole(2, 10**6), default=512, help="tokens of one (512)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=whole(0, 10**9), default=0)
    parser.add_argument("--json", type=Path, help="also writes the numbers to this file")
    parser.add_argument("--yes", action="store_true", help="download and compute")
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    print(f"{options.model}: {cost_of(options.model, options.rows, options.length, dtype)}.")
    if not options.yes:
        print("Nothing was run: add --yes to start.")
        return 0
    folder = hub.local_folder("published", Path(options.model), "--model")
    text = options.text.read_text("utf-8")
    batches = batches_of(AutoTokenizer.from_pretrained(folder), text, options.rows, options.length)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    found = measure(model, *batches, seed=options.seed)
    print(json.dumps(found, indent=1))
    if options.json:
        write_text(options.json, json.dumps(found, indent=1) + "\n")
    return 0
