"""Report of the routing of a trained model on a text, as one HTML file that needs no network.

It shows expert loads by layer, the experts of each token, the routers' confidence, experts selected
together, experts without tokens, and two checkpoints side by side.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops import _files
from moe_ops._eval_mode import call_model, in_eval
from moe_ops.layers import ExpertLoadStats
from moe_ops.surgery.routed_layers import find_routed_layers

# Maximum number of tokens shown individually, and of experts for which pairs are shown.
MAX_TOKENS = 1024
MAX_PAIRS = 128


@dataclass
class _Layer:
    """Sums over the tokens that a layer has routed."""

    num_experts: int
    top_k: int
    together: Tensor
    tokens: int = 0
    entropy: float = 0.0
    ids: list[list[int]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)

    def add(self, logits: Tensor | None, weights: Tensor, ids: Tensor) -> None:
        member = torch.zeros(len(ids), self.num_experts + 1, dtype=torch.float64)
        ids, weights = ids.cpu().long(), weights.cpu().double()
        member.scatter_(1, torch.where(ids < 0, self.num_experts, ids), 1.0)
        member = member[:, :-1]
        self.together += member.T @ member
        self.tokens += len(ids)
        if logits is not None:
            p = torch.softmax(logits.double(), -1)
            self.entropy += -torch.special.xlogy(p, p).sum().item()
        room = MAX_TOKENS - len(self.ids)
        self.ids += ids[:room].tolist()
        self.weights += [[round(w, 4) for w in row] for row in weights[:room].tolist()]

    def to_dict(self, name: str, measures: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the layer's data. measures: the layer's entry of `ExpertLoadStats.as_dict`."""
        pairs = self.together if self.num_experts <= MAX_PAIRS else self.together[:0]
        return {
            "name": name,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "tokens": self.tokens,
            "load": measures["tokens_per_expert"],
            "max_violation": measures["max_violation"],
            "dead": measures["dead_experts"],
            "entropy": self.entropy / max(self.tokens, 1),
            "together": pairs.long().tolist(),
            "ids": self.ids,
            "weights": self.weights,
        }


@torch.no_grad()
def routing_data(model: nn.Module, batches: Iterable[Any]) -> list[dict[str, Any]]:
    """Returns the data of one model for `routing_page`: a dict of plain values per layer.

    Args:
        model: with layers of this package, of the zoo or of transformers (see
            `moe_ops.surgery.find_routed_layers`); float or quantized experts. It runs in eval mode.
        batches: inputs of the model: each a tensor of tokens, a tuple of positional or a dict of
            keyword arguments.

    Raises:
        ValueError: no routed layer, or a layer without tokens.
    """
    layers = find_routed_layers(model, caller="routing_data")
    found: dict[str, _Layer] = {}
    stats = ExpertLoadStats()
    handles: list[Any] = []

    def watcher(layer: Any) -> Any:
        def watch(x: Tensor, routing: Any) -> None:
            seen = found.get(layer.name)
            if seen is None:
                e = layer.num_experts
                pairs = torch.zeros(e, e, dtype=torch.float64)
                seen = found[layer.name] = _Layer(e, routing.topk_ids.shape[1], pairs)
            stats.update(routing.topk_ids, layer.num_experts, layer=layer.name)
            seen.add(routing.router_logits, routing.topk_weights, routing.topk_ids)

        return watch

    try:
        for layer in layers:
            handles += layer.watch(watcher(layer))
        with in_eval(model):
            for batch in batches:
                call_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    missing = [layer.name for layer in layers if layer.name not in found]
    if missing:
        raise ValueError(
            f"routing_data: batches must reach every layer, got no token for {missing[0]}."
        )
    measured = stats.as_dict()
    return [found[layer.name].to_dict(layer.name, measured[layer.name]) for layer in layers]


def _check_alike(
    first: str, one: Sequence[Mapping[str, Any]], second: str, other: Sequence[Mapping[str, Any]]
) -> None:
    rule = "routing_page: models must have the same layers and experts and have read the same text"
    if len(one) != len(other):
        raise ValueError(f"{rule}, got {len(one)} layers in {first} and {len(other)} in {second}.")
    for a, b in zip(one, other, strict=True):
        for key, unit in (("num_experts", "experts"), ("tokens", "tokens")):
            if a[key] != b[key]:
                raise ValueError(
                    f"{rule}, got {a[key]} {unit} in {first} and {b[key]} in {second}, in layer "
                    f"{a['name']!r}."
                )


def routing_page(
    models: Mapping[str, Sequence[Mapping[str, Any]]],
    tokens: Sequence[str],
    path: Path | str,
    *,
    title: str = "What the experts do",
) -> Path:
    """Writes a report of one model, or of two side by side, into one HTML file.

    Args:
        models: name -> its `routing_data`. The second is compared with the first: both must have
            equal numbers of layers and experts and have read the same text.
        tokens: the text of each token in the order of `batches`; the first 1,024 are shown.
        path: of the file.
        title: title of the page.

    Returns:
        `path`.

    Raises:
        ValueError: no model, more than two, or two that do not match.
    """
    if not 1 <= len(models) <= 2:
        raise ValueError(f"routing_page: models must be one or two, got {len(models)}.")
    (first, one), *others = models.items()
    for second, other in others:
        _check_alike(first, one, second, other)
    data = {
        "title": title,
        "tokens": list(tokens[:MAX_TOKENS]),
        "models": [{"name": name, "layers": list(layers)} for name, layers in models.items()],
    }
    template = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    # "<" in a token must not end the script with the data.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    _files.write_text(Path(path), template.replace("__DATA__", text))
    return Path(path)
