"""Training step of one layer of experts: `ExpertLoRA` against frozen experts, full training and
kt-kernel.

    python -m bench.cpu.expert_lora [--seconds 2] [--tokens 16 64 512] [--formats bfloat16 int4]

A step is forward and backward to the tokens, the routing weights and what is trained: nothing, the
factors of rank 8, or all weights. Steps alternate in one process on one thread; medians are over
steps that did not wait for a core. Output and gradients of LoRA are compared with fp64 first.
`bench.peers.kt_kernel` describes on which cores a process with kt-kernel must run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import moe_ops
from bench.harness.arguments import seconds, whole
from bench.peers import kt_kernel
from bench.peers.kt_kernel_lora import KTExpertLoRA, joined
from moe_ops.bench.baselines import tolerance
from moe_ops.bench.measure import relative_error
from moe_ops.bench.timing import Samples, measure, speedup
from moe_ops.layers import ExpertLoRA, Experts
from moe_ops.quant import dequantize_weight

RANK, GROUP = 8, 32
KT = "kt-kernel"
# H, I, E, K
SHAPES = {"small": (256, 512, 16, 2), "a32": (2048, 768, 32, 8)}
FORMATS = ("bfloat16", "int4")
FACTORS = ("a_gate_up", "b_gate_up", "a_down", "b_down")
# Of a step with LoRA.
RESULTS = ("y", *(f"the gradient of {name}" for name in ("x", "topk_weights", *FACTORS)))

# x, topk_weights, topk_ids, gradient of the output
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


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


def make_inputs(shape: tuple[int, ...], tokens: int) -> Inputs:
    hidden, _, experts, top_k = shape
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(tokens, top_k, requires_grad=True)
    ids = torch.rand(tokens, experts).topk(top_k).indices.int()
    return x, weights, ids, torch.randn(tokens, hidden, dtype=torch.bfloat16)


def step_of(layer: nn.Module, inputs: Inputs) -> Callable[[], list[Tensor]]:
    """Returns a step, which returns y and the gradients of x, the routing weights and what is
    trained."""
    x, weights, ids, grad = inputs
    leaves = [x, weights, *(p for p in layer.parameters() if p.requires_grad)]

    def step() -> list[Tensor]:
        y = layer[0](x, weights, ids)
        y.backward(grad)
        results = [y, *(leaf.grad for leaf in leaves)]
        for leaf in leaves:
            leaf.grad = None
        return results

    return step


def exact(lora: ExpertLoRA, inputs: Inputs) -> list[Tensor]:
    """Returns what a step of `lora` returns, in fp64."""
    x, weights, ids, grad = inputs
    leaves = [leaf.detach().double().requires_grad_() for leaf in (x, weights, *factors_of(lora))]
    x, weights, a_gate_up, b_gate_up, a_down, b_down = leaves
    y = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, slot = torch.where(ids == expert)
        rows = x[token]
        low = lora.scaling * rows @ a_gate_up[expert].T @ b_gate_up[expert].T
        gate, up = (rows @ weight_of(lora, "w_gate_up", expert).T + low).chunk(2, dim=-1)
        h = nn.functional.silu(gate) * up
        low = lora.scaling * h @ a_down[expert].T @ b_down[expert].T
        out = (h @ weight_of(lora, "w_down", expert).T + low) * weights[token, slot, None]
        out.backward(grad[token].double())
        y.data.index_add_(0, token, out.detach())
    return [y, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def factors_of(lora: ExpertLoRA) -> list[nn.Parameter]:
    return [getattr(lora, name) for name in FACTORS]


def weight_of(lora: ExpertLoRA, name: str, expert: int) -> Tensor:
    """Returns an expert's weight in fp64."""
    weight = getattr(lora.experts, name)[expert].detach()
    if weight.is_floating_point():
        return weight.double()
    scale = getattr(lora.experts, f"{name}_scale")[expert]
    return dequantize_weight(weight, scale, f"int4 g{GROUP}", torch.float64)


def check(name: str, results: list[Tensor], truth: list[Tensor]) -> None:
    """Raises ValueError if a result is off by more than bf16 explains."""
    for what, found, wanted in zip(RESULTS, results, truth, strict=True):
        error = relative_error(found, wanted)
        if not error <= tolerance("bf16"):
            raise ValueError(
                f"{name}: {what} must be within {tolerance('bf16'):.1e} of fp64, got {error:.1e}."
            )


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
    absent = kt_kernel.missing()
    print(
        "| layer | weights | tokens | frozen, ms | LoRA, ms | LoRA / frozen | LoRA / full "
        "| kt-kernel, ms | kt-kernel / LoRA |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for format in options.formats:
        for name, shape in SHAPES.items():
            found = layers(shape, format)
            lora = found["lora"][0]
            peer = None if absent else KTExpertLoRA(lora, shape[-1], format, max(options.tokens))
            for tokens in options.tokens:
                inputs = make_inputs(shape, tokens)
                steps = {kind: step_of(layer, inputs) for kind, layer in found.items()}
                truth = exact(lora, inputs)
                check("ExpertLoRA", steps["lora"](), truth)
                if peer is not None:
                    steps[KT] = peer.bind(*inputs)
                    check(KT, joined(steps[KT]()), truth)
                samples = measure(steps, budget_s=options.seconds)
                print(row(name, format, tokens, samples), flush=True)
    if absent:
        print(f"\n{KT} is not compared: {absent}.")


def row(name: str, format: str, tokens: int, samples: Mapping[str, Samples]) -> str:
    ms = {
        kind: f"{1e3 * found.median:.2f}{'' if found.clean else '~'}"
        for kind, found in samples.items()
    }
    over_full, over_lora = (
        f"{speedup(samples, below, above):.2f}" if {below, above} <= samples.keys() else "-"
        for above, below in (("lora", "full"), (KT, "lora"))
    )
    return (
        f"| {name} | {format} | {tokens} | {ms['frozen']} | {ms['lora']} "
        f"| {speedup(samples, 'frozen', 'lora'):.2f} | {over_full} | {ms.get(KT, '-')} "
        f"| {over_lora} |"
    )


if __name__ == "__main__":
    main()
