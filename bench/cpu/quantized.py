"""Quantized weights: int8 with a scale per row, int4 with one per group, fp8 and mxfp4 in the CPU
benchmark, and all formats of moe_ffn_quantized, including those of published checkpoints:

    python -m bench.cpu.quantized --seconds 2
    python -m bench.cpu.quantized --formats "int4 g64" q4_k --tokens 1 --isa avx2
"""

from __future__ import annotations

import argparse
import functools
import gc
from collections.abc import Callable, Iterator

import torch
from tests.helpers.quantized import STORED, any_format
from torch import Tensor

import moe_ops
from bench.harness.arguments import seconds, whole
from moe_ops import _library, memory, quant
from moe_ops.bench import machine
from moe_ops.bench.baselines import Bind, Call, MoeOps, MoeOpsPacked
from moe_ops.bench.measure import Cells, Session, forward_cells
from moe_ops.bench.shapes import INT4_GROUP, SHAPES, Bank, Shape, Tokens, make_bank
from moe_ops.bench.timing import measure


def run_quantized(session: Session) -> Cells:
    """Measures quantized baselines on weights converted from bf16, and our own bf16 (`bf16
    moe_ops`)."""
    cells = []
    for shape in session.plan.quantized_shapes:
        bank = make_bank(SHAPES[shape], torch.bfloat16)
        for weight_format in MoeOpsQuantized.formats:
            cells += forward_cells(session, bank, weight_format, [Bfloat16()])
        del bank
        gc.collect()
    return cells


class Bfloat16(MoeOpsPacked):
    """Our bf16 among quantized baselines."""

    name = "bf16 moe_ops"
    formats = ()


class MoeOpsQuantized(MoeOps):
    """Runs moe_ffn_quantized with one scale per row for int8, one per INT4_GROUP weights for int4,
    one per 128 x 128 weights for fp8 and one per 32 weights for mxfp4."""

    name = "moe_ops quantized"
    formats = ("int8", "int4", "fp8", "mxfp4")

    def prepare(self, bank: Bank, weight_format: str) -> Bind:
        name = f"int4 g{INT4_GROUP}" if weight_format == "int4" else weight_format
        weights = (
            *quantize(bank.w_gate_up, weight_format, INT4_GROUP),
            *quantize(bank.w_down, weight_format, INT4_GROUP),
        )
        memory.use_huge_pages(*weights)

        def bind(tokens: Tokens) -> Call:
            routing = (tokens.topk_weights, tokens.topk_ids)
            return lambda: moe_ops.moe_ffn_quantized(tokens.x, *weights, *routing, format=name)

        return bind


def quantize(w: Tensor, weight_format: str, group: int) -> tuple[Tensor, Tensor]:
    """Rounds [E, O, D] expert by expert, since each is widened to fp32. `group` is that of int4."""
    name = f"int4 g{group}" if weight_format == "int4" else weight_format
    to_codes = _mxfp4 if name == "mxfp4" else functools.partial(quant.quantize_weight, format=name)
    experts = [to_codes(expert) for expert in w]
    return torch.stack([q for q, _ in experts]), torch.stack([scale for _, scale in experts])


def _mxfp4(w: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds [O, D] to e2m1 numbers with a power of two per 32 of them, as OCP's MX standard."""
    groups = w.float().unflatten(-1, (-1, 32))
    exponents = groups.abs().amax(-1, keepdim=True).log2().floor().clamp(min=-125) - 2
    sizes = groups.abs() / exponents.exp2()
    # Halfway between the numbers 0, 0.5, 1, 1.5, 2, 3, 4 and 6.
    codes = torch.bucketize(sizes, torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]))
    codes = (codes | (groups < 0).long() << 3).flatten(-2).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents.squeeze(-1) + 127).to(torch.uint8)


# All formats, one by one.

# float32 is the reference: the weights that the formats replace.
ALL = ("float32", "int8", "int4 g32", "int4 g64", *STORED)


