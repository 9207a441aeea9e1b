"""Ops on another stream than the default one."""

from __future__ import annotations

import pytest
import torch

from .calls import CASES, IDS, Step, assert_same_bits, call_of


@pytest.mark.parametrize(("op", "dtype"), CASES, ids=IDS)
def test_on_a_side_stream(op, dtype):
    """Backward too: autograd runs it on the stream of forward."""
    step, call = Step(op), call_of(op, dtype, seed=3)
    want = step(call)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = step(call)
    torch.cuda.current_stream().wait_stream(side)
    assert_same_bits(got, want)


def test_nothing_goes_to_the_default_stream():
    """Work on the default stream would be an error while another one captures."""
    step, call = Step("topk_router"), call_of("topk_router", torch.float32, seed=3)
    step(call)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        captured = step(call)
        graph.capture_end()
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(captured, step(call))
