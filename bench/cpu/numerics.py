"""Generates the tables of docs/numerics.md: ``python -m bench.cpu.numerics``.

``python -m bench.cpu.numerics costs`` updates one of the three (equality, errors, costs). The text
around the tables is written by hand.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.helpers.ffn import ffn_operands
from tests.helpers.quantized import dequantized, label_of, quantized
from tests.helpers.routing import Routing
from torch import Tensor

import moe_ops
from bench.harness.machine import describe_machine, load, now
from moe_ops import _library, reference
from moe_ops._files import write_text
from moe_ops.bench.timing import Samples, interleave, speedup
from moe_ops.quant import quantize_fp8_blocks
from moe_ops.testing import short, widened

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "numerics.md"
TABLES = ("equality", "errors", "costs")
NUM_TOKENS = 513
BATCHES = (1, 7, 64)
DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class Case:
    """Call op(**tokens, **fixed): the tensors of `tokens` and its results have one row per
    token."""

    op: Callable[..., Any]
    tokens: dict[str, Tensor]
    fixed: dict[str, Any]

    def run(self, rows: Tensor | slice = slice(None)) -> list[Tensor]:
        result = self.op(**{name: t[rows] for name, t in self.tokens.items()}, **self.fixed)
        return [result] if isinstance(result, Tensor) else list(result)


def rows_case(op: Callable[..., Any], fixed: dict[str, Any], **tokens: Tensor) -> Case:
    return Case(op, tokens, fixed)


# The measured calls.


def ffn(
    dtype: torch.dtype,
    form: str = "plain",
    experts: int = 16,
    hidden: int = 256,
    intermediate: int = 512,
    tokens: int = NUM_TOKENS,
    top_k: int = 4,
) -> Case:
    """Returns a block of experts: plain, transposed, packed, int8, int4 or fp8 weights."""
    call = ffn_operands(Routing(tokens, experts, top_k), hidden, intermediate, torch.float32)
    per_token = {name: call.pop(name) for name in ("x", "topk_weights", "topk_ids")}
    per_token["x"] = per_token["x"].to(dtype)
    op: Callable[..., Tensor] = moe_ops.moe_ffn
    names = ("w_gate_up", "w_down")
    if form in ("int8", "int4"):
        op = moe_ops.moe_ffn_quantized
        for name in names:
            call[name], call[f"{name}_scale"] = quantized(call[name], int(form[3:]), 64)
        call["format"] = label_of(int(form[3:]), 64)
    elif form == "fp8":
        op = moe_ops.moe_ffn_fp8
        for name in names:
            call[name], call[f"{name}_scale"] = quantize_fp8_blocks(call[name])
    else:
        call |= {name: call[name].to(dtype) for name in names}
    if form == "transposed":
        call |= {name: call[name].mT.contiguous().mT for name in names}
    if form == "packed":
        op = moe_ops.moe_ffn_packed
        call["packed_gate_up"] = moe_ops.pack_experts(call["w_gate_up"], halves=True)
        call["packed_down"] = moe_ops.pack_experts(call["w_down"])
    return Case(op, per_token, call)


def grouped_gemm(dtype: torch.dtype) -> Case:
    b = (torch.randn(16, 512, 256) / 16).to(dtype)

    def op(a: Tensor, expert: Tensor) -> Tensor:
        order = expert.argsort(stable=True)
        counts = torch.bincount(expert, minlength=16)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        out = moe_ops.grouped_gemm(a[order], b, offsets)
        return torch.empty_like(out).index_copy_(0, order, out)

    a = torch.randn(NUM_TOKENS, 256).to(dtype)
    return rows_case(op, {}, a=a, expert=torch.randint(16, (NUM_TOKENS,)))


def linear_map(dtype: torch.dtype, size: int = 256, experts: int = 16) -> Case:
    w = (torch.randn(experts, size // 2, size) / size**0.5).to(dtype)
    x, ids = torch.randn(NUM_TOKENS, size).to(dtype), Routing(NUM_TOKENS, experts, 2).ids()
    return rows_case(moe_ops.moe_linear_map, {"w": w}, x=x, topk_ids=ids)


def linear_reduce(dtype: torch.dtype, size: int = 256, experts: int = 16) -> Case:
    w = (torch.randn(experts, size, size // 2) / (size / 2) ** 0.5).to(dtype)
    h, weights = torch.randn(NUM_TOKENS, 2, size // 2).to(dtype), torch.rand(NUM_TOKENS, 2)
    ids = Routing(NUM_TOKENS, experts, 2).ids()
    return rows_case(moe_ops.moe_linear_reduce, {"w": w}, h=h, topk_weights=weights, topk_ids=ids)


def all_experts_ffn(dtype: torch.dtype) -> Case:
    fixed = {
        "w_up": (torch.randn(8, 64, 160) / 160**0.5).to(dtype),
        "w_down": (torch.randn(8, 32, 64) / 8).to(dtype),
        "input_ids": torch.zeros(8, dtype=torch.int32),
        "activation": "silu",
    }
    return rows_case(moe_ops.all_experts_ffn, fixed, x=torch.randn(NUM_TOKENS, 1, 160).to(dtype))


def mix_expert_outputs(dtype: torch.dtype) -> Case:
    outputs = torch.randn(NUM_TOKENS, 8, 32).to(dtype)
    weights = torch.randn(NUM_TOKENS, 4, 8).to(dtype)
    return rows_case(
        lambda **t: moe_ops.mix_expert_outputs(**t, activation="silu")[0],
        {},
        outputs=outputs,
        weights=weights,
    )


def row_wise(dtype: torch.dtype, name: str) -> Case:
    x = torch.randn(NUM_TOKENS, 256).to(dtype)
    if name == "topk_router":
        return rows_case(moe_ops.topk_router, {"top_k": 8}, router_logits=x[:, :128])
    if name == "topp_router":
        return rows_case(moe_ops.topp_router, {"top_p": 0.5, "max_k": 8}, router_logits=x[:, :128])
    if name == "router_linear":
        return rows_case(moe_ops.router_linear, {"weight": x[:8].clone()}, x=x)
    if name == "gated_act":
        return rows_case(moe_ops.gated_act, {}, gate_up=x)
    if name == "quantize_fp8":
        return rows_case(lambda x: [t.float() for t in moe_ops.quantize_fp8(x)], {}, x=x)
    if name == "rotary":
        angles = torch.randn(NUM_TOKENS, 32)
        return rows_case(
            lambda t, cos, sin: moe_ops.rotary(t[None], cos, sin)[0],
            {},
            t=x.view(NUM_TOKENS, 4, 64),
            cos=angles.cos(),
            sin=angles.sin(),
        )
    return rows_case(moe_ops.add_rms_norm, {"weight": x[0].clone()}, x=x, residual=x.flip(0))


def unpermute(dtype: torch.dtype) -> Case:
    def op(rows: Tensor, topk_weights: Tensor) -> Tensor:
        slots = torch.arange(rows.shape[0] * 4, dtype=torch.int32)
        offsets = torch.tensor([0, len(slots)])
        return moe_ops.unpermute(rows.flatten(0, 1), offsets, slots.view(-1, 4), topk_weights)

    rows = torch.randn(NUM_TOKENS, 4, 256).to(dtype)
    return rows_case(op, {}, rows=rows, topk_weights=torch.rand(NUM_TOKENS, 4))


def moa_attention(dtype: torch.dtype, kind: str) -> Case:
    """Runs a subset of the tokens, each in its own step, after a cache of the preceding tokens."""
    q = torch.randn(1, NUM_TOKENS, 2, 2, 64).to(dtype)
    k, v = (torch.randn(1, NUM_TOKENS, 2, 64).to(dtype) for _ in range(2))

    def attend(begin: int, end: int) -> Tensor:
        out = moe_ops.moa_attention(q[:, begin:end], k[:, :end], v[:, :end], kind=kind)
        return (out if isinstance(out, Tensor) else out[0])[0]

    def op(position: Tensor) -> Tensor:
        if len(position) == NUM_TOKENS:
            return attend(0, NUM_TOKENS)
        return torch.cat([attend(at, at + 1) for at in position.tolist()])

    return rows_case(op, {}, position=torch.arange(NUM_TOKENS))


CASES: dict[str, Callable[[torch.dtype], Case]] = {
    **{
        name: functools.partial(row_wise, name=name)
        for name in (
            "topk_router",
            "topp_router",
            "router_linear",
            "gated_act",
            "add_rms_norm",
            "rotary",
            "quantize_fp8",
        )
    },
    "unpermute": unpermute,
    "all_experts_ffn": all_experts_ffn,
    "mix_expert_outputs": mix_expert_outputs,
    "grouped_gemm": grouped_gemm,
    "moe_linear_map": linear_map,
    "moe_linear_map, narrow": functools.partial(linear_map, size=64, experts=4),
    "moe_linear_reduce": linear_reduce,
    "moe_linear_reduce, narrow": functools.partial(linear_reduce, size=64, experts=4),
    "moe_ffn": ffn,
    "moe_ffn, narrow": functools.partial(ffn, experts=4, hidden=64, intermediate=32, top_k=2),
    "moe_ffn, weights [E, in, out]": functools.partial(ffn, form="transposed"),
    "moe_ffn_packed": functools.partial(ffn, form="packed"),
    "moe_ffn_quantized, int8": functools.partial(ffn, form="int8"),
    "moe_ffn_quantized, int4": functools.partial(ffn, form="int4"),
    "moe_ffn_fp8": functools.partial(ffn, form="fp8"),
    "moa_attention, softmax": functools.partial(moa_attention, kind="softmax"),
    "moa_attention, stick-breaking": functools.partial(moa_attention, kind="stick_breaking"),
}


def cases() -> Iterator[tuple[str, torch.dtype, Case]]:
    for name, build in CASES.items():
        for dtype in DTYPES:
            torch.manual_seed(0)
            yield name, dtype, build(dtype)


# The tables.


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Returns |a - b| / |b| of the output where it is largest, or 0 for bitwise identical
    outputs."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not torch.equal(x, y):
            worst = max(worst, float((x.double() - y.double()).norm() / y.double().norm()))
    return worst


def in_words(value: float) -> str:
    return "equal" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def by_batch(case: Case) -> float:
    """Returns the largest deviation of tokens in calls of 1, 7 and 64 from equal tokens among
    513."""
    whole = case.run()
    order = torch.arange(64) * 8
    worst = 0.0
    for size in BATCHES:
        parts = [case.run(rows) for rows in order.split(size)]
        joined = [torch.cat(t) for t in zip(*parts, strict=True)]
        worst = max(worst, difference(joined, [t[order] for t in whole]))
    return worst


def outputs(path: str, invariant: bool) -> None:
    """Writes the results of all cases at this process's instruction set, for another process."""
    with moe_ops.batch_invariant(invariant):
        torch.save({(name, short(dtype)): case.run() for name, dtype, case in cases()}, path)


