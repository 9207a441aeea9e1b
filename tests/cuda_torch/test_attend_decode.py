"""The kernel of attention_decode in a CUDA graph."""

from __future__ import annotations

import torch
from tests.ops.test_attention_decode import KEPT, operands

from .calls import assert_same_bits


def test_the_kernel_replays():
    """The projections are torch's, which the simulator does not replay: the kernel alone is
    captured. A replay reads new queries, keys and a new mask, and writes the cache."""
    torch.manual_seed(0)
    call = operands(torch.bfloat16, start=300, length=2, size=32, mask="bool", sinks=True)
    call = {n: t.cuda() if isinstance(t, torch.Tensor) else t for n, t in call.items()}
    rows = [torch.randn(2, 2, heads * 32).bfloat16().cuda() for heads in (6, 2, 2)]

    def attend(keys, values):
        rest = [call[name] for name in ("start", "rotary_size", "scale", "q_norm", "k_norm")]
        return torch.ops.moe_ops_cuda.attend_decode(
            *rows, call["cos"], call["sin"], keys, values, *rest, 1e-6, call["mask"], call["sinks"]
        )

    own = [call[name].clone() for name in KEPT]
    attend(*own)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(*own)
    for seed in (1, 2):
        torch.manual_seed(seed)
        for t in rows:
            t.copy_(torch.randn(t.shape))
        call["mask"][..., :300] = torch.rand(2, 1, 2, 300) < 0.5
        for t, name in zip(own, KEPT, strict=True):
            t.copy_(call[name])
        graph.replay()
        torch.cuda.synchronize()
        eager = [call[name].clone() for name in KEPT]
        want = attend(*eager)
        assert_same_bits([captured, *own], [want, *eager])
