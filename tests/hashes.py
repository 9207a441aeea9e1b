"""python -m tests.hashes: do the results of all ops and layers keep their bits between two builds?

    python -m tests.hashes record before.json     # with the one build
    python -m tests.hashes compare before.json    # with the other

A result is a SHA-256 of everything that the public functions returned and of all gradients, for
each case of tests/sweep (its short part and random ones) and each layer in training, at every
instruction set of the machine, each in a process of its own. The file holds the cases, so that a
changed table of block sizes does not change what is compared. On another machine other kernels may
run: both files must come from one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bench.harness.dev import moe_ops_dev
from tests.helpers.moe import build_router
from tests.helpers.quantized import weight_config
from torch import Tensor, nn

import moe_ops
from moe_ops import _library, layers

from .sweep.cases import OPS, Case, random_case, short

RANDOM_CASES = 1000


class Results:
    """Digests of what a case made, by name: results in the order of calls, gradients by input."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.calls = 0

    def add(self, name: str, value: object) -> None:
        if isinstance(value, (tuple, list)):
            for i, part in enumerate(value):
                self.add(f"{name}.{i}", part)
        elif isinstance(value, Tensor):
            data = value.detach().contiguous()
            words = f"{data.dtype} {tuple(data.shape)}".encode()
            raw = data.flatten().view(torch.uint8).numpy().tobytes() if data.numel() else b""
            self.found[name] = hashlib.sha256(words + raw).hexdigest()

    def watch(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function; its results, and the gradients that its inputs get, are added."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            call = self.calls
            self.calls += 1
            inputs = {**{str(i): a for i, a in enumerate(args)}, **kwargs}
            for key, value in inputs.items():
                if isinstance(value, Tensor) and value.requires_grad and value.is_leaf:
                    label = f"{call} {name} gradient of {key}"
                    value.register_hook(lambda grad, label=label: self.add(label, grad))
            result = function(*args, **kwargs)
            self.add(f"{call} {name}", result)
            return result

        return watched

    def digest(self) -> str:
        text = json.dumps(sorted(self.found.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_of_case(text: str) -> str:
    """Runs a case of tests/sweep, with every public op watched."""
    from .sweep.checks import fault_of

    results = Results()
    originals = {name: getattr(moe_ops, name) for name in names_of_ops()}
    for name, function in originals.items():
        setattr(moe_ops, name, results.watch(function, name))
    try:
        fault = fault_of(Case.of(text))
    finally:
        for name, function in originals.items():
            setattr(moe_ops, name, function)
    return results.digest() + (f" {fault.splitlines()[0]}" if fault else "")


def names_of_ops() -> list[str]:
    return sorted({name for name in (*OPS, "unpermute", "grouped_sum") if hasattr(moe_ops, name)})


# ---------------------------------------------------------------------------------------- layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "renormalized": {"renormalize": True, "routed_scaling_factor": 2.5},
    "sigmoid": {"score_func": "sigmoid", "expert_bias": True},
    "groups": {"score_func": "sigmoid", "num_groups": 4, "num_topk_groups": 2},
    "topk_first": {"topk_first": True, "bias": True},
    "topp": {"kind": "topp", "top_p": 0.6},
    "expert_choice": {"kind": "expert_choice", "capacity_factor": 1.5},
    "sparsemixer": {"kind": "sparsemixer"},
    "on_input": {"apply_router_weight_on_input": True},
}


def trained(results: Results, layer: nn.Module, x: Tensor, **kwargs: Any) -> None:
    """Two steps of SGD: the second one sees what the first one wrote."""
    layer.train()
    for step in range(2):
        x = x.detach().requires_grad_()
        out = layer(x, **kwargs)
        parts = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]
        results.add(f"{step} output", parts)
        total = sum(t.float().square().mean() for t in parts if t.requires_grad)
        total.backward()
        results.add(f"{step} gradient of x", x.grad)
        with torch.no_grad():
            for name, p in sorted(layer.named_parameters()):
                if p.grad is not None:
                    results.add(f"{step} gradient of {name}", p.grad)
                    p -= 0.1 * p.grad
                    p.grad = None


def hash_of_layer(text: str) -> str:
    """layer=moe router=topp dtype=bf16 tokens=70 hidden=48 inner=40"""
    case = Case.of(f"op=layer {text}")
    torch.manual_seed(5)
    dtype, h, i = DTYPES[case["dtype"]], case["hidden"], case["inner"]
    x = torch.randn(case["tokens"], h).to(dtype)
    results, kind = Results(), case["layer"]
    router = build_router(h, 8, 3, **ROUTERS[case.get("router", "softmax")])
    if kind in ("softmax", "stick_breaking"):
        attention = layers.AttentionExperts(router, 2, i // 2, kind=kind).to(dtype)
        trained(results, attention, x[None])
        return results.digest()
    moe = layers.MoE(router, layers.Experts(8, h, i)).to(dtype)
    if kind == "moe":
        trained(results, moe, x)
        return results.digest()
    if kind == "packed":
        moe_ops.pack_weights(moe)
    else:
        moe_ops.quantize(moe, weight_config(kind))
    with torch.no_grad():
        results.add("output", moe.eval()(x))
    return results.digest()


def cases_of_layers() -> list[str]:
    found = []
    for dtype in DTYPES:
        for tokens, hidden, inner in ((7, 48, 40), (300, 128, 192)):
            kinds = [f"layer=moe router={name}" for name in ROUTERS]
            kinds += ["layer=softmax", "layer=stick_breaking"]
            if dtype != "fp64":
                kinds += ["layer=packed", "layer=int8", *(["layer=int4"] if hidden == 128 else [])]
            found += [
                f"{kind} dtype={dtype} tokens={tokens} hidden={hidden} inner={inner}"
                for kind in kinds
            ]
    return found


# ------------------------------------------------------------------------------------- processes


def hash_of(text: str) -> str:
    return hash_of_layer(text) if text.startswith("layer=") else hash_of_case(text)


def all_cases() -> list[str]:
    table, rng = moe_ops_dev.block_sizes(), random.Random(30)
    cases = [*short(table), *(random_case(table, rng) for _ in range(RANDOM_CASES))]
    return list(dict.fromkeys([*map(str, cases), *cases_of_layers()]))


def worker() -> None:
    """Hashes the cases of stdin, a line each, at the instruction set of this process."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps([line.strip(), hash_of(line.strip())]), flush=True)


def run(isa: str, cases: list[str]) -> dict[str, str]:
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.hashes", "worker"],
        env={**os.environ, "MOE_OPS_CPU_ISA": isa, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        input="\n".join(cases),
        stdout=subprocess.PIPE,
        text=True,
    )
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    for case in cases[len(found) : len(found) + 1]:
        found[case] = f"the process died: {done.returncode}"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hashes", description=__doc__)
    parser.add_argument("what", choices=["record", "compare", "worker"])
    parser.add_argument("file", type=Path, nargs="?", default=Path("build/hashes.json"))
    parser.add_argument("--isa", help="one instruction set, instead of all")
    parser.add_argument("--only", default="", help="a part of a case, op=moe_ffn say")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    if args.what == "worker":
        worker()
        return 0
    isas = [args.isa] if args.isa else list(_library.supported_isas())
    with ThreadPoolExecutor(args.jobs) as pool:
        if args.what == "record":
            cases = [case for case in all_cases() if args.only in case]
            found = dict(zip(isas, pool.map(lambda isa: run(isa, cases), isas), strict=True))
            args.file.parent.mkdir(parents=True, exist_ok=True)
            args.file.write_text(json.dumps(found, indent=0))
            print(f"{args.file}: {len(cases)} cases at {', '.join(isas)}")
            return 0
        before = json.loads(args.file.read_text())
        asked = {isa: [c for c in before[isa] if args.only in c] for isa in isas}
        changed = 0
        for isa, found in zip(isas, pool.map(lambda isa: run(isa, asked[isa]), isas), strict=True):
            other = [c for c in asked[isa] if found.get(c) != before[isa][c]]
            changed += len(other)
            print(f"{isa}: {len(asked[isa])} cases, {len(other)} with other bits")
            for case in other[:40]:
                print(f"    {case}: {before[isa][case]} -> {found.get(case, 'not run')}")
    return int(changed > 0)


if __name__ == "__main__":
    sys.exit(main())
