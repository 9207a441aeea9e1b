"""`moe-ops inspect`: writes a page about the experts of a checkpoint on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

import moe_ops.hf  # noqa: F401
from moe_ops.cli import checkpoints
from moe_ops.surgery.page import MAX_TOKENS, routing_data, routing_page


def run(
    source: Path,
    text: Path,
    out: Path,
    against: Path | None,
    tokens: int,
    context: int,
    console: Console,
) -> dict[str, Any]:
    """Writes the page of `source`, or of `against` and `source`; returns the measures of each
    layer.

    Raises:
        ValueError: an invalid checkpoint, text or pair of models.
    """
    ids, _, tokenizer = checkpoints.read_tokens("inspect", source, text, tokens)
    models: dict[str, Any] = {}
    for folder in (source,) if against is None else (against, source):
        if not (folder / "config.json").is_file():
            raise ValueError(f"inspect: a model must be a folder with a config.json, got {folder}.")
        model = checkpoints.load_model("inspect", folder)
        console.print(f"Looking at {ids.numel()} tokens in {folder.name}.", markup=False)
        name = folder.name if folder.name not in models else str(folder)
        models[name] = routing_data(model, checkpoints.batches(ids, context))
        del model
    # The text of each token; parts of a character are shown as such.
    texts = [str(tokenizer.decode([i])) for i in ids[:MAX_TOKENS].tolist()]
    routing_page(models, texts, out, title=f"Experts of {source.name}")
    console.print(f"Written: {out}", markup=False, soft_wrap=True)
    kept = ("name", "num_experts", "top_k", "tokens", "load", "max_violation", "dead", "entropy")
    return {name: [{k: one[k] for k in kept} for one in layers] for name, layers in models.items()}
