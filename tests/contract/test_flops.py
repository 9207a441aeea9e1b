"""FlopCounterMode: what an op counts is what torch counts of the same products one by one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import moe_ops
from moe_ops.quant import quantize_weight

# Sort, gather, score, activate, round or lay out: no products.
WITHOUT_PRODUCTS = {
    "add_rms_norm",
    "dispatch_layout",
    "expert_choice_router",
    "gated_act",
    "grouped_sum",
    "pack_experts",
    "permute",
    "quantize_fp8",
    "quantize_fp8_columns",
    "rotary",
    "sort_by_expert",
    "topk_router",
    "topp_router",
    "unpermute",
}


def test_every_op_with_products_counts_them():
    schemas = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("moe_ops::")]
    names = {name.split("::")[1] for name in schemas}
    silent = {n for n in names if getattr(torch.ops.moe_ops, n) not in flop_registry}
    assert {n.removesuffix("_bwd") for n in silent} == WITHOUT_PRODUCTS


def flops(call: Callable[[], torch.Tensor], training: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        y = call()
        if training:
            y.square().sum().backward()
    return counter.get_total_flops()


E, K, T, H, I = 4, 2, 6, 10, 7


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def one_by_one(x, w_gate_up, w_down, ids, gated: bool) -> torch.Tensor:
    """moe_ffn of routing weights one, a slot at a time."""
    slots = []
    for t in range(T):
        for e in ids[t].tolist():
            h = x[t : t + 1] @ w_gate_up[e].T
            slots.append((h[:, ::2] * h[:, 1::2] if gated else h) @ w_down[e].T)
    return torch.cat(slots)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "silu"])
def test_moe_ffn(activation, training):
    gated = activation == "swiglu"
    x, w_gate_up, w_down = leaf(T, H), leaf(E, (1 + gated) * I, H), leaf(E, H, I)
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    weights = torch.ones(T, K)
    ours = flops(
        lambda: moe_ops.moe_ffn(x, w_gate_up, w_down, weights, ids, activation=activation), training
    )
    assert ours == flops(lambda: one_by_one(x, w_gate_up, w_down, ids, gated), training)
    if not training:
        codes, scales = zip(
            *(quantize_weight(w.detach(), "int8") for w in (w_gate_up, w_down)), strict=True
        )
        assert ours == flops(
            lambda: moe_ops.moe_ffn_quantized(
                x.detach(), codes[0], scales[0], codes[1], scales[1], weights, ids,
                format="int8", activation=activation,
            ),
            False,
        )  # fmt: skip
        frozen = [w.detach() for w in (w_gate_up, w_down)]
        wanted = flops(
            lambda: moe_ops.moe_ffn(x, *frozen, weights, ids, activation=activation), True
        )
        assert wanted == flops(
            lambda: moe_ops.moe_ffn_quantized(
                x, codes[0], scales[0], codes[1], scales[1], weights, ids, format="int8",
                activation=activation,
            ),
            True,
        )  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
def test_grouped_gemm(training):
    a, b = leaf(T, H), leaf(E, I, H)
    offsets = torch.tensor([0, 2, 2, 5, T])
    rows = [slice(s, e) for s, e in pairwise(offsets.tolist())]
    assert flops(lambda: moe_ops.grouped_gemm(a, b, offsets), training) == flops(
        lambda: torch.cat([a[r] @ b[e].T for e, r in enumerate(rows)]), training
    )


@pytest.mark.parametrize("training", [False, True])
def test_router_linear(training):
    x, w = leaf(T, H), leaf(E, H)
    assert flops(lambda: moe_ops.router_linear(x, w), training) == flops(lambda: x @ w.T, training)


@pytest.mark.parametrize("training", [False, True])
def test_all_experts_ffn(training):
    x, w_up, w_down, inputs = leaf(T, 1, H), leaf(E, I, H), leaf(E, 3, I), torch.zeros(E, dtype=int)
    assert flops(lambda: moe_ops.all_experts_ffn(x, w_up, w_down, inputs), training) == flops(
        lambda: torch.stack([(x[:, 0] @ w_up[e].T).relu() @ w_down[e].T for e in range(E)]),
        training,
    )


@pytest.mark.parametrize("training", [False, True])
def test_mixture_of_attention_heads(training):
    x, w_query, w_output = leaf(T, H), leaf(E, I, H), leaf(E, H, I)
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])

    def ours() -> torch.Tensor:
        h = moe_ops.moe_linear_map(x, w_query, ids)
        return moe_ops.moe_linear_reduce(h, w_output, torch.ones(T, K), ids)

    def plain() -> torch.Tensor:
        pairs = [(t, e) for t in range(T) for e in ids[t].tolist()]
        return torch.cat([x[t : t + 1] @ w_query[e].T @ w_output[e].T for t, e in pairs])

    assert flops(ours, training) == flops(plain, training)


def test_attention():
    q, k, v = torch.randn(2, 5, 1, 3, 4), torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    heads = [t.flatten(1, -3).transpose(1, 2) for t in (q, k, v)]
    assert flops(lambda: moe_ops.moa_attention(q, k, v, kind="softmax"), False) == flops(
        lambda: torch.softmax(heads[0] @ heads[1].mT, -1) @ heads[2], False
    )


@pytest.mark.parametrize("training", [False, True])
def test_peer_ffn(training):
    """The op counts as moe_ffn of one neuron does."""
    x, w_gate_up, w_down = leaf(T, H), leaf(E, 2, H), leaf(E, H, 1)
    ids, weights = torch.randint(E, (T, K)), torch.ones(T, K)
    call = x, w_gate_up, w_down, weights, ids
    ours = flops(lambda: moe_ops.peer_ffn(*call, activation="swiglu"), training)
    assert ours == flops(lambda: moe_ops.moe_ffn(*call), training) > 0


@pytest.mark.parametrize("bottleneck", [False, True])
def test_latent_attention(bottleneck):
    heads, rank, nope, rope, value, narrow = 3, 5, 4, 2, 6, 8

    def call(function) -> torch.Tensor:
        q_depth = narrow if bottleneck else H
        kept = torch.zeros(2, 1, 9, rank), torch.zeros(2, 1, 9, rope)
        angles = torch.ones(1, 2, 1)
        return function(
            torch.ones(2, 2, H),
            torch.ones(heads * (nope + rope), q_depth),
            torch.ones(rank + rope, H),
            torch.ones(rank),
            torch.ones(heads * (nope + value), rank),
            torch.ones(H, heads * value),
            angles, angles, *kept, 6,
            num_heads=heads, scale=1.0, w_q_a=torch.ones(narrow, H) if bottleneck else None,
        )  # fmt: skip

    assert flops(lambda: call(moe_ops.mla_decode), False) == flops(
        lambda: call(moe_ops.reference.mla_decode), False
    )
