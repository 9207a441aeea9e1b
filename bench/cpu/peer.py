"""Speed-up of peer_ffn: experts of one neuron against torch's operations.

    python -m bench.cpu.peer [--seconds 120] [--dtype float32] [--experts 65536:256,262144:512]

8 heads of 16 experts per token, with given scores, so that routers do not count. The baselines are

- "gather": both tables' vectors by `F.embedding` and two einsums, as PEER is usually written;
- "parts": the gather form in chunks of 2^20 elements, with `F.embedding_bag` for the second half,
which keeps the gathered vectors in cache.

Rows are forward, forward and backward with dense gradients of the tables, and with sparse ones
(coalesced, as optimizers need them; `F.embedding_bag` has none with weights). Everything runs
interleaved in one process on one thread; the minimum time of each counts, which limits the
influence of other work on the machine. With few tokens, every sample uses other experts, so that no
cache holds them.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_ops
from bench.harness.arguments import seconds
from moe_ops.bench.timing import interleave

SLOTS = 8 * 16
TOKENS = (1, 16, 256, 2048)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PART = 1 << 20
Call = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def ours(x: Tensor, up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, sparse: bool) -> Tensor:
    return moe_ops.peer_ffn(x, up, down, weights, ids, sparse_grad=sparse)


def gather(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, sparse: bool
) -> Tensor:
    u = F.embedding(ids, up.squeeze(1), sparse=sparse)
    h = F.gelu(torch.einsum("th,tkh->tk", x, u)) * weights.to(x.dtype)
    return torch.einsum("tk,tkh->th", h, F.embedding(ids, down.squeeze(2), sparse=sparse))


class Dots(torch.autograd.Function):
    """Computes y[t, k] = x[t] . table[ids[t, k]], some tokens at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(x, table, ids)
        size = max(1, PART // (ids.shape[1] * x.shape[1]))
        pairs = zip(x.split(size), ids.split(size), strict=True)
        return torch.cat([torch.bmm(F.embedding(i, table), p[..., None])[..., 0] for p, i in pairs])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,), (x, table, ids) = grads, ctx.saved_tensors
        size = max(1, PART // (ids.shape[1] * x.shape[1]))
        grad_x = F.embedding_bag(ids, table, mode="sum", per_sample_weights=grad.contiguous())
        grad_table = torch.zeros_like(table)
        for p, i, g in zip(x.split(size), ids.split(size), grad.split(size), strict=True):
            added = (g[..., None] * p[:, None]).flatten(0, 1)
            grad_table.index_add_(0, i.reshape(-1), added)
        return grad_x, grad_table, None


def parts(x: Tensor, up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, _: bool) -> Tensor:
    h = F.gelu(Dots.apply(x, up.squeeze(1), ids)) * weights.to(x.dtype)
    return F.embedding_bag(ids, down.squeeze(2), mode="sum", per_sample_weights=h)


WAYS: dict[str, Callable[..., Tensor]] = {"moe_ops": ours, "gather": gather, "parts": parts}


def step(way: str, mode: str, call: Call, grad: Tensor) -> None:
    if mode == "forward":
        with torch.no_grad():
            WAYS[way](*call, False)
        return
    y = WAYS[way](*call, mode == "sparse")
    for gradient in torch.autograd.grad(y, call[:4], grad):
        if gradient.is_sparse:
            gradient.coalesce()


def measure(experts: int, hidden: int, tokens: int, mode: str, dtype: torch.dtype,
            budget_s: float) -> dict[str, float]:  # fmt: skip
    """Returns minimum seconds per call for each form."""
    up = torch.randn(experts, 1, hidden, dtype=dtype).mul_(hidden**-0.5)
    down = torch.randn(experts, hidden, 1, dtype=dtype).mul_(SLOTS**-0.5)
    weights = torch.rand(tokens, SLOTS)
    leaves = [torch.randn(tokens, hidden, dtype=dtype), up, down, weights]
    x, up, down, weights = (t.requires_grad_(mode != "forward") for t in leaves)
    draws = [torch.randint(experts, (tokens, SLOTS)) for _ in range(max(1, 512 // tokens))]
    grad = torch.randn(tokens, hidden, dtype=dtype)
    ways = [way for way in WAYS if mode != "sparse" or way != "parts"]
    least = dict.fromkeys(ways, float("inf"))
    end = time.perf_counter() + budget_s

    def sample(way: str, number: int) -> None:
        place = (number * len(ways) + ways.index(way)) % len(draws)
        call = x, up, down, weights, draws[place]
        start = time.perf_counter()
        step(way, mode, call, grad)
        if number:  # The first one warms up.
            least[way] = min(least[way], time.perf_counter() - start)

    interleave(ways, sample, lambda number: number < 4 or time.perf_counter() < end)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu.peer", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seconds", type=seconds, default=120.0, help="of measuring (120)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--experts", default="65536:256,262144:512", help="E:H, several by commas")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    options = parser.parse_args()
    sizes = [tuple(map(int, size.split(":"))) for size in options.experts.split(",")]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gc.disable()
    modes = ("forward", "dense", "sparse")
    budget = options.seconds / (len(sizes) * len(options.tokens) * len(modes))
    names = ["E", "H", "T", "", *(f"{way}, ms" for way in WAYS), "gather / ", "parts / "]
    print("| " + " | ".join(f"{n}moe_ops" if n.endswith("/ ") else n for n in names) + " |")
    print("|" + "---|" * 9)
    for experts, hidden in sizes:
        for tokens in options.tokens:
            for mode in modes:
                least = measure(experts, hidden, tokens, mode, DTYPES[options.dtype], budget)
                ms = [f"{1e3 * least[way]:.2f}" if way in least else "" for way in WAYS]
                ratios = [
                    f"{least[way] / least['moe_ops']:.1f}" if way in least else ""
                    for way in ("gather", "parts")
                ]
                label = mode if mode == "forward" else f"and backward, {mode}"
                cells = [str(experts), str(hidden), str(tokens), label, *ms, *ratios]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
