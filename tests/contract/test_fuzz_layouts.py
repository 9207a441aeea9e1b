"""Random right calls whose operands lie in memory in random ways, compared with the fp64 reference.

Kernels choose how they read a matrix by its strides, type and sizes and by the rows of an expert;
here all of these are drawn together.
"""

from __future__ import annotations

import random
import zlib

import pytest
import torch
from tests.helpers.ffn import ffn_operands, moe_ffn_magnitude
from tests.helpers.routing import Routing
from torch import Tensor

import moe_ops
from moe_ops import reference
from moe_ops.testing import DTYPES, acc_dtype, check_against_reference, short

NUM_CHUNKS = 30
CALLS_A_CHUNK = 8

# Vectors of every instruction set divide some of them, and some are longer than a block.
WIDTHS = (1, 5, 8, 16, 24, 31, 32, 48, 64, 96, 97, 128, 160, 200, 256, 260, 320)
ROUTINGS = ("uniform", "skewed", "one_expert", "half_empty", "dropped")
LAYOUTS = ("contiguous", "contiguous", "offset", "permuted", "gaps")
GRAD_VIEWS = ("contiguous", "transposed", "offset", "step2_last", "expanded")


def laid_out(t: Tensor, kind: str, rng: random.Random) -> Tensor:
    """A tensor of t's shape in another layout, NaN between its elements: `t` itself, or, where
    `kind` is expanded, its first line along one or two dimensions, repeated with stride 0."""
    source = t
    order = list(range(t.dim()))
    steps, gaps = [1] * t.dim(), [0] * t.dim()
    if kind == "expanded":
        for d in rng.sample(order, rng.randint(1, min(2, t.dim()))):
            source = source.narrow(d, 0, 1)
    elif kind == "permuted":
        rng.shuffle(order)
    elif kind == "gaps":
        steps = [rng.choice((1, 1, 2, 3)) for _ in order]
        gaps = [rng.choice((0, 1, 3, 16)) for _ in order]
    strides, length = [0] * t.dim(), 1
    for d in reversed(order):
        strides[d] = length * steps[d]
        length = strides[d] * source.shape[d] + gaps[d]
    start = rng.choice((1, 2, 3, 8)) if kind == "offset" else 0
    memory = t.new_full((start + length,), torch.nan)
    view = memory.as_strided(source.shape, strides, start)
    return view.copy_(source).expand(t.shape)


def lay_out(call: dict, rng: random.Random) -> None:
    """Every floating-point tensor of the call anew. One at most is expanded: sums of one number
    over and over would round to the same side."""
    names = [name for name, v in call.items() if isinstance(v, Tensor) and v.is_floating_point()]
    expanded = rng.choice([*names, None])
    for name in names:
        kind = "expanded" if name == expanded else rng.choice(LAYOUTS)
        call[name] = laid_out(call[name], kind, rng)


def offsets_of(rng: random.Random, num_rows: int, num_experts: int) -> Tensor:
    cuts = sorted(rng.randint(0, num_rows) for _ in range(num_experts - 1))
    return torch.tensor([0, *cuts, num_rows], dtype=torch.int32)


def check_call(op: str, rng: random.Random) -> str:
    """Compares one call of the op. Returns its fault, with what the call was, or nothing."""
    dtype = rng.choice(DTYPES)
    routing = Routing(
        rng.choice((1, 2, 3, 5, 8, 13, 20, 33, 47, 90)),
        rng.choice((1, 2, 3, 8)),
        rng.choice((1, 2)),
        rng.choice(ROUTINGS),
        rng.choice((torch.int32, torch.int64)),
    )
    h, i = rng.choice(WIDTHS), rng.choice(WIDTHS)
    bias = rng.random() < 0.3
    tokens, e, k = routing.num_tokens, routing.num_experts, routing.top_k
    steps = grad_steps = 0
    magnitude = None

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    match op:
        case "grouped_gemm":
            call = {
                "a": drawn(tokens * k, h),
                "b": drawn(e, i, h),
                "expert_offsets": offsets_of(rng, tokens * k, e),
            }
            if bias:
                call["bias"] = drawn(e, i)
        case "moe_linear_map":
            call = {"x": drawn(tokens, h), "w": drawn(e, i, h), "topk_ids": routing.ids()}
            if bias:
                call["bias"] = drawn(e, i)
            grad_steps = 1
        case "moe_linear_reduce":
            call = {
                "h": drawn(tokens, k, i),
                "w": drawn(e, h, i),
                "topk_weights": torch.rand(tokens, k).to(acc_dtype(dtype)) + 0.1,
                "topk_ids": routing.ids(),
            }
            if bias:
                call["bias"] = drawn(e, h)
            steps, grad_steps = 1, 2
        case _:
            activation = rng.choice(("swiglu", "silu"))
            call = ffn_operands(routing, h, i, dtype, activation=activation, bias=bias)
            magnitude, steps, grad_steps = moe_ffn_magnitude, 2, 5
    lay_out(call, rng)
    wrt = [name for name, v in call.items() if isinstance(v, Tensor) and v.is_floating_point()]
    what = f"{op} {short(dtype)} {routing} H{h} I{i} " + " ".join(
        f"{name}{call[name].stride()}" for name in wrt
    )
    if op == "moe_ffn_packed":
        halves = activation == "swiglu"
        call["packed_gate_up"] = moe_ops.pack_experts(call["w_gate_up"], halves=halves)
        call["packed_down"] = moe_ops.pack_experts(call["w_down"])
        wrt = []
    try:
        check_against_reference(
            getattr(moe_ops, op),
            getattr(reference, op),
            call,
            wrt,
            magnitude=magnitude,
            sum_length=max(h, i, tokens * k),
            steps=steps,
            grad_steps=grad_steps,
            grad_view=rng.choice(GRAD_VIEWS),
        )
    except AssertionError as error:
        return f"{what}: {error}"
    return ""


@pytest.mark.slow_on_simulator
@pytest.mark.parametrize("chunk", range(NUM_CHUNKS))
@pytest.mark.parametrize(
    "op", ["grouped_gemm", "moe_linear_map", "moe_linear_reduce", "moe_ffn", "moe_ffn_packed"]
)
def test_layouts(op, chunk):
    faults = []
    for index in range(CALLS_A_CHUNK):
        rng = random.Random(zlib.crc32(f"{op}-{chunk}-{index}".encode()))
        torch.manual_seed(rng.randrange(2**31))
        faults.append(check_call(op, rng))
    assert not any(faults), "\n".join(filter(None, faults))
