"""A ModuleFormer's modules: inserting and pruning them, learning with new ones alone, counting.

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

KINDS = ("attention", "mlp")  # The attributes of a block that hold experts.


def insert_experts(
    model: ModuleFormer, attention: int = 0, mlp: int = 0, *, init: str = "random"
) -> dict[str, int]:
    """Adds experts to every block, in place; the layers are replaced, so make the optimizer
    afterwards.

    Args:
        attention, mlp: experts to add to each block.
        init: "random", "zero_output" (they contribute nothing until trained), "copy" or
            "mean"; see `moe_ops.layers.Experts.append`.

    Returns:
        Name of each parameter that has rows of old and of new experts -> the number of the old
        ones, which come first. To learn with the new experts alone, train the rest of these.

    Raises:
        ValueError: a negative number, or nothing to add.
    """
    if min(attention, mlp) < 0 or not attention + mlp:
        raise ValueError(
            "insert_experts: attention and mlp must be numbers >= 0 and not both "
            f"0, got {attention} and {mlp}."
        )
    grown: dict[str, int] = {}
    for i, block in enumerate(model.layers):
        for kind, added, names in (
            ("attention", attention, ("w_query", "w_output")),
            ("mlp", mlp, ("experts.w_gate_up", "experts.w_down")),
        ):
            if added:
                layer = getattr(block, kind)
                for name in ("router.weight", *names):
                    grown[f"layers.{i}.{kind}.{name}"] = layer.router.num_experts
                setattr(block, kind, layer.append(added, init=init))
    model.note_experts()
    return grown


def prune(
    model: ModuleFormer, frequencies: Mapping[str, Tensor], threshold: float
) -> dict[str, list[int]]:
    """Drops, in place, the experts used by fewer than `threshold` of the tokens.

    The K most used experts of a layer always stay, for the router needs K. The rest is as if the
    others did not exist: routing probabilities are those among the experts that are left. The
    layers are replaced, so make optimizers afterwards.

    Args:
        frequencies: of `expert_frequencies`; layers that are not in it are left alone.
        threshold: share of tokens, in [0, 1].

    Returns:
        Layer -> ids of the experts that were kept, in order.

    Raises:
        ValueError: a threshold out of range, a layer that is none, or another number of
            experts than it has.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"prune: threshold must be in [0, 1], got {threshold}.")
    layers = {f"layers.{i}.{kind}" for i in range(len(model.layers)) for kind in KINDS}
    for name, frequency in frequencies.items():
        if name not in layers:
            raise ValueError(
                f"prune: frequencies must be of layers.N.attention or layers.N.mlp, got {name}."
            )
        routed: Any = model.get_submodule(name)
        experts = routed.router.num_experts
        if frequency.shape != (experts,):
            raise ValueError(
                f"prune: frequencies of {name} must be [{experts}], got {list(frequency.shape)}."
            )
    kept = {}
    for name, frequency in frequencies.items():
        layer: Any = model.get_submodule(name)
        most = frequency.argsort(descending=True, stable=True)[: layer.router.top_k]
        keep = set(most.tolist()) | set((frequency >= threshold).nonzero().flatten().tolist())
        kept[name] = sorted(keep)
        _, index, kind = name.split(".")
        setattr(model.layers[int(index)], kind, layer.select(kept[name]))
    model.note_experts()
    return kept


class FrozenRows:
    """The first rows of a parameter stay as they are while the others are trained.

    Their gradient is zero. That alone does not stop weight decay, nor optimizers with a memory of
    earlier gradients: `restore` puts the rows back, and `hold_frozen` calls it after every step of
    an optimizer.
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
        grown: what `insert_experts` returned.

    Returns:
        The rows that are kept, by the parameter's name; give them to `hold_frozen`.
    """
    model.requires_grad_(False)
    return {name: FrozenRows(model.get_parameter(name), rows) for name, rows in grown.items()}


def hold_frozen(frozen: Mapping[str, FrozenRows], optimizer: Optimizer) -> RemovableHandle:
    """Puts the frozen rows back after every step of the optimizer from now on.

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
    """Sums of squares of the new experts' rows in the routers, to add to a loss with a small
    coefficient: it keeps the routers from preferring the new experts on old domains."""
    rows = [r.new_rows() for name, r in frozen.items() if "router" in name]
    return torch.stack([r.square().sum() for r in rows]).sum()


@torch.no_grad()
def expert_frequencies(model: Any, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Returns how often each expert is used: layer -> [E], the share of tokens that use it.

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