class Layer:
    """One layer in one format, with random quantized values and scales."""

    def __init__(self, name: str, shape: Shape) -> None:
        self.shape, self.name = shape, name
        self.weights: dict[str, Tensor] = {}
        for weight, features, depth in (
            ("w_gate_up", 2 * shape.I, shape.H),
            ("w_down", shape.H, shape.I),
        ):
            # All experts get the values of one expert: they are slow to generate, and contents do
            # not affect speed.
            for part, value in any_format(name, 1, features, depth).items():
                all_experts = torch.empty(shape.E, *value.shape[1:], dtype=value.dtype)
                memory.use_huge_pages(all_experts)
                self.weights[weight + part] = all_experts.copy_(value.expand_as(all_experts))
        self.op: Callable[..., Tensor] = moe_ops.moe_ffn
        if name != "float32":
            self.op = functools.partial(moe_ops.moe_ffn_quantized, format=name)

    @property
    def expert_bytes(self) -> float:
        return sum(w.nbytes for w in self.weights.values()) / self.shape.E

    def calls(self, count: int, dtype: torch.dtype) -> list[Callable[[], Tensor]]:
        """Returns calls with `count` tokens each, which use other experts from call to call and all
        of them in turn, so that no call finds its weights in a cache."""
        H, E, K = self.shape.H, self.shape.E, self.shape.K
        generator = torch.Generator().manual_seed(1)
        turns = max(1, E // (count * K))
        ids = torch.randperm(E, generator=generator).int().repeat(-(-turns * count * K // E))
        ids = ids[: turns * count * K].view(turns, count, K)
        weights = torch.full((count, K), 1 / K)
        x = torch.randn(count, H, generator=generator).to(dtype)

        def call(ids: Tensor) -> Callable[[], Tensor]:
            return lambda: self.op(x=x, topk_weights=weights, topk_ids=ids, **self.weights)

        return [call(turn) for turn in ids]


def rows(
    names: list[str], shape: Shape, tokens: list[int], dtype: torch.dtype, budget_s: float
) -> Iterator[str]:
    """Returns one table line per format: the fastest of interleaved samples."""
    layers = {name: Layer(name, shape) for name in names}
    yield (
        f"| {shape}, {dtype}, {_library.cpu_isa()} | MB an expert | "
        + " | ".join(f"T {T}: ms | GB/s" for T in tokens)
        + " |"
    )
    yield "|---" * (2 + 2 * len(tokens)) + "|"
    cells: dict[str, list[str]] = {name: [] for name in names}
    for T in tokens:
        calls = {name: layer.calls(T, dtype) for name, layer in layers.items()}
        jobs = {name: lambda found=found: [c() for c in found] for name, found in calls.items()}
        for name, samples in measure(jobs, budget_s=budget_s, max_rounds=1000).items():
            s = min(samples.used.values()) / len(calls[name])
            read = layers[name].expert_bytes * min(shape.E, T * shape.K)
            cells[name] += [f"{s * 1e3:.3f}", f"{read / s * 1e-9:.1f}"]
    for name in names:
        yield f"| {name} | {layers[name].expert_bytes * 1e-6:.2f} | {' | '.join(cells[name])} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.cpu.quantized", description=__doc__)
    parser.add_argument("--formats", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--shape", choices=SHAPES, default="a32")
    parser.add_argument("--tokens", nargs="+", type=whole(1, 4096), default=[1, 4, 16, 128])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--isa", choices=machine.ISA_ENVIRONMENTS, help="hold everything to it")
    parser.add_argument("--seconds", type=seconds, default=2.0, help="a number of tokens")
    arguments = parser.parse_args()
    machine.hold_to_isa(arguments.isa)
    torch.set_num_threads(1)
    with torch.no_grad():
        shape, dtype = SHAPES[arguments.shape], getattr(torch, arguments.dtype)
        for line in rows(arguments.formats, shape, arguments.tokens, dtype, arguments.seconds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
