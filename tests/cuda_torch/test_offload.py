"""Slots on CUDA: pinned memory and files, copies on a stream of their own."""

from __future__ import annotations

import pytest
import torch

from moe_ops.layers import MoE
from moe_ops.offload import BeladyPolicy, offload_experts, record_expert_trace


class Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        with torch.device("cpu"):
            self.layers = torch.nn.ModuleList(MoE.build(16, 8, 6, 2) for _ in range(2))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("where", ["pinned memory", "file"])
def test_same_as_in_memory(where, tmp_path):
    """An oracle that fetches ahead in its thread, and slots for a part of a call's experts; on the
    default stream and on another one."""
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).cuda()
    model = Layers().cuda()
    with torch.no_grad(), record_expert_trace(model) as recorder:
        want = [model(x), model(x[:1])]
    trace = recorder.trace()
    path = None if where == "pinned memory" else tmp_path / "experts.safetensors"
    for num_slots in (3, 12):
        again = Layers()
        policy = BeladyPolicy(trace) if num_slots == 12 else "lru"
        cache = offload_experts(again, num_slots, policy=policy, path=path, device="cuda")
        assert all(t.is_cuda for t in cache.slots.values())
        if path is None:
            assert cache.store.pinned
        side = torch.cuda.Stream()
        with cache, torch.no_grad():
            again.cuda()
            torch.testing.assert_close(again(x), want[0])
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                got = again(x[:1])
            torch.cuda.current_stream().wait_stream(side)
            torch.testing.assert_close(got, want[1])
            torch.cuda.synchronize()
