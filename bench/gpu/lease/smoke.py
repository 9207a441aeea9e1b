"""Step smoke: checks that the library works on the GPU in all the ways torch may call it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu.lease.child import Task
from bench.gpu.problem import relative
from moe_ops.bench.measure import in_a_sentence

# A GEMM of values rounded to bf16.
_TOLERANCE = 2.0**-7


def run(task: Task) -> tuple[int, str]:
    """Runs every check, whatever the results of others, until the device fails."""
    checks: dict[str, Callable[[str], None]] = {
        "import": _import,
        "one op": _forward,
        # The first backward of a process runs on a thread without a CUDA context.
        "backward on a cold thread": _cold_backward,
        "an op with TMA and wgmma": _block,
        "graph": _graph,
        "side stream": _side_stream,
    }
    if task.device == "cpu":
        del checks["graph"], checks["side stream"]
    wrong = []
    for name, check in checks.items():
        try:
            check(task.device)
            if task.device == "cuda":
                torch.cuda.synchronize()
            text = ""
        except Exception as problem:
            text = in_a_sentence(problem)
            wrong.append(f"{name}: {text}")
        task.journal.write("check", task.step, name=name, passed=not text, text=text)
        print(f"{name}: {text or 'passed'}")
    return (1 if wrong else 0), "; ".join(wrong) or f"{len(checks)} checks passed"


def _import(device: str) -> None:
    from moe_ops import _library, self_test

    kernels = dict(_library.build_info())["cuda"]
    if not self_test.has_kernel("moe_ffn", device):
        raise RuntimeError(f"this build ({kernels}) has no {device} kernel of moe_ffn")


def _normal(seed: int, device: str, *size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).to(torch.bfloat16).to(device)


def _product(device: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    offsets = torch.tensor([0, 64, 64, 192], dtype=torch.int32).to(device)
    return _normal(seed, device, 192, 64), _normal(9, device, 3, 64, 64), offsets


def _exact(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a[:64].double() @ b[0].double().T, a[64:].double() @ b[2].double().T])


def _agree(value: Tensor, truth: Tensor) -> None:
    error = relative(value.cpu(), truth.cpu())
    if not error <= _TOLERANCE:
        raise RuntimeError(f"relative error {error:.1e}")


def _forward(device: str) -> None:
    import moe_ops

    a, b, offsets = _product(device, 0)
    _agree(moe_ops.grouped_gemm(a, b, offsets), _exact(a.cpu(), b.cpu()))


def _cold_backward(device: str) -> None:
    import moe_ops

    a, b, offsets = _product(device, 1)
    a.requires_grad_()
    out = moe_ops.grouped_gemm(a, b, offsets)
    grad = _normal(2, device, 192, 64)
    out.backward(grad)
    assert a.grad is not None
    _agree(a.grad, _exact(grad.cpu(), b.cpu().transpose(1, 2)))


def _block(device: str) -> None:
    from moe_ops import ops, reference

    leaves = [_normal(i, device, *size) for i, size in enumerate(_BLOCK)]
    ids = torch.arange(48).remainder(3).view(24, 2).int()
    weights = torch.full((24, 2), 0.5)
    y = ops.moe_ffn(*leaves, weights.to(device), ids.to(device))
    truth = reference.moe_ffn(*(t.cpu().double() for t in leaves), weights.double(), ids)
    error = relative(y.cpu(), truth)
    if not error <= 4 * _TOLERANCE:
        raise RuntimeError(f"relative error {error:.1e}")


_BLOCK = ((24, 64), (4, 128, 64), (4, 64, 64))


def _graph(device: str) -> None:
    import moe_ops

    a, b, offsets = _product(device, 3)
    moe_ops.grouped_gemm(a, b, offsets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe_ops.grouped_gemm(a, b, offsets)
    for seed in (4, 5):
        a.copy_(_normal(seed, device, 192, 64))
        graph.replay()
        torch.cuda.synchronize()
        _agree(out, _exact(a.cpu(), b.cpu()))


def _side_stream(device: str) -> None:
    import moe_ops

    a, b, offsets = _product(device, 6)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The op must follow this copy, for which no other stream waits.
        a.copy_(_normal(7, device, 192, 64))
        out = moe_ops.grouped_gemm(a, b, offsets)
    torch.cuda.current_stream().wait_stream(stream)
    _agree(out, _exact(a.cpu(), b.cpu()))
