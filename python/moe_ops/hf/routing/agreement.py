"""Measures of how far an inference engine and a trainer agree: in experts and in probabilities.

T tokens, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RoutingAgreement:
    """Running comparison of two selections of experts, and of two policies, over any number of
    batches.

    Counts stay on the device until `as_dict` reads them. `moe_ops.viz.routing.plot_agreement` draws
    them.
    """

    def __init__(self) -> None:
        self._layers: dict[str, Tensor] = {}
        self._kl: list[Tensor] = []

    @torch.no_grad()
    def add(self, layer: str, given: Tensor, own: Tensor) -> None:
        """Adds the experts of one layer.

        Args:
            layer: name of the layer.
            given: [T, K] ids; tokens with -1 do not count.
            own: [T, K] ids to compare with; order within a token does not matter.
        """
        given = given.to(own.device).long()
        valid = given[:, 0] >= 0
        missing = (given[:, :, None] != own[:, None, :]).all(-1).sum(-1)[valid]
        num_tokens = valid.sum()
        counts = [num_tokens * given.shape[1], missing.sum(), num_tokens, (missing > 0).sum()]
        total = torch.stack(counts)
        self._layers[layer] = self._layers.get(layer, torch.zeros_like(total)) + total

    @torch.no_grad()
    def add_log_probs(self, rollout: Tensor, trainer: Tensor, mask: Tensor | None = None) -> None:
        """Adds log-probabilities of sampled tokens.

        The divergence KL(rollout || trainer) of a token is estimated by r - 1 - log r with r =
        exp(trainer - rollout), which is never negative and has the right mean.

        Args:
            rollout, trainer: log-probabilities of the sampled tokens, of one shape.
            mask: bool of this shape, True if a token counts.

        Raises:
            ValueError: shapes differ.
        """
        others = [trainer] if mask is None else [trainer, mask]
        if any(t.shape != rollout.shape for t in others):
            raise ValueError(
                "RoutingAgreement: rollout, trainer and mask must have one shape, got "
                f"{', '.join(str(list(t.shape)) for t in (rollout, *others))}."
            )
        log_ratio = trainer.double() - rollout.to(trainer.device).double()
        kl = log_ratio.expm1() - log_ratio
        self._kl.append((kl if mask is None else kl[mask.to(kl.device).bool()]).flatten())

    @property
    def kl(self) -> Tensor:
        """Returns the estimates of all added tokens, [T] float64 on the CPU."""
        parts = [part.cpu() for part in self._kl]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def as_dict(self) -> dict[str, Any]:
        """Returns the measures.

        - choices: share of (token, expert) pairs of which the other selection lacks the expert
        - tokens: share of tokens with at least one such pair in a layer
        - kl: mean of `kl`; only with log-probabilities
        - layers: choices and tokens of each layer, by name

        Choices and tokens are means over layers; 0 without layers.
        """
        layers = {}
        for name, counts in self._layers.items():
            slots, wrong, num_tokens, touched = counts.tolist()
            layers[name] = {
                "choices": wrong / max(slots, 1),
                "tokens": touched / max(num_tokens, 1),
            }
        found: dict[str, Any] = {
            measure: sum(layer[measure] for layer in layers.values()) / max(len(layers), 1)
            for measure in ("choices", "tokens")
        }
        if self._kl:
            found["kl"] = float(self.kl.mean()) if len(self.kl) else 0.0
        return {**found, "layers": layers}
