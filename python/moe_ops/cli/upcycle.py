"""`moe-ops upcycle`: converts dense checkpoints to a mixture-of-experts checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moe_ops import upcycle
from moe_ops.cli import checkpoints

REPORT_NAME = "moe_ops_upcycling.json"
# Number of tokens on which the model is compared with the dense one.
_COMPARED = 32
# Maximum difference of logits, see `_difference`, from rounding; the second is for half precision.
_ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-3}
_HALF_ROUNDING = 0.1


@dataclass(frozen=True)
class UpcycleOptions:
    sources: tuple[Path, ...]
    target: Path
    experts: int
    top_k: int
    slices: int = 1
    clusters: str = "contiguous"
    noise: float = 0.0
    drop: float = 0.0
    text: Path | None = None
    tokens: int = 16384
    context: int = 512
    seed: int = 0
    overwrite: bool = False


def run(options: UpcycleOptions, console: Console) -> dict[str, Any]:
    """Upcycles `sources` into `target`; returns the report that it also writes there.

    Raises:
        ValueError: invalid options or checkpoint, or a result that differs from the dense model
            although it must not.
        OSError: the target could not be written; its contents are unchanged.
    """
    sources, first = options.sources, options.sources[0]
    for source in sources:
        checkpoints.check_folders(
            "upcycle", source, options.target, overwrite=options.overwrite, target_name="--out"
        )
    seen = judging = None
    if options.text is not None:
        seen, judging = checkpoints.read_text("upcycle", first, options.text, options.tokens)
    elif options.clusters == "coactivation":
        raise ValueError("upcycle: --text must be given with --clusters coactivation, got none.")
    started = time.perf_counter()
    models = [checkpoints.load_model("upcycle", source) for source in sources]
    model = upcycle.upcycle_model(
        models,
        options.experts,
        options.top_k,
        num_slices=options.slices,
        clusters=options.clusters,
        batches=() if seen is None else checkpoints.batches(seen, options.context),
        noise=options.noise,
        ratio=options.drop,
        seed=options.seed,
    )
    exact = upcycle.layer.preserves(
        len(sources),
        options.top_k,
        num_slices=options.slices,
        noise=options.noise,
        ratio=options.drop,
    )
    difference = _difference(models[0], model, options.seed)
    # Logits of half-precision routers sometimes tie between two copies, of which torch's top-k then
    # selects some slices each.
    may_tie = options.slices > 1 and model.dtype not in _ROUNDING
    bound = _ROUNDING.get(model.dtype, _HALF_ROUNDING)
    if exact and not may_tie and not difference <= bound:
        raise ValueError(
            "upcycle: the result must equal the dense model to rounding, got logits that differ by "
            f"{difference:.3g} standard deviations; {type(model).__name__} lacks something that "
            f"{type(models[0]).__name__} has."
        )
    result: dict[str, Any] = {
        "sources": [source.name for source in sources],
        "model_type": model.config.model_type,
        "experts": options.experts,
        "top_k": options.top_k,
        "slices": options.slices,
        "clusters": options.clusters,
        "noise": options.noise,
        "drop": options.drop,
        "seed": options.seed,
        "starts_as_the_dense_model": exact,
        "logit_difference": difference,
        "model_bytes_before": checkpoints.size_of(models[0]),
        "model_bytes_after": checkpoints.size_of(model),
    }
    if judging is not None:
        result["num_tokens"] = judging.numel()
        before = [checkpoints.perplexity(m, judging, options.context) for m in models]
        result["perplexity_before"] = before
        result["perplexity_after"] = checkpoints.perplexity(model, judging, options.context)
    result["seconds"] = time.perf_counter() - started
    checkpoints.write_model(
        "upcycle", model, first, options.target, REPORT_NAME, result, target_name="--out"
    )
    console.print(_summary(result), markup=False, soft_wrap=True)
    return result


def _summary(result: dict[str, Any]) -> str:
    before, after = result["model_bytes_before"], result["model_bytes_after"]
    lines = [
        f"{result['model_type']} with {result['experts']} experts, {result['top_k']} a token: "
        f"{before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB.",
        f"Logits differ from the dense model's by {result['logit_difference']:.3g} standard "
        f"deviations{', which is rounding' * result['starts_as_the_dense_model']}.",
    ]
    if "perplexity_after" in result:
        dense = ", ".join(f"{p:.4g}" for p in result["perplexity_before"])
        lines.append(
            f"Perplexity on {result['num_tokens']} tokens {dense} -> "
            f"{result['perplexity_after']:.4g}."
        )
    lines.append("transformers loads it as any other checkpoint, without moe_ops.")
    return "\n".join(lines)


@torch.no_grad()
def _difference(dense: Any, model: Any, seed: int) -> float:
    """Computes the root mean square of the difference of logits on random tokens, in standard
    deviations of the logits."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(dense.config.vocab_size, (1, _COMPARED), generator=generator)
    expected = checkpoints.forward(dense, ids).logits.double()
    got = checkpoints.forward(model, ids).logits.double()
    return float((got - expected).square().mean().sqrt() / expected.std().clamp(min=1e-30))
