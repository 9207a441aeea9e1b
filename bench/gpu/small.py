"""Runs every op once on small input, checked against the reference, for compute-sanitizer.

    compute-sanitizer --tool memcheck python -m bench.gpu.small

The cases of the doctor cover every op; here reductions are long enough for a pipeline to wrap
around, with sizes that no tile divides (and odd ones, which TMA cannot read), experts without rows,
and slots without an expert.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from bench.gpu.problem import relative, worst
from moe_ops import doctor, ops, reference

# Sums of some hundred products of values rounded to bf16.
_TOLERANCE = 2.0**-6
T, H, I, E, K = 150, 328, 200, 6, 2


def run(device: str) -> list[str]:
    """Returns errors, one line each; needs only the ops."""
    wrong = [
        f"{test.op} {test.dtype}: {test.message or f'error {test.forward_error}'}"
        for test in doctor.self_test(device)
        if not test.passed
    ]
    for name, error in errors(device).items():
        if not error <= _TOLERANCE:
            wrong.append(f"{name} bf16: error {error:.1e}")
    return wrong


def errors(device: str) -> dict[str, float]:
    """Returns relative errors in bf16 of the GEMMs and the block, outputs and gradients."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator) * size[-1] ** -0.5
        return values.to(torch.bfloat16).to(device)

    # The last expert gets no tokens; every seventh token has no second expert.
    ids = torch.stack([torch.randperm(E - 1, generator=generator)[:K] for _ in range(T)]).int()
    ids[::7, 1] = -1
    ids = ids.to(device)
    weights = torch.rand(T, K, generator=generator).to(device)
    offsets = reference.sort_by_expert(ids, E)[0]
    x, rows, w_gate_up, w_down = (
        normal(T, H),
        normal(T * K, H),
        normal(E, 2 * I, H),
        normal(E, H, I),
    )
    found = {}
    if doctor.has_kernel("grouped_gemm", device):
        found["grouped_gemm"] = _both("grouped_gemm", (rows, w_gate_up), (offsets,))
        odd = normal(T * K, H - 5), normal(E, 2 * I - 3, H - 5)
        found["grouped_gemm, odd sizes"] = _both("grouped_gemm", odd, (offsets,))
    if doctor.has_kernel("moe_ffn", device):
        found["moe_ffn"] = _both("moe_ffn", (x, w_gate_up, w_down, weights), (ids,))
    return found


def _both(op: str, floats: tuple[Tensor, ...], rest: tuple[Tensor, ...]) -> float:
    """Returns the largest relative error of output and gradients."""
    results = []
    for module, dtype in ((ops, None), (reference, torch.float64)):
        leaves = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in floats]
        out = getattr(module, op)(*leaves, *rest)
        grad = torch.ones_like(out) / out.shape[-1] ** 0.5
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    return worst(relative(a, b) for a, b in zip(*results, strict=True))


def main() -> int:
    wrong = run("cuda")
    print("\n".join(wrong) or "every op agrees with its reference")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
