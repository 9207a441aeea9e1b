"""Guidance: a network that is hard to train is pulled towards the representations of another one,
which may be untrained, layer by layer.

Letters: N examples, D features.

Source: Subramaniam et al. 2024 (Training the Untrainable: Introducing Inductive Bias via
Representational Alignment, arXiv 2410.20035); Kornblith et al. 2019 (Similarity of Neural Network
Representations Revisited, ICML, arXiv 1905.00414).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def linear_cka(x: Tensor, y: Tensor, eps: float = 1e-8) -> Tensor:
    """Similarity of two representations of the same examples, in [0, 1]: with the Gram matrices K
    and M of x and y, centered and of length 1, sum(K M) / (|K| |M| + eps).

    It is 1 for representations that differ by a rotation, a scale and a shift, however small they
    are, and 0 where one of them does not vary.

    Args:
        x, y: [N, ...], flattened to [N, D] each; D may differ.

    Raises:
        ValueError: different N.
    """
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"linear_cka: x and y must be of as many examples, got {x.shape[0]} and {y.shape[0]}."
        )
    grams = []
    for t in (x, y):
        t = t.flatten(1)
        t = t - t.mean(0)
        # Layers of a network that does not train yet hardly vary: eps must not see their scale.
        t = t / t.norm().clamp(min=torch.finfo(t.dtype).tiny)
        grams.append(t @ t.T)
    k, m = grams
    return (k * m).sum() / (k.norm() * m.norm() + eps)


def matching_layers(num_layers: int, num_guides: int) -> list[int]:
    """For each of `num_guides` layers of the guide the layer of the network that it guides:
    round(i (num_layers - 1) / (num_guides - 1)), the last one where there is one guide. Halves are
    rounded to the even number."""
    if num_guides == 1:
        return [num_layers - 1]
    return [round(i * (num_layers - 1) / (num_guides - 1)) for i in range(num_guides)]


def guided(
    model: nn.Module,
    guide: nn.Module,
    inputs: Any,
    layers: Sequence[str],
    guide_layers: Sequence[str],
    *,
    guide_inputs: Any = None,
) -> tuple[Any, Tensor]:
    """Runs both and compares them.

    Args:
        model: what is trained. guide: runs in `eval()` without gradients; its mode is put back.
        inputs: of both. guide_inputs: of the guide, if they are others (noise, say).
        layers, guide_layers: names of modules in each, of pairs; the first N of their outputs (the
            first one of a tuple) are compared.

    Returns:
        What the model gave, and the sum over pairs of 1 - `linear_cka`, a scalar to be added to the
        task's loss. The published weight is 1; stopping after a few hundred steps is as good.

    Raises:
        ValueError: not as many layers of both, or a layer that did not run.
    """
    if len(layers) != len(guide_layers):
        raise ValueError(
            f"guided: layers and guide_layers must be as many, got {len(layers)} and "
            f"{len(guide_layers)}."
        )
    was_training = guide.training
    guide.eval()
    try:
        with torch.no_grad():
            _, wanted = _watched(guide, inputs if guide_inputs is None else guide_inputs,
                                 guide_layers)  # fmt: skip
    finally:
        guide.train(was_training)
    output, found = _watched(model, inputs, layers)
    away = [1 - linear_cka(a, b) for a, b in zip(found, wanted, strict=True)]
    return output, torch.stack(away).sum()


def _watched(model: nn.Module, inputs: Any, names: Sequence[str]) -> tuple[Any, list[Tensor]]:
    """The output of a model, and those of some of its modules at their last call."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        output = model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in names if name not in seen]
    if missing:
        raise ValueError(f"guided: layers must run, got {', '.join(missing)} that did not.")
    return output, [seen[name] for name in names]
