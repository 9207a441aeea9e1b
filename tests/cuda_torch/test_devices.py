"""Tensors on a device that is not the current one."""

from __future__ import annotations

import pytest
import torch

import moe_ops

from .calls import CASES, IDS, Step, assert_same_bits, call_of

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices (PTXSIM_DEVICES=2)"
)


@pytest.mark.parametrize(("op", "dtype"), CASES, ids=IDS)
def test_second_device(op, dtype):
    """Without a guard a kernel would run on device 0, whose streams and memory are others."""
    step = Step(op)
    with torch.cuda.device(0):
        got = step(call_of(op, dtype, 4, "cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in got)
    assert_same_bits(got, Step(op)(call_of(op, dtype, 4, "cuda:0")))


@pytest.mark.parametrize("op", ["topk_router", "moe_ffn"])
def test_stream_of_the_tensors_device(op):
    """Each device has a current stream; a launch on that of another device is an error."""
    call = call_of(op, torch.float32, 4, "cuda:1")
    want = Step(op)(call)
    with torch.cuda.stream(torch.cuda.Stream(0)):
        got = Step(op)(call)
    torch.cuda.synchronize(1)
    assert_same_bits(got, want)


def test_graph_on_the_second_device():
    call = call_of("moe_ffn", torch.bfloat16, 4, "cuda:1")
    step = Step("moe_ffn")
    want = step(call)
    with torch.cuda.device(1):
        graph = torch.cuda.CUDAGraph()
        # torch would keep the stream that it makes, and capture on this device from then on.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(1)):
            got = step(call)
    graph.replay()
    torch.cuda.synchronize(1)
    assert_same_bits(got, want)


@pytest.mark.parametrize("name", ["w_down", "topk_ids", "b_gate_up"])
def test_two_devices_in_one_call(name):
    call = call_of("moe_ffn", torch.float32, 4, "cuda:0")
    call[name] = call[name].to("cuda:1")
    with pytest.raises(ValueError, match=rf"^moe_ffn: {name} must be on cuda:0 .*, got .*cuda:1"):
        moe_ops.moe_ffn(**call)
