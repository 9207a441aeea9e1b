"""Hash routing: a table maps token ids to experts.

Letters: V vocabulary size, T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import heapq
from typing import Any

import torch
from torch import Tensor

from moe_ops.formulas.scores import SCORE_FUNCS

from ..routing import valid_ids
from .base import Router
from .options import check

SCORES = (*SCORE_FUNCS, "uniform")


class HashRouter(Router, kind="hash"):
    """Router that looks experts up by token id; logits determine only their weights.

    The router receives hidden states, not token ids, so the caller looks up the experts and passes
    them to the layer::

        layer(x, topk_ids=layer.router.lookup(token_ids))

    Called without `topk_ids`, it raises ValueError. Loads are as balanced as the table, and a token
    id has the same experts at every position.

    Buffers: table [V, K] int32, in the state dict.

    Args:
        table: [V, K] integers in [0, E), see `make_table`; None if `vocab_size` is given.
        vocab_size: V; draws a random table.
        score_func: score function of the weights: one of `TopKRouter`'s, or "uniform" for 1 / K
            whatever the logits. With "uniform" the linear map is unused and requires no gradient.
        renormalize: divide the K weights by their sum.
        routed_scaling_factor: multiplies the weights at the end.
        hidden_size, num_experts, top_k, options: see `Router`.

    `select`, `append`, `split` and `merge` raise NotImplementedError: the caller must make a table
    for the new experts.

    Source: Roller et al. 2021 (Hash Layers, arXiv 2106.04426): one expert of weight 1, which is
    "uniform" with K = 1. DeepSeek-V4 has hash layers with scored weights ("sqrtsoftplus").
    """

    table: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        table: Tensor | None = None,
        vocab_size: int | None = None,
        score_func: str = "uniform",
        renormalize: bool = False,
        routed_scaling_factor: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        check(
            score_func in SCORES,
            f"score_func must be one of {', '.join(SCORES)}, got {score_func!r}",
        )
        check(
            (table is None) != (vocab_size is None),
            f"table or vocab_size must be given with kind='hash', got "
            f"{'neither' if table is None else 'both'}",
        )
        if table is None:
            assert vocab_size is not None
            table = self.make_table(vocab_size, num_experts, top_k)
        check(
            table.dim() == 2 and table.shape[1] == top_k,
            f"table must be [V, {top_k}], got shape {list(table.shape)}",
        )
        check(
            not table.numel() or (int(table.min()) >= 0 and int(table.max()) < num_experts),
            f"table must hold ids in [0, {num_experts}), got others",
        )
        self.score_func = score_func
        self.renormalize = renormalize
        self.routed_scaling_factor = routed_scaling_factor
        self.register_buffer("table", table.to(self.weight.device, torch.int32))
        if score_func == "uniform":
            for parameter in self.parameters():
                parameter.requires_grad_(False)

    def lookup(self, token_ids: Tensor) -> Tensor:
        """Returns topk_ids [..., K] int32 for token ids [...], each in [0, V); jagged ids give
        jagged results."""
        if not token_ids.is_nested:
            return self.table[token_ids.long()]
        jagged: Any = token_ids
        values = self.table[jagged.values().long()]
        return torch.nested.nested_tensor_from_jagged(values, jagged.offsets())

    def choose_experts(
        self, router_logits: Tensor, expert_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        raise ValueError("HashRouter: topk_ids must be given, see HashRouter.lookup, got None.")

    def weights_of(self, router_logits: Tensor, topk_ids: Tensor) -> Tensor:
        if self.score_func != "uniform":
            return super().weights_of(router_logits, topk_ids)
        valid, ids = valid_ids(topk_ids, self.num_experts)
        weights = torch.full_like(ids, 1 / ids.shape[1], dtype=router_logits.dtype)
        weights = weights.masked_fill(~valid, 0.0)
        if self.renormalize:
            weights = self._normalize(weights)
        return weights * self.routed_scaling_factor

    def with_rows(self, num_experts: int, top_k: int, **changes: Any) -> Router:
        raise NotImplementedError(
            "HashRouter: the table belongs to its experts; make a router with a table of the new "
            "ones."
        )

    @staticmethod
    def make_table(
        vocab_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        counts: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Returns a table of experts: K different experts for each of V tokens.

        Args:
            vocab_size, num_experts, top_k: V, E and K, with K <= E.
            counts: [V] number of occurrences of each token, which balances the table: from the most
                frequent token on, each gets the experts with the least load so far (ties: the
                smaller id). None draws experts at random.
            generator: CPU random number generator.

        Returns:
            table: [V, K] int32 on the CPU.

        Raises:
            ValueError: K outside [1, E], or counts of another shape.

        Source: Roller et al. 2021 (arXiv 2106.04426), random and balanced assignment.
        """
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"HashRouter.make_table: top_k must be in [1, {num_experts}], got {top_k}."
            )
        if counts is None:
            drawn = torch.rand(vocab_size, num_experts, generator=generator, device="cpu")
            return drawn.topk(top_k, dim=1).indices.to(torch.int32)
        if counts.shape != (vocab_size,):
            raise ValueError(
                f"HashRouter.make_table: counts must be [{vocab_size}], got shape "
                f"{list(counts.shape)}."
            )
        frequencies = counts.tolist()
        table: list[list[int]] = [[]] * vocab_size
        loads = [(0, expert) for expert in range(num_experts)]  # Min-heap by load.
        for token in counts.argsort(descending=True, stable=True).tolist():
            least = [heapq.heappop(loads) for _ in range(top_k)]
            table[token] = [expert for _, expert in least]
            for load, expert in least:
                heapq.heappush(loads, (load + frequencies[token], expert))
        return torch.tensor(table, dtype=torch.int32, device="cpu").view(vocab_size, top_k)
