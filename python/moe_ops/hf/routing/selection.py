"""Replaces the selection of experts inside a router's forward.

Routers of transformers differ in scores, biases, groups, normalization and outputs, but select with
`torch.topk` over E scores. A torch function mode that is active during the router's forward answers
this call with given experts and their live scores; every other line of the router runs unchanged,
so weights and gradients follow the model's own formula.

T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class TopK(NamedTuple):
    """Result of a replaced `torch.topk`, whose own result type cannot be made in compiled code."""

    values: Tensor
    indices: Tensor


class Selection(TorchFunctionMode):
    """Watches, and given experts replaces, the selection of one call of a router.

    num_experts, top_k: E and K of the router.
    given: [T, K] ids of any integer type, or None. Rows of -1 select freely.
    needs_own: compute the router's own selection too: for rows of -1, or to compare.

    Results:
        taken: ids as the router's experts are called with, in the shape of the selection; None if
            the router did not select.
        own: ids that the router would have taken; None unless `needs_own`.
    """

    def __init__(
        self, num_experts: int, top_k: int, given: Tensor | None, needs_own: bool = False
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.given = given
        self.needs_own = needs_own
        self.taken: Tensor | None = None
        self.own: Tensor | None = None
        self._masked: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.topk or func is Tensor.topk:
            return self._topk(func, *args, **kwargs)
        if func is Tensor.masked_fill and self.given is not None and self.taken is None:
            return self._masked_fill(*args, **kwargs)
        return func(*args, **kwargs)

    def _topk(self, func: Any, input: Tensor, k: int, dim: int = -1, *rest: Any, **options: Any):
        last = input.dim() - 1
        if k != self.top_k or input.shape[-1] != self.num_experts or dim not in (-1, last):
            return func(input, k, dim, *rest, **options)  # The choice of groups.
        if self.given is None:
            found = func(input, k, dim, *rest, **options)
            self.taken = found[1]
            return found
        ids = self.rows_of(input)
        if self.needs_own:
            scores = input if self._masked is None else self._masked
            self.own = func(scores.detach(), k, dim, *rest, **options)[1]
            ids = torch.where(ids < 0, self.own, ids)
        self.taken = ids
        return TopK(input.gather(-1, ids), ids)

    def _masked_fill(self, input: Tensor, mask: Tensor, value: Any) -> Tensor:
        """Masks experts outside the selected groups, but not the given ones, whose scores may
        become weights."""
        filled = input.masked_fill(mask, value)
        if input.shape[-1] != self.num_experts or mask.shape != input.shape:
            return filled
        self._masked = filled.detach()
        return input.masked_fill(mask & ~self.marked(self.rows_of(input), input), value)

    def rows_of(self, scores: Tensor) -> Tensor:
        """Returns the given ids in the shape of the scores [..., E]."""
        assert self.given is not None
        return self.given.to(scores.device).long().reshape(*scores.shape[:-1], self.given.shape[-1])

    def marked(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Returns a mask like the scores [..., E] that is True at the ids, which may be -1."""
        valid = ids >= 0
        mask = torch.zeros_like(scores, dtype=torch.bool)
        return mask.scatter(-1, torch.where(valid, ids, 0), valid)


class SparseMixerSelection(Selection):
    """Like `Selection`, for PhiMoE, which picks experts one after another with `Tensor.max`: in
    evaluation the largest score of those left, in training a sample."""

    def __init__(self, *arguments: Any, training: bool) -> None:
        super().__init__(*arguments)
        self._training = training
        self._fills = 0
        self._picks: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.max and kwargs.get("keepdim", False) != self._training:
            return self._pick(*args, **kwargs)
        if func is Tensor.masked_fill and self.given is not None:
            scores, mask, value = args
            given = self.rows_of(scores)[..., self._fills : self._fills + 1]
            self._fills += 1
            return func(scores, mask & ~self.marked(given, scores), value)
        return func(*args, **kwargs)

    def _pick(self, input: Tensor, **options: Any) -> Any:
        values, own = Tensor.max(input, **options)
        pick = own
        if self.given is not None:
            pick = self.rows_of(input)[..., len(self._picks)].view_as(own)
            pick = torch.where(pick < 0, own, pick)
        column = (*input.shape[:-1], 1)
        self._picks.append((pick.view(column), own.view(column)))
        self.taken, self.own = (torch.cat(picks, -1) for picks in zip(*self._picks, strict=True))
        return TopK(values, pick)
