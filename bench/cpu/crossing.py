"""Time that `moe_ops.hf.place` adds to a layer's experts, with a CPU in place of the GPU.

    python -m bench.cpu.crossing

It is that of the copies and of Python; a GPU adds its transfers and the wait for its event.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from moe_ops._seam import run_on_cpu

HIDDEN, TOP_K = 2048, 8
TOKENS = (1, 16, 512)
CALLS, ROUNDS = 100, 9


def microseconds(call: Callable[[], object]) -> float:
    """Returns the time per call, the minimum of several rounds."""
    found = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append((time.perf_counter() - start) / CALLS * 1e6)
    return min(found)


def experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    return x * 1


def measure(tokens: int) -> tuple[float, float]:
    """Returns the time added to a forward without gradients, and to a forward and backward."""
    x = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16)
    routing = torch.zeros(tokens, TOP_K, dtype=torch.long), torch.rand(tokens, TOP_K)
    leaf, gradient = x.clone().requires_grad_(), torch.ones_like(x)
    with torch.no_grad():
        forward = microseconds(lambda: run_on_cpu(experts, x, *routing))
        forward -= microseconds(lambda: experts(x, *routing))
    both = microseconds(lambda: run_on_cpu(experts, leaf, *routing).backward(gradient))
    return forward, both - microseconds(lambda: experts(leaf, *routing).backward(gradient))


def main() -> None:
    print("tokens  forward  forward and backward (us)")
    for tokens in TOKENS:
        forward, both = measure(tokens)
        print(f"{tokens:6}  {forward:7.1f}  {both:7.1f}")


if __name__ == "__main__":
    main()
