"""PEER: a million tiny experts, found by product keys.

Letters: T tokens, H hidden size, D query size, N sub-keys of a half, E = N * N experts, R heads, K
experts a head.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_ops.ops import topk_router
from moe_ops.ops._autograd import in_transform
from moe_ops.ops._checks import check_positive

from .experts import Experts
from .functional import apply_linear, linear, multiplies_by_ops

# Elements of gathered weights that are in memory at a time.
GATHERED_AT_A_TIME = 1 << 20


class PEEROutput(NamedTuple):
    """What `PEER` returns with `return_routing=True`.

    Attributes:
        y: [..., H] in the dtype of x.
        topk_weights: [T, R K] float, which sum to 1 in each head.
        topk_ids: [T, R K] int32, the experts of head 0, then of head 1, ...; two heads may choose
            the same one.
    """

    y: Tensor
    topk_weights: Tensor
    topk_ids: Tensor


class PEER(nn.Module):
    """Parameter-efficient expert retrieval: a head finds K of E experts of one neuron each.

    A head's query is two halves. Expert e = i * N + j has the key (row i of the first sub-keys, row
    j of the second), so that its score is a sum of two, and the best K experts are among the K x K
    pairs of the best K rows of either half: N comparisons instead of N^2. The weights are the
    softmax over the K scores, and the output is the weighted sum of act(u_e . x) v_e over the
    experts of all heads.

    Parameters:
        query.weight: [R D, H]. sub_keys: [2, N, D / 2], shared by the heads.
        query_norm.weight, .bias and running statistics: [R D], with `query_norm=True`.
        experts: `Experts` of intermediate size 1 (u is w_gate_up [E, 1, H], v is w_down [E, H, 1]).

    Args:
        hidden_size: H.
        num_experts: E, a square.
        top_k: K in [1, N].
        num_heads: R.
        query_size: D, even; None: H, or H + 1 where that is odd.
        query_norm: batch normalisation of the queries, which spreads use over more experts.
        activation: "gelu", or another of `Experts`; with a gated one an expert has two input
            vectors.
        device, dtype: of the parameters.

    Initialisation: query as `nn.Linear`, sub-keys uniform in +-1/sqrt(D / 2). Experts as `Experts`:
    u uniform in +-1/sqrt(H); v, whose fan-in is the neurons that are summed, in +-1/sqrt(R K).

    Raises:
        ValueError: a size out of range, E no square, D odd.

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
        self.query = nn.Linear(hidden_size, num_heads * size, bias=False, **where)
        self.query_norm = nn.BatchNorm1d(num_heads * size, **where) if query_norm else None
        self.sub_keys = nn.Parameter(torch.empty(2, side, size // 2, **where))
        self.experts = Experts(num_experts, hidden_size, 1, activation=activation, **where)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values described above."""
        self.query.reset_parameters()
        if self.query_norm is not None:
            self.query_norm.reset_parameters()
        bound = self.sub_keys.shape[2] ** -0.5
        nn.init.uniform_(self.sub_keys, -bound, bound)
        self.experts.reset_parameters()
        bound = (self.num_heads * self.top_k) ** -0.5
        nn.init.uniform_(self.experts.w_down, -bound, bound)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """topk_weights [T, R K] float and topk_ids [T, R K] int32 of x [T, H].

        A head's experts come best first; ties go to the pair of better rows, the first half's
        before the second's, and rows tie to the smaller number.
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
        ids = (rows[0][:, :, None] * side + rows[1][:, None]).flatten(1)
        weights, chosen = topk_router(pairs, k, topk_first=True)
        ids = ids.gather(1, chosen.long()).to(torch.int32)
        shape = (num_tokens, self.num_heads * k)
        return weights.view(shape), ids.view(shape)

    def forward(self, x: Tensor, *, return_routing: bool = False) -> Tensor | PEEROutput:
        """x [..., H] to [..., H]; a PEEROutput with `return_routing=True`. No tokens is fine; with
        `query_norm`, training needs at least two.

        Raises:
            ValueError: another last dimension than H.
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
        """`self.experts(x, weights, ids)`. That sorts slots by expert, for products of many rows;
        an expert here has a row or two, and its two vectors are read and used once a slot."""
        bank = self.experts
        plain = (
            type(bank) is Experts
            and bank.dispatcher is None
            and bank.precision is None
            and bank.b_gate_up is None
            and bank.b_down is None
            and x.dtype == bank.w_gate_up.dtype == bank.w_down.dtype
            and x.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled(x.device.type)
            and not torch.compiler.is_compiling()
            and not in_transform()
            and not multiplies_by_ops(x)
        )
        if not plain:
            y: Tensor = bank(x, weights, ids)
            return y
        width = bank.w_gate_up.shape[1]  # 2 with a gate.
        vectors = bank.w_gate_up.flatten(0, 1)
        rows = ids[..., None] * width + torch.arange(width, dtype=ids.dtype, device=ids.device)
        products: Tensor = _GatherDot.apply(x, vectors, rows.flatten(1))
        h = bank._activate(products.unflatten(1, (-1, width))).squeeze(-1)
        return F.embedding_bag(
            ids, bank.w_down.squeeze(-1), mode="sum", per_sample_weights=h * weights.to(h.dtype)
        )

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, "
            f"top_k={self.top_k}, num_heads={self.num_heads}"
        )


class _GatherDot(torch.autograd.Function):
    """y[t, k] = x[t] . vectors[rows[t, k]], without all those vectors in memory at once.

    x [T, H], vectors [N, H], rows [T, M] int; y [T, M].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, vectors: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(x, vectors, rows)
        parts = [
            torch.bmm(F.embedding(r, vectors), part[..., None])[..., 0]
            for part, r in zip(*_split(x, rows, size=x.shape[1]), strict=True)
        ]
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, vectors, rows = ctx.saved_tensors
        grad_x = grad_vectors = None
        if ctx.needs_input_grad[0]:
            grad_x = F.embedding_bag(
                rows, vectors, mode="sum", per_sample_weights=grad.contiguous()
            )
        if ctx.needs_input_grad[1]:
            grad_vectors = torch.zeros_like(vectors)
            for part, r, g in zip(*_split(x, rows, grad, size=x.shape[1]), strict=True):
                added = (g[..., None] * part[:, None]).flatten(0, 1)
                grad_vectors.index_add_(0, r.reshape(-1), added)
        return grad_x, grad_vectors, None


def _split(x: Tensor, rows: Tensor, *others: Tensor, size: int) -> list[tuple[Tensor, ...]]:
    """Each tensor in parts of so many tokens that the vectors of one fit into memory."""
    tokens = max(1, GATHERED_AT_A_TIME // (rows.shape[1] * size))
    return [t.split(tokens) for t in (x, rows, *others)]