def at_level(isa: str, invariant: bool) -> dict[tuple[str, str], list[Tensor]]:
    environment = {**os.environ, "MOE_OPS_CPU_ISA": isa}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "outputs.pt")
        code = f"from bench.cpu.numerics import outputs; outputs({path!r}, {invariant})"
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        found: dict[tuple[str, str], list[Tensor]] = torch.load(path)
    return found


def equality() -> list[str]:
    levels = _library.supported_isas()
    by_level = [at_level(isa, True) for isa in levels]
    lines = [
        "| op | type | two runs | 1 and 2 threads | batch, mode off | batch, mode on | "
        "instruction set |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, dtype, case in cases():
        again, threads, batch = [], [], []
        for invariant in (False, True):
            with moe_ops.batch_invariant(invariant):
                torch.set_num_threads(1)
                first = case.run()
                again.append(difference(case.run(), first))
                batch.append(by_batch(case))
                torch.set_num_threads(2)
                threads.append(difference(case.run(), first))
                torch.set_num_threads(1)
        best = by_level[-1][name, short(dtype)]
        isa = max(difference(other[name, short(dtype)], best) for other in by_level[:-1])
        cells = [max(again), max(threads), *batch, isa]
        lines.append(f"| {name} | {short(dtype)} | {' | '.join(map(in_words, cells))} |")
    return lines


def exact(form: str, case: Case) -> Tensor:
    call = case.tokens | case.fixed
    if form in ("int8", "int4"):
        return reference.moe_ffn(**dequantized(call))
    if form == "fp8":
        return reference.moe_ffn_fp8(**widened(call))
    names = ("packed_gate_up", "packed_down")
    return reference.moe_ffn(**widened({k: v for k, v in call.items() if k not in names}))


FORMS = ("plain", "transposed", "packed", "int8", "int4", "fp8")


def errors() -> list[str]:
    lines = [
        "| weights | type | T = 1 | T = 64 | T = 512 | mode on |",
        "|---|---|---|---|---|---|",
    ]
    for form in FORMS:
        for dtype in DTYPES:
            torch.manual_seed(0)
            case = ffn(dtype, form, tokens=512)
            want = exact(form, case)
            cells = []
            for invariant, size in ((False, 1), (False, 64), (False, 512), (True, 512)):
                with moe_ops.batch_invariant(invariant):
                    rows = torch.arange(512)[:: 8 if size == 1 else 1]
                    parts = torch.cat([case.run(part)[0] for part in rows.split(size)])
                error = (parts.double() - want[rows]).norm() / want[rows].norm()
                cells.append(f"{float(error):.1e}".replace("e-0", "e-"))
            lines.append(f"| {form} | {short(dtype)} | {' | '.join(cells)} |")
    return lines


def compare(
    off: Callable[[], None], on: Callable[[], None], budget_s: float
) -> tuple[float, float]:
    """Returns the seconds of `off`, and the median over rounds of the time of `on` divided by that
    of `off`. It uses processor time, which excludes other processes; a round of short calls has
    many calls."""
    jobs = {"off": off, "on": on}
    samples = {name: Samples() for name in jobs}

    def seconds(job: Callable[[], None], repeats: int) -> float:
        start = time.process_time()
        for _ in range(repeats):
            job()
        return (time.process_time() - start) / repeats

    def sample(name: str, number: int) -> None:
        samples[name].seconds[number] = seconds(jobs[name], repeats)

    on()
    seconds(off, 1)
    repeats = max(1, min(200, round(5e-3 / max(1e-6, seconds(off, 1)))))
    end = time.perf_counter() + budget_s
    interleave(list(jobs), sample, lambda number: number < 7 or time.perf_counter() < end)
    return samples["off"].median, speedup(samples, "off", "on")


def costs(budget_s: float) -> list[str]:
    lines = [
        "| experts | weights | type | T = 1 | T = 64 | T = 512 |",
        "|---|---|---|---|---|---|",
    ]
    for hidden, intermediate in ((256, 512), (2048, 768)):
        for form in FORMS:
            for dtype in DTYPES:
                torch.manual_seed(0)
                case = ffn(dtype, form, 16, hidden, intermediate, tokens=512)
                cells = []
                for size in (1, 64, 512):

                    def run(invariant: bool, rows: slice, case: Case = case) -> None:
                        with moe_ops.batch_invariant(invariant):
                            case.run(rows)

                    jobs = [functools.partial(run, on, slice(0, size)) for on in (False, True)]
                    off, ratio = compare(jobs[0], jobs[1], budget_s)
                    cells.append(f"{ratio:.2f} ({off * 1e3:.3g})")
                lines.append(
                    f"| 16 of {hidden} x {intermediate} | {form} | {short(dtype)} | "
                    f"{' | '.join(cells)} |"
                )
                print(lines[-1], flush=True)
    return lines


# The page.


def replace_table(text: str, name: str, lines: list[str]) -> str:
    start, end = (
        f"<!-- {name}: made by python -m bench.cpu.numerics -->\n",
        f"<!-- end of {name} -->",
    )
    head, rest = text.split(start)
    return head + start + "\n" + "\n".join(lines) + "\n\n" + end + rest.split(end, 1)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="default: all")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds of one cell of costs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine()
    where = (
        f"Measured {now()} on {machine['cpu']}, {machine['cores']} cores, {_library.cpu_isa()}, "
        f"torch {torch.__version__}; load {load()}."
    )
    for name in arguments.tables or TABLES:
        lines = {"equality": equality, "errors": errors}.get(
            name, functools.partial(costs, arguments.budget)
        )()
        text = PAGE.read_text(encoding="utf-8")
        write_text(PAGE, replace_table(text, name, [*lines, "", where]))


if __name__ == "__main__":
    main()
