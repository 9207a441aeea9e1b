"""Learning with a ModuleFormer's new experts alone, and counting how often experts are used.

Letters: B sequences, S tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from moe_ops.layers import count_tokens_per_expert
from moe_ops.zoo.moduleformer import ModuleFormer


class FrozenRows:
    """The first rows of a parameter stay as they are while the others are trained.

    Their gradient is zero. That alone does not stop weight decay, nor optimisers with a memory of
    earlier gradients: `restore` puts the rows back, and `hold_frozen` calls it after every step of
    an optimiser.
    """

    def __init__(self, parameter: nn.Parameter, rows: int) -> None:
        self.parameter = parameter
        self.kept = parameter.detach()[:rows].clone()
        parameter.requires_grad_(True)
        self.handle = parameter.register_hook(self._mask)

    def _mask(self, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[: len(self.kept)] = 0
        return gradient

    @torch.no_grad()
    def restore(self) -> None:
        self.parameter[: len(self.kept)] = self.kept

    def new_rows(self) -> Tensor:
        """The rows that are trained; differentiable."""
        return self.parameter[len(self.kept) :]


def freeze_old(model: ModuleFormer, grown: Mapping[str, int]) -> dict[str, FrozenRows]:
    """Leaves nothing but the new experts and their rows in the routers to be trained: all other
    parameters get requires_grad False.

    Args:
        grown: what `ModuleFormer.insert_experts` returned.

    Returns:
        The rows that are kept, by the parameter's name; give them to `hold_frozen`.
    """
    model.requires_grad_(False)
    return {name: FrozenRows(model.get_parameter(name), rows) for name, rows in grown.items()}


def hold_frozen(frozen: Mapping[str, FrozenRows], optimizer: Optimizer) -> RemovableHandle:
    """Puts the frozen rows back after every step of the optimiser from now on.

    Returns:
        A handle whose `remove()` ends it.
    """

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for rows in frozen.values():
            rows.restore()

    return optimizer.register_step_post_hook(hook)


def unfreeze(model: ModuleFormer, frozen: Mapping[str, FrozenRows]) -> None:
    """Everything is trained again."""
    for rows in frozen.values():
        rows.handle.remove()
    model.requires_grad_(True)


def new_rows_penalty(frozen: Mapping[str, FrozenRows]) -> Tensor:
    """Sum of squares of the new experts' rows in the routers, to add to a loss with a small
    coefficient: it keeps the routers from preferring the new experts on old domains."""
    rows = [r.new_rows() for name, r in frozen.items() if "router" in name]
    return torch.stack([r.square().sum() for r in rows]).sum()


@torch.no_grad()
def expert_frequencies(model: Any, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """How often each expert is used: layer -> [E], the share of tokens that use it.

    Args:
        batches: of tokens [B, S]; the model runs in eval mode.
    """
    training, total = model.training, 0
    counts: dict[str, Tensor] = {}
    model.eval()
    for tokens in batches:
        total += tokens.numel()
        for r in model(tokens, return_routing=True).routing:
            found = count_tokens_per_expert(r.routing.topk_ids, r.router.num_experts)
            counts[r.layer] = counts[r.layer] + found if r.layer in counts else found
    model.train(training)
    return {layer: c.double() / max(total, 1) for layer, c in counts.items()}
