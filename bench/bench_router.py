"""topk_router against torch.softmax + torch.topk, forward only.

The two sides take turns, so that a slow phase of the machine hits both, and the medians of their
times are compared. Ratios above 1 mean that moe_ops is faster.

    python bench/bench_router.py --threads 1 --json router.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import moe_ops

SHAPES = ((128, 8), (16, 2))  # E, K
TOKENS = (1, 512, 2048)


def seconds(fn: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    return (time.perf_counter() - start) / calls


def compare(num_experts: int, top_k: int, num_tokens: int, repeats: int) -> dict[str, float]:
    router_logits = torch.randn(num_tokens, num_experts)

    def ours() -> object:
        return moe_ops.topk_router(router_logits, top_k)

    def torch_ops() -> object:
        return torch.topk(router_logits.softmax(-1), top_k, dim=-1)

    # One measurement of either side lasts about 5 ms.
    calls = {fn: max(1, int(5e-3 / seconds(fn, 3))) for fn in (ours, torch_ops)}
    times: dict[Callable[[], object], list[float]] = {ours: [], torch_ops: []}
    for _ in range(repeats):
        for fn, results in times.items():
            results.append(seconds(fn, calls[fn]))
    moe_us, torch_us = (1e6 * statistics.median(results) for results in times.values())
    return {
        "num_experts": num_experts,
        "top_k": top_k,
        "num_tokens": num_tokens,
        "moe_ops_us": moe_us,
        "torch_us": torch_us,
        "ratio": torch_us / moe_us,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--inference-mode", action="store_true", help="skip autograd dispatch")
    parser.add_argument("--json", metavar="PATH", help="write the results there, - for stdout")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    results = []
    table = sys.stderr if args.json == "-" else sys.stdout
    print(f"{'E':>5}{'K':>4}{'T':>6}{'moe_ops us':>12}{'torch us':>12}{'ratio':>8}", file=table)
    with torch.inference_mode(args.inference_mode):
        for num_experts, top_k in SHAPES:
            for num_tokens in TOKENS:
                r = compare(num_experts, top_k, num_tokens, args.repeats)
                results.append(r)
                print(
                    f"{num_experts:>5}{top_k:>4}{num_tokens:>6}{r['moe_ops_us']:>12.1f}"
                    f"{r['torch_us']:>12.1f}{r['ratio']:>8.2f}",
                    file=table,
                )
    if args.json:
        report = {
            "torch": torch.__version__,
            "moe_ops": moe_ops.__version__,
            "threads": args.threads,
            "inference_mode": args.inference_mode,
            "results": results,
        }
        text = json.dumps(report, indent=2)
        if args.json == "-":
            print(text)
        else:
            Path(args.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
