"""`moe-ops prune`: writes a checkpoint with fewer experts per layer, and measures the cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import moe_ops.hf  # noqa: F401
from moe_ops import surgery
from moe_ops.cli import checkpoints

REPORT_NAME = "moe_ops_pruning.json"
# Merging methods; other names are criteria for dropping experts.
MERGES = ("uncurl", "hc_smoe")
_TUNE_BATCH = 4


@dataclass(frozen=True)
class PruneOptions:
    source: Path
    target: Path
    text: Path
    keep: int | float
    by: str = "reap"
    groups: str = "drop"
    tokens: int = 16384
    context: int = 512
    tune: int = 0
    overwrite: bool = False


def run(options: PruneOptions, console: Console) -> dict[str, Any]:
    """Prunes `source` into `target`; returns the report that it also writes there.

    Raises:
        ValueError: invalid options or checkpoint.
        OSError: the target could not be written; its contents are unchanged.
    """
    if options.by not in (*surgery.criteria.CRITERIA, *MERGES):
        known = ", ".join((*surgery.criteria.CRITERIA, *MERGES))
        raise ValueError(f"prune: --by must be one of {known}, got {options.by}.")
    source, context = options.source, options.context
    checkpoints.check_folders(
        "prune", source, options.target, overwrite=options.overwrite, target_name="--out"
    )
    seen, judging = checkpoints.read_text("prune", source, options.text, options.tokens)
    started = time.perf_counter()
    model = checkpoints.load_model("prune", source)
    layers = surgery.find_routed_layers(model, caller="prune")
    if options.by not in MERGES:  # Before the text is read, which may take long.
        for layer in layers:
            surgery.criteria.number_to_keep(
                options.keep, layer.num_experts, layer.top_k, "prune: --keep"
            )
    before, size = checkpoints.perplexity(model, judging, context), checkpoints.size_of(model)
    console.print(f"Looking at {seen.numel()} tokens in {len(layers)} layers.")
    found = surgery.profile_experts(
        model, checkpoints.batches(seen, context), all_outputs=options.by == "hc_smoe"
    )
    kept = _change(model, found, options)
    result: dict[str, Any] = {
        "source": source.name,
        "by": options.by,
        "experts": {layer.name: layer.num_experts for layer in layers},
        "kept": kept,
        "model_bytes_before": size,
        "model_bytes_after": checkpoints.size_of(model),
        "num_tokens": judging.numel(),
        "perplexity_before": before,
        "perplexity_after": checkpoints.perplexity(model, judging, context),
    }
    if options.tune:
        console.print(f"Training {options.tune} steps.")
        pieces = [p["input_ids"] for p in checkpoints.batches(seen, context)]
        whole = [piece[0] for piece in pieces if piece.shape[1] == pieces[0].shape[1]]
        surgery.tune(model, torch.stack(whole).split(_TUNE_BATCH), options.tune)
        result["tuning_steps"] = options.tune
        result["perplexity_tuned"] = checkpoints.perplexity(model, judging, context)
    result["seconds"] = time.perf_counter() - started
    checkpoints.write_model(
        "prune", model, source, options.target, REPORT_NAME, result, target_name="--out"
    )
    after = result["model_bytes_after"]
    tuned = f", tuned {result['perplexity_tuned']:.4g}" if options.tune else ""
    console.print(
        f"The whole model: {size / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB; perplexity on "
        f"{judging.numel()} other tokens {before:.4g} -> {result['perplexity_after']:.4g}{tuned}.\n"
        f"transformers loads it as any other checkpoint, without moe_ops.",
        markup=False,
        soft_wrap=True,
    )
    return result


def _change(model: Any, found: surgery.ExpertProfile, options: PruneOptions) -> dict[str, Any]:
    """Drops or merges experts; returns the remaining ids, or groups of ids, of each layer."""
    if options.by in MERGES:
        if options.groups != "drop":
            raise ValueError(
                f"prune: --groups must be drop with --by {options.by}, got {options.groups}."
            )
        count = options.keep
        if isinstance(count, float):
            count = max(1, round(count * next(iter(found.layers.values())).num_experts))
        group = surgery.uncurl_groups if options.by == "uncurl" else surgery.hc_smoe_groups
        groups = group(found, count)
        order = surgery.align_neurons(model, groups)
        load = {name: layer.load for name, layer in found.layers.items()}
        surgery.merge_experts(model, groups, weights=load, neuron_order=order)
        return groups
    scores = surgery.score_experts(found, options.by)
    kept = surgery.select_experts(model, scores, options.keep, groups=options.groups)
    surgery.prune_experts(model, kept)
    return kept
