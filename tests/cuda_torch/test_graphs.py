"""Every op in a CUDA graph: captured once, it gives the result of the data at each replay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .calls import CASES, IDS, Step, assert_same_bits, call_of, copy_of

# On the simulator kernels of torch run when they are captured, and not at a replay.
BACKWARD_OF_TORCH = {"grouped_gemm_quantized", "grouped_sum"}


@pytest.mark.parametrize(("op", "dtype"), CASES, ids=IDS)
def test_replays_on_new_data(op, dtype):
    static = call_of(op, dtype, seed=1)
    step = Step(op, backward=op not in BACKWARD_OF_TORCH)
    step(static)  # what autograd and the allocator do once is no part of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    for seed in (1, 2):
        new = call_of(op, dtype, seed)
        for name, value in static.items():
            if isinstance(value, Tensor):
                value.copy_(new[name])
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, step(copy_of(new, "cuda")))
