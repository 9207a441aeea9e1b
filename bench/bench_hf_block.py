"""Times one sparse block of Hugging Face's Qwen3-MoE with each experts implementation.

    python bench/bench_hf_block.py [--tokens 512 --hidden 1024 ... --json result.json]

The implementations run in one process, in turns, so that a change of the machine's speed meets all
of them; times are medians over rounds and ratios the median of the rounds' ratios. Outputs and
gradients are checked against the same block in fp64 first. With several `--threads` values, each is
measured in turn.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import moe_ops.hf

IMPLEMENTATIONS = ("eager", "grouped_mm", "moe_ops")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="T")
    parser.add_argument("--hidden", type=int, default=1024, help="H")
    parser.add_argument("--intermediate", type=int, default=512, help="I of one expert")
    parser.add_argument("--experts", type=int, default=32, help="E")
    parser.add_argument("--top-k", type=int, default=4, help="K")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS)
    )
    parser.add_argument("--json", type=Path, help="also write the result to this file ('-': print)")
    return parser.parse_args(argv)


def make_block(arguments: argparse.Namespace) -> nn.Module:
    config = Qwen3MoeConfig(
        hidden_size=arguments.hidden,
        moe_intermediate_size=arguments.intermediate,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = "eager"
    block = Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return block.to(DTYPES[arguments.dtype])


def choose(block: nn.Module, implementation: str) -> None:
    block.experts.config._experts_implementation = implementation


def forward(block: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return block(x)


def forward_backward(block: nn.Module, x: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
    y = block(x)
    return (y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], grad_y))


def check(
    block: nn.Module, x: Tensor, grad_y: Tensor, implementations: list[str]
) -> dict[str, float]:
    """Worst relative error (Frobenius) of output and gradients; raises where rounding cannot be it.

    Truth is the experts in fp64 with the block's own routing, which rounding must not change.
    """
    _, topk_weights, topk_ids = block.gate(x.flatten(0, 1))
    experts = block.experts
    leaves = [x.flatten(0, 1), topk_weights, experts.gate_up_proj, experts.down_proj]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]

    def run(implementation: str, double: bool) -> list[Tensor]:
        choose(block, implementation)
        inputs = [leaf.double() if double else leaf for leaf in leaves]
        parameters = {"gate_up_proj": inputs[2], "down_proj": inputs[3]}
        arguments = (inputs[0], topk_ids, inputs[1])
        y = torch.func.functional_call(experts, parameters, arguments)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.flatten(0, 1).to(y.dtype))]

    truth = run("eager", double=True)
    # Half types round a handful of intermediate results; fp32 sums have at most this many terms.
    longest = max(x.shape[-1], experts.down_proj.shape[-1], x.shape[0] * x.shape[1])
    terms = 8 if x.dtype == torch.bfloat16 else longest**0.5
    bound = terms * torch.finfo(x.dtype).eps
    errors = {}
    for implementation in implementations:
        results = run(implementation, double=False)
        errors[implementation] = max(
            float((a.double() - b.double()).norm() / b.double().norm())
            for a, b in zip(results, truth, strict=True)
        )
        if not errors[implementation] <= bound:
            raise SystemExit(
                f"{implementation}: relative error {errors[implementation]:.2e} of output or "
                f"gradients is beyond the {bound:.2e} that rounding explains"
            )
    return errors


def alternate(jobs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every job in every round; the order turns with the rounds."""
    for job in jobs.values():
        job()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for round_number in range(rounds):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            jobs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    block = make_block(arguments)
    dtype = DTYPES[arguments.dtype]
    x = torch.randn(1, arguments.tokens, arguments.hidden).to(dtype).requires_grad_()
    grad_y = torch.randn(1, arguments.tokens, arguments.hidden).to(dtype)
    result: dict[str, Any] = {
        "shape": {
            "T": arguments.tokens,
            "H": arguments.hidden,
            "I": arguments.intermediate,
            "E": arguments.experts,
            "K": arguments.top_k,
        },
        "dtype": arguments.dtype,
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "moe_ops": moe_ops.__version__,
        "relative_errors": check(block, x, grad_y, arguments.implementations),
        "threads": {},
    }
    calls: dict[str, Callable[[], Any]] = {
        "forward": functools.partial(forward, block, x),
        "forward_backward": functools.partial(forward_backward, block, x, grad_y),
    }

    def chosen(implementation: str, call: Callable[[], Any]) -> Callable[[], None]:
        def job() -> None:
            choose(block, implementation)
            call()

        return job

    for threads in arguments.threads:
        torch.set_num_threads(threads)
        timings: dict[str, Any] = {}
        for name, call in calls.items():
            jobs = {i: chosen(i, call) for i in arguments.implementations}
            seconds = alternate(jobs, arguments.rounds)
            ours = seconds.get("moe_ops")
            timings[name] = {
                "seconds": {i: statistics.median(values) for i, values in seconds.items()},
                "speedup_of_moe_ops": {
                    i: statistics.median(a / b for a, b in zip(values, ours, strict=True))
                    for i, values in seconds.items()
                    if ours is not None and i != "moe_ops"
                },
            }
        result["threads"][str(threads)] = timings
    return result


def print_table(result: dict[str, Any]) -> None:
    shape = " ".join(f"{letter}{value}" for letter, value in result["shape"].items())
    print(f"Qwen3-MoE sparse block, {shape}, {result['dtype']}, medians of {result['rounds']}")
    print(f"{'threads':>7} {'pass':<18} {'implementation':<14} {'ms':>9} {'vs moe_ops':>11} error")
    for threads, timings in result["threads"].items():
        for name, timing in timings.items():
            for implementation, seconds in timing["seconds"].items():
                ratio = timing["speedup_of_moe_ops"].get(implementation)
                print(
                    f"{threads:>7} {name:<18} {implementation:<14} {seconds * 1e3:9.2f} "
                    f"{'' if ratio is None else f'{ratio:.2f}x':>11} "
                    f"{result['relative_errors'][implementation]:.1e}"
                )


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    result = measure(arguments)
    if arguments.json is not None and str(arguments.json) == "-":
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    print_table(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
