"""PEER: a million tiny experts, retrieved by product keys.

Letters: T tokens, H hidden size, D query size, N sub-keys per half, E = N * N experts, R heads, K
experts per head.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_ops._sharded import is_sharded
from moe_ops.memory import move_when_paid
from moe_ops.ops import peer_ffn, topk_router
from moe_ops.ops._checks import check_positive

from .experts import Experts
from .functional import apply_linear, linear
from .inputs import takes_jagged


class PEEROutput(NamedTuple):
    """Output of `PEER` with `return_routing=True`.

    Attributes:
        y: [..., H] in the dtype of x.
        topk_weights: [T, R K] float, which sum to 1 in each head.
        topk_ids: [T, R K] int32, the experts of head 0, then of head 1, ...; two heads may select
            the same expert.
    """

    y: Tensor
    topk_weights: Tensor
    topk_ids: Tensor


class PEER(nn.Module):
    """Parameter-efficient expert retrieval: each head selects K of E single-neuron experts.

    A head's query has two halves. With N = sqrt(E), expert e = i * N + j has the key (row i of the
    first sub-keys, row j of the second), so its score is a sum of two scores, and the best K
    experts are among the K x K pairs of the best K rows of each half: N comparisons per half
    instead of N^2. The weights are the softmax over the K scores, and the output is the weighted
    sum of act(u_e . x) v_e over the experts of all heads.

    Parameters:
        query.weight: [R D, H].
        sub_keys: [2, N, D / 2], shared by the heads.
        query_norm: weight, bias and running statistics [R D], with `query_norm=True`.
        experts: `Experts` of intermediate size 1 (u is w_gate_up [E, 1, H], v is w_down [E, H, 1]).

    Args:
        hidden_size: H.
        num_experts: E, a square.
        top_k: K in [1, N].
        num_heads: R.
        query_size: D, even; None: H, or H + 1 if H is odd.
        query_norm: True normalizes the queries over the batch, which uses more experts.
        activation: "gelu", or another activation of `Experts`; with a gated one, an expert has two
            input vectors.
        sparse_grad: gradients of the experts are sparse tensors with the selected experts, for
            optimizers such as `torch.optim.SparseAdam`; eager mode only. This attribute may be
            changed at any time. See `moe_ops.peer_ffn`.
        device, dtype: of the parameters.

    Initialization: query like `nn.Linear`, sub-keys uniform in +-1/sqrt(D / 2). Experts like
    `Experts`: u uniform in +-1/sqrt(H); v, whose fan-in is the number of summed neurons, in
    +-1/sqrt(R K).

    Raises:
        ValueError: a size out of range, E not a square, or an odd D.

    Source: He 2024 (Mixture of A Million Experts, arXiv 2407.04153); product keys are Lample et al.
    2019 (arXiv 1907.05242).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 16,
        *,
        num_heads: int = 8,
        query_size: int | None = None,
        query_norm: bool = True,
        activation: str = "gelu",
        sparse_grad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        size = hidden_size + hidden_size % 2 if query_size is None else query_size
        check_positive("PEER", hidden_size=hidden_size, num_experts=num_experts)
        check_positive("PEER", num_heads=num_heads, query_size=size)
        side = math.isqrt(num_experts)
        if side * side != num_experts:
            raise ValueError(f"PEER: num_experts must be a square, got {num_experts}.")
        if not 1 <= top_k <= side:
            raise ValueError(f"PEER: top_k must be in [1, {side}], got {top_k}.")
        if size % 2:
            raise ValueError(f"PEER: query_size must be even, got {size}.")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.num_heads = num_heads
        self.query_size = size
        self.sparse_grad = sparse_grad
        self.query = nn.Linear(hidden_size, num_heads * size, bias=False, **where)
        self.query_norm = nn.BatchNorm1d(num_heads * size, **where) if query_norm else None
        self.sub_keys = nn.Parameter(torch.empty(2, side, size // 2, **where))
        self.experts = Experts(num_experts, hidden_size, 1, activation=activation, **where)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values described in the class docstring."""
        self.query.reset_parameters()
        if self.query_norm is not None:
            self.query_norm.reset_parameters()
        bound = self.sub_keys.shape[2] ** -0.5
        nn.init.uniform_(self.sub_keys, -bound, bound)
        self.experts.reset_parameters()
        bound = (self.num_heads * self.top_k) ** -0.5
        nn.init.uniform_(self.experts.w_down, -bound, bound)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns topk_weights [T, R K] float and topk_ids [T, R K] int32 for x [T, H].

        A head's experts are sorted best first; ties go to the pair of better rows, the first half's
        before the second's, and equal rows to the smaller index.
        """
        num_tokens, k = x.shape[0], self.top_k
        queries = apply_linear(self.query, x)
        if self.query_norm is not None and num_tokens:
            queries = self.query_norm(queries)
        halves = queries.reshape(num_tokens * self.num_heads, 2, self.query_size // 2)
        scores, rows = [], []
        for half, keys in enumerate(self.sub_keys.to(queries.dtype)):
            found = linear(halves[:, half], keys)  # [T R, N]
            best = topk_router(found.detach(), k)[1].long()
            scores.append(found.gather(1, best))
            rows.append(best)
        side = self.sub_keys.shape[1]
        pairs = (scores[0][:, :, None] + scores[1][:, None]).flatten(1)  # [T R, K K]
        weights, chosen = topk_router(pairs, k, topk_first=True)
        first, second = chosen // k, chosen % k
        ids = rows[0].gather(1, first.long()) * side + rows[1].gather(1, second.long())
        ids = ids.to(torch.int32)
        shape = (num_tokens, self.num_heads * k)
        return weights.view(shape), ids.view(shape)

    @takes_jagged
    def forward(self, x: Tensor, *, return_routing: bool = False) -> Tensor | PEEROutput:
        """Maps x [..., H], which may be jagged, to [..., H]; returns a PEEROutput with
        `return_routing=True`. x may have no tokens; with `query_norm`, training needs at least two.

        Raises:
            ValueError: the last dimension is not H.
        """
        if x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"PEER: x must be [..., {self.hidden_size}], got shape {list(x.shape)}."
            )
        flat = x.reshape(-1, self.hidden_size)
        weights, ids = self.route(flat)
        y = self._run_experts(flat, weights, ids).view(x.shape)
        return PEEROutput(y, weights, ids) if return_routing else y

    def _run_experts(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Computes `self.experts(x, weights, ids)`, with the op for single-neuron experts if the
        experts have only options that it supports."""
        bank = self.experts
        gathers = (
            type(bank) is Experts
            and bank.dispatcher is None
            and not bank.fp8_training
            and bank.b_gate_up is None
            and bank.b_down is None
            and not is_sharded(bank.w_gate_up)
            and (bank.alpha, bank.limit) == (1.702, 7.0)
        )
        if not gathers:
            y: Tensor = bank(x, weights, ids)
            return y
        if not torch.compiler.is_compiling():
            move_when_paid(bank, ids.numel(), bank.w_gate_up, bank.w_down)
        return peer_ffn(
            x,
            bank.w_gate_up,
            bank.w_down,
            weights,
            ids,
            activation=bank.activation,
            sparse_grad=self.sparse_grad,
        )

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, "
            f"top_k={self.top_k}, num_heads={self.num_heads}"
        )
