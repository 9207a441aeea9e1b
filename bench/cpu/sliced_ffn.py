"""Speed-up of FactorLLM's layer: slices of a feed-forward network against the whole.

    python -m bench.cpu.sliced_ffn [--seconds 60] [--dtype float32]

TinyLlama's sizes (H 2048, I 5632), cut into 4 slices of which a token uses 1, 2 or 3, router
included, against the dense network in torch and as one expert of `moe_ops.moe_ffn`. Everything runs
interleaved in one process on one thread. The minimum processor time of each counts, which limits
the influence of other work on the machine. Weights are packed beforehand if the layer has a packed
form.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.harness.arguments import seconds
from moe_ops import packing, upcycle
from moe_ops.bench.timing import interleave
from moe_ops.layers import MoE, SharedExperts
from moe_ops.zoo.factorllm import SliceRouter

HIDDEN, WIDTH, SLICES = 2048, 5632, 4
TOKENS = (1, 16, 128, 512)
DENSE = ("torch", "one expert")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def layers(dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """Returns layers by name, [T, H] to [T, H]; all from one dense network."""
    dense = SharedExperts(HIDDEN, WIDTH, dtype=dtype).eval()
    bank = upcycle.experts_from_dense(dense).eval()
    packing.pack_weights(bank)

    def one_expert(x: Tensor) -> Tensor:
        ids = torch.zeros(len(x), 1, dtype=torch.int32)
        return bank(x, torch.ones(len(x), 1), ids)

    found: dict[str, Callable[[Tensor], Tensor]] = {"torch": dense, "one expert": one_expert}
    for top_k in range(1, SLICES):
        router = SliceRouter(HIDDEN, SLICES, top_k, bias=True, dtype=dtype)
        layer = MoE(router, upcycle.slice_experts(upcycle.experts_from_dense(dense), SLICES)).eval()
        layer.pack_weights()
        found[f"{top_k} of {SLICES}"] = layer
    return found


@torch.no_grad()
def measure(dtype: torch.dtype, budget_s: float) -> dict[int, dict[str, float]]:
    """Returns minimum processor seconds per call, by tokens and layer."""
    made, result = layers(dtype), {}
    for tokens in TOKENS:
        x = torch.randn(tokens, HIDDEN).to(dtype)
        least = dict.fromkeys(made, float("inf"))
        end = time.perf_counter() + budget_s / len(TOKENS)

        def sample(name: str, number: int, x: Tensor = x, least: dict[str, float] = least) -> None:
            start = time.thread_time()
            made[name](x)
            if number:  # The first one warms up.
                least[name] = min(least[name], time.thread_time() - start)

        interleave(
            list(made), sample, lambda number, end=end: number < 4 or time.perf_counter() < end
        )
        result[tokens] = least
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu.sliced_ffn", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seconds", type=seconds, default=60.0, help="of measuring (60)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gc.disable()
    result = measure(DTYPES[options.dtype], options.seconds)
    names = list(next(iter(result.values())))
    sparse = [name for name in names if name not in DENSE]
    print("| T | " + " | ".join(f"{n}, ms" for n in names) + " | "
          + " | ".join(f"{n} / faster dense" for n in sparse) + " |")  # fmt: skip
    print("|" + "---|" * (1 + len(names) + len(sparse)))
    for tokens, least in result.items():
        dense = min(least[name] for name in DENSE)
        cells = [f"{1e3 * least[n]:.2f}" for n in names]
        cells += [f"{least[n] / dense:.2f}" for n in sparse]
        print(f"| {tokens} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
