"""Attention sinks and massive activations, which super experts are claimed to cause.

Letters: B sequences, S tokens per sequence, H hidden size, n heads, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_ops._eval_mode import in_eval
from moe_ops.layers.self_attention import Attention, LatentAttention

_LISTS = ("layers", "blocks", "h")


@torch.no_grad()
def attention_sink_mass(
    model: nn.Module, tokens: Tensor, positions: Sequence[int] = (0,)
) -> Tensor:
    """Computes the attention mass on some positions, such as the first one.

    Args:
        model: a language model of the zoo with `Attention` or `LatentAttention`, or one of
            transformers, which runs with its eager attention.
        tokens: [B, S], S larger than the positions.
        positions: of the keys.

    Returns:
        [L, n] fp64: total probability on the positions, averaged over sequences and over the
        queries after the last position.

    Raises:
        ValueError: no supported attention in the model, or positions without later queries.
    """
    last = max(positions)
    if tokens.dim() != 2 or not 0 <= min(positions) <= last < tokens.shape[1] - 1:
        raise ValueError(
            f"attention_sink_mass: tokens must be [B, S] with S - 1 > positions {list(positions)}, "
            f"got shape {list(tokens.shape)}."
        )
    columns = torch.tensor(list(positions), device=tokens.device)
    layers = []
    with in_eval(model):
        for probabilities in _attention_of(model, tokens):
            on_them = probabilities[:, :, last + 1 :].index_select(-1, columns).sum(-1)
            layers.append(on_them.double().mean((0, 2)).cpu())
    return torch.stack(layers)


def attention_sink_decay(before: Tensor, after: Tensor, *, least: float = 0.1) -> float:
    """Computes 1 - the mean over heads of (sink mass after / before); near 1 if sinks are gone.

    Args:
        before, after: from `attention_sink_mass`.
        least: heads with less mass before have no sink and are ignored.

    Returns:
        The decay; NaN if no head counts.

    Source: Su et al. 2025 (Super Experts, arXiv 2507.23279).
    """
    there = before >= least
    if not bool(there.any()):
        return float("nan")
    return 1.0 - float((after[there] / before[there]).mean())


class MassiveActivation(NamedTuple):
    """The largest value of the hidden states after one layer.

    layer: name.
    largest: |h|.
    median: of |h| over tokens and features.
    position: in its sequence.
    channel: feature.
    """

    layer: str
    largest: float
    median: float
    position: int
    channel: int


@torch.no_grad()
def find_massive_activations(model: nn.Module, tokens: Tensor) -> list[MassiveActivation]:
    """Returns the largest hidden states after each layer of a language model.

    Args:
        model: with a list of layers that return hidden states [B, S, H], or a tuple that starts
            with them, like models of transformers and the zoo. (Layers of JetMoE leave the last sum
            to the next norm: states before that sum.)
        tokens: [B, S].

    Raises:
        ValueError: no such list.
    """
    found = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            h = (output[0] if isinstance(output, tuple) else output).detach().abs()
            flat = h.flatten()
            place = int(flat.argmax())
            position, channel = place // h.shape[-1] % h.shape[-2], place % h.shape[-1]
            found.append(
                MassiveActivation(
                    name, float(flat[place]), float(flat.float().median()), position, channel
                )
            )

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in _layers_of(model)]
    try:
        with in_eval(model):
            _run(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in _LISTS:
            return [(f"{name}.{i}", layer) for i, layer in enumerate(module)]
    raise ValueError(
        f"find_massive_activations: model must have a list of layers called {', '.join(_LISTS)}, "
        f"got {type(model).__name__}."
    )


def _attention_of(model: Any, tokens: Tensor) -> list[Tensor]:
    """Returns the probabilities [B, n, S, S] of each layer."""
    ours = [m for m in model.modules() if isinstance(m, Attention | LatentAttention)]
    if ours:
        seen: list[Tensor] = []
        before = [module.watcher for module in ours]
        try:
            for module in ours:
                module.watcher = seen.append
            _run(model, tokens)
        finally:
            for module, watcher in zip(ours, before, strict=True):
                module.watcher = watcher
        return seen
    if not hasattr(model, "set_attn_implementation"):
        raise ValueError(
            "attention_sink_mass: model must be a language model of the zoo with softmax "
            f"attention, or one of transformers, got {type(model).__name__}."
        )
    attention = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        output = model(input_ids=tokens, output_attentions=True, use_cache=False)
    finally:
        model.set_attn_implementation(attention)
    if not output.attentions or output.attentions[0] is None:
        raise ValueError(
            f"attention_sink_mass: model must return its attention, got none from "
            f"{type(model).__name__}."
        )
    return list(output.attentions)


def _run(model: Any, tokens: Tensor) -> Any:
    if hasattr(model, "set_attn_implementation"):
        return model(input_ids=tokens, use_cache=False)
    return model(tokens)
