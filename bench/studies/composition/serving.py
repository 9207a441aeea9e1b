"""Pool of whole models, loaded on demand and evicted to make room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops.zoo.composition import Composition


@dataclass
class PoolCounts:
    """Counts of an `ExpertPool`: hits, loads, evictions, and seconds spent loading."""

    hits: int = 0
    loads: int = 0
    evictions: int = 0
    seconds: float = 0.0


class ExpertPool:
    """Pool of models of which only some fit into memory at once.

    `get` loads a missing model after dropping the least recently used ones until it fits. The
    memory of a dropped model is freed once no caller holds it. The pool is not thread-safe.

    Args:
        load: function from a name to its model.
        sizes: name -> size, in any unit; the names are those of the pool.
        capacity: maximum total size of loaded models, in the unit of sizes.
        pinned: models that are never dropped once loaded, such as the generalist.

    Raises:
        ValueError: an unknown pinned name, or a model that would not fit beside the pinned ones.
    """

    def __init__(
        self,
        load: Callable[[str], nn.Module],
        sizes: Mapping[str, float],
        capacity: float,
        *,
        pinned: Sequence[str] = (),
    ) -> None:
        unknown = [name for name in pinned if name not in sizes]
        if unknown:
            raise ValueError(f"ExpertPool: pinned must be among the models, got {unknown}.")
        fixed = sum(sizes[name] for name in pinned)
        for name, size in sizes.items():
            needed = fixed + (0 if name in pinned else size)
            if needed > capacity:
                raise ValueError(
                    f"ExpertPool: capacity must hold {name} beside the pinned models, {needed}, "
                    f"got {capacity}."
                )
        self._load = load
        self.sizes = dict(sizes)
        self.capacity = capacity
        self.pinned = frozenset(pinned)
        self.counts = PoolCounts()
        self._resident: OrderedDict[str, nn.Module] = OrderedDict()
        self._reserved = fixed

    @property
    def resident(self) -> tuple[str, ...]:
        """Returns names of the loaded models, the most recently used last."""
        return tuple(self._resident)

    def get(self, name: str) -> nn.Module:
        """Returns the model of a name, in eval mode.

        Raises:
            ValueError: an unknown name.
        """
        if name not in self.sizes:
            raise ValueError(
                f"ExpertPool: name must be one of {', '.join(self.sizes)}, got {name!r}."
            )
        if name in self._resident:
            self.counts.hits += 1
            self._resident.move_to_end(name)
            return self._resident[name]
        if name not in self.pinned:
            self._make_room(self.sizes[name])
        start = perf_counter()
        model = self._load(name).eval()
        self.counts.seconds += perf_counter() - start
        self.counts.loads += 1
        self._resident[name] = model
        return model

    def drop(self, name: str) -> None:
        """Unloads a model, pinned or not; does nothing if it is not loaded."""
        if self._resident.pop(name, None) is not None:
            self.counts.evictions += 1

    def _make_room(self, size: float) -> None:
        """Drops models until one of this size fits. Room for pinned models is reserved from the
        start, so that loading one of them never needs an eviction."""
        others = [name for name in self._resident if name not in self.pinned]
        used = self._reserved + sum(self.sizes[name] for name in others)
        for name in others:
            if used + size <= self.capacity:
                return
            self.drop(name)
            used -= self.sizes[name]


@torch.no_grad()
def generate(
    composition: Composition,
    prompts: Tensor,
    num_tokens: int,
    pool: ExpertPool,
    embed: Callable[[Tensor], Tensor],
    **settings: Any,
) -> Tensor:
    """Continues prompts [B, S] of one length, each with its routed model.

    Each model is requested once, loaded ones first, so that a call loads no model twice.

    Args:
        pool: of models with `generate(tokens, num_tokens, **settings)`, by the config's names.
        embed: function from prompts to embeddings [B, D].
        settings: of the models' `generate`.

    Returns:
        [B, S + num_tokens].
    """
    if prompts.dim() != 2:
        raise ValueError(f"generate: prompts must be [B, S], got shape {list(prompts.shape)}.")
    if not len(prompts):
        return prompts.new_empty(0, prompts.shape[1] + num_tokens)
    goes_to = composition.route(embed(prompts)).models.to(prompts.device)
    out = prompts.new_empty(len(prompts), prompts.shape[1] + num_tokens)
    for number in visiting_order(goes_to, composition.config.models, pool.resident):
        rows = (goes_to == number).nonzero()[:, 0]
        model: Any = pool.get(composition.config.models[number])
        out[rows] = model.generate(prompts[rows], num_tokens, **settings)
    return out


def visiting_order(models: Tensor, names: Sequence[str], resident: Sequence[str]) -> list[int]:
    """Returns the needed models, each once: first the loaded ones, by index within each group."""
    return sorted(set(models.tolist()), key=lambda m: (names[m] not in resident, m))
