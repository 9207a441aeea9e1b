"""A call of moe_ffn shared out over ranks: operands, what one rank does, what all of them give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tests.helpers.ffn import FFN_FLOATS, moe_ffn_magnitude
from torch import Tensor

from moe_ops import ops, reference
from moe_ops.parallel import ExpertPlacement
from moe_ops.testing import (
    Kwargs,
    absolute,
    acc_dtype,
    assert_close_by_norm,
    assert_identical,
    run_with_grads,
    seed_from,
    widened,
)

Results = dict[str, Tensor]
WEIGHTS = ("w_gate_up", "w_down", "b_gate_up", "b_down")


@dataclass(frozen=True)
class Case:
    """tokens: of each rank. ids: (generator, [T, K], E) -> ids. options: of moe_ffn."""

    tokens: tuple[int, ...] = (12, 12, 12, 12)
    num_experts: int = 8
    top_k: int = 3
    hidden_size: int = 16
    intermediate_size: int = 8
    ids: Callable[[tuple[int, int], int], Tensor] | None = None
    nan_weights: str = ""  # "", "dropped": of slots without an expert, "some": of two tokens
    bias: bool = False
    replicas: int = 0  # places beyond the experts; a multiple of the ranks
    shuffled: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def num_ranks(self) -> int:
        return len(self.tokens)

    @property
    def placement(self) -> ExpertPlacement:
        if not self.replicas and not self.shuffled:
            return ExpertPlacement.contiguous(self.num_experts, self.num_ranks)
        load = [(7 * e) % 5 for e in range(self.num_experts)]
        num_physical = self.num_experts + self.replicas
        return ExpertPlacement.balanced(load, self.num_ranks, num_physical)

    def operands(self, name: str, dtype: torch.dtype) -> Kwargs:
        """The call in one process, and the gradient of its output: the same on all ranks."""
        generator = torch.Generator().manual_seed(seed_from(name))
        total, h, i, e = (
            sum(self.tokens),
            self.hidden_size,
            self.intermediate_size,
            self.num_experts,
        )

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        ids = normal(total, e).topk(self.top_k).indices
        if self.ids is not None:
            ids = self.ids(ids, e)
        weights = torch.rand(total, self.top_k, generator=generator).to(acc_dtype(dtype)) + 0.1
        if self.nan_weights == "dropped":
            weights[(ids < 0) | (ids >= e)] = torch.nan
        if self.nan_weights == "some":
            weights[1, 0] = weights[-1, -1] = torch.nan
        call: Kwargs = {
            "x": normal(total, h).to(dtype),
            "w_gate_up": (normal(e, 2 * i, h) / h**0.5).to(dtype),
            "w_down": (normal(e, h, i) / i**0.5).to(dtype),
            "topk_weights": weights,
            "topk_ids": ids,
            **self.options,
        }
        if self.bias:
            call["b_gate_up"] = normal(e, 2 * i).to(dtype)
            call["b_down"] = normal(e, h).to(dtype)
        call["grad"] = normal(total, h).to(dtype)
        return call

    def block(self, rank: int) -> slice:
        """The tokens of a rank."""
        start = sum(self.tokens[:rank])
        return slice(start, start + self.tokens[rank])


class OpBank:
    """moe_ffn with the weights of one rank."""

    def __init__(self, weights: Kwargs) -> None:
        self.weights = weights

    def forward_local(self, x: Tensor, w: Tensor, ids: Tensor, **on_input: Any) -> Tensor:
        assert type(x) is type(w) is type(ids) is Tensor
        weights, options = dict(self.weights), on_input
        return ops.moe_ffn(
            x, weights.pop("w_gate_up"), weights.pop("w_down"), w, ids, **weights, **options
        )


def run_rank(
    dispatcher: Any, rank: int, case: Case, call: Kwargs, *, same_tokens: bool = False
) -> Results:
    """y and all gradients, of the tokens and experts of one rank."""
    call = dict(call)
    grad = call.pop("grad")
    block = slice(None) if same_tokens else case.block(rank)
    local = list(case.placement.local(rank))
    x, w = (call[n][block].clone().requires_grad_() for n in ("x", "topk_weights"))
    weights = {n: call[n][local].clone().requires_grad_() for n in WEIGHTS if n in call}
    y = dispatcher(OpBank(weights), x, w, call["topk_ids"][block], **case.options)
    y.backward(grad[block])
    grads = {n: t.grad for n, t in (("x", x), ("topk_weights", w), *weights.items())}
    assert all(g is not None for g in grads.values())
    return {"y": y.detach(), **grads}  # type: ignore[dict-item]


def join(case: Case, ranks: list[Results], *, same_tokens: bool = False) -> Results:
    """Returns what one process would have given: tokens in order, gradients of an expert's replicas
    added."""
    joined: Results = {}
    for name in ranks[0]:
        if name not in WEIGHTS:
            parts = [result[name] for result in ranks]
            if same_tokens:
                for part in parts[1:]:
                    assert_identical(part, parts[0], f"{name} on another rank")
            joined[name] = parts[0] if same_tokens else torch.cat(parts)
            continue
        total = ranks[0][name].new_zeros(case.num_experts, *ranks[0][name].shape[1:])
        for rank, result in enumerate(ranks):
            local = list(case.placement.local(rank))
            total[local] = total[local] + result[name] if case.replicas else result[name]
        joined[name] = total
    return joined


def one_process(call: Kwargs) -> Results:
    """Returns the same results of the op in this process."""
    call = dict(call)
    grad = call.pop("grad")
    y, grads = run_with_grads(ops.moe_ffn, call, [n for n in FFN_FLOATS if n in call], grad)
    return {"y": y, **grads}


def expected(call: Kwargs) -> tuple[Results, Results]:
    """In fp64: the results, and what bounds their rounding."""
    call = dict(call)
    grad = call.pop("grad")
    wrt = [n for n in FFN_FLOATS if n in call]
    found = []
    for function, operands, dy in (
        (reference.moe_ffn, widened(call), grad.double()),
        (moe_ffn_magnitude, absolute(call), grad.double().abs()),
    ):
        y, grads = run_with_grads(function, operands, wrt, dy)
        found.append({"y": y, **grads})
    return found[0], found[1]


def check_close(case: Case, call: Kwargs, got: Results) -> None:
    """Within what moe_ffn itself is allowed (tests/helpers/ffn.py), and two roundings more: of each
    partial sum that a rank returns, and of their sum over ranks, of a token's output and of its
    gradient."""
    dtype = call["x"].dtype
    want, bound = expected(call)
    sizes = (sum(case.tokens), case.hidden_size, case.intermediate_size, case.top_k, 1)
    for name, value in got.items():
        assert_close_by_norm(
            value,
            want[name],
            bound[name],
            sum_length=max(sizes),
            steps=4 if name == "y" else 7,
            step_dtype=dtype,
            what=name,
        )
