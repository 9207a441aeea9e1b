"""Training step of one layer of experts: `ExpertLoRA` against frozen experts and full training.

    python -m bench.cpu.expert_lora [--seconds 2] [--tokens 16 64 512] [--formats bfloat16 int4]

A step is forward and backward to the tokens, the routing weights and what is trained: nothing, the
factors of rank 8, or all weights. Steps alternate in one process on one thread; medians are over
steps that did not wait for a core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn

import moe_ops
from bench.harness.arguments import seconds, whole
from moe_ops.bench.timing import measure
from moe_ops.layers import ExpertLoRA, Experts

RANK, GROUP = 8, 32
# H, I, E, K
SHAPES = {"small": (256, 512, 16, 2), "a32": (2048, 768, 32, 8)}
FORMATS = ("bfloat16", "int4")


def layers(shape: tuple[int, ...], format: str) -> dict[str, nn.Module]:
    hidden, inner, experts, _ = shape

    def bank() -> Experts:
        return Experts(experts, hidden, inner, dtype=torch.bfloat16)

    lora = ExpertLoRA(bank(), RANK)
    nn.init.normal_(lora.b_gate_up)
    nn.init.normal_(lora.b_down)
    found = {"frozen": nn.Sequential(bank()).requires_grad_(False), "lora": nn.Sequential(lora)}
    if format == "int4":
        for layer in found.values():
            moe_ops.quantize(layer, moe_ops.Int4WeightConfig(GROUP))
    else:
        found["full"] = nn.Sequential(bank())
    return found


def step_of(layer: nn.Module, shape: tuple[int, ...], tokens: int) -> Callable[[], None]:
    hidden, _, experts, top_k = shape
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(tokens, top_k, requires_grad=True)
    ids = torch.rand(tokens, experts).topk(top_k).indices.int()
    grad = torch.randn(tokens, hidden, dtype=torch.bfloat16)
    leaves = [x, weights, *layer.parameters()]

    def step() -> None:
        layer[0](x, weights, ids).backward(grad)
        for leaf in leaves:
            leaf.grad = None

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu.expert_lora", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seconds", type=seconds, default=2.0, help="of each cell (2)")
    parser.add_argument("--tokens", type=whole(1, 1 << 16), nargs="+", default=[16, 64, 512])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| layer | weights | tokens | frozen, ms | LoRA, ms | LoRA / frozen | LoRA / full |")
    print("|---|---|---|---|---|---|---|")
    for format in options.formats:
        for name, shape in SHAPES.items():
            found = layers(shape, format)
            for tokens in options.tokens:
                steps = {kind: step_of(layer, shape, tokens) for kind, layer in found.items()}
                samples = measure(steps, budget_s=options.seconds)
                ms = {kind: 1e3 * samples[kind].median for kind in steps}
                full = f"{ms['lora'] / ms['full']:.2f}" if "full" in ms else "-"
                print(
                    f"| {name} | {format} | {tokens} | {ms['frozen']:.2f} | {ms['lora']:.2f} "
                    f"| {ms['lora'] / ms['frozen']:.2f} | {full} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
