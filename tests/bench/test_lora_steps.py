"""The benchmark of training steps with LoRA on experts."""

from __future__ import annotations

import os

import pytest
import torch
from bench.cpu import expert_lora
from bench.peers import kt_kernel
from bench.peers.kt_kernel_lora import CLASSES, KTExpertLoRA, joined

SMALL = (256, 256, 4, 2)


@pytest.fixture
def inputs():
    """Expert 3 has no token."""
    x, weights, _, grad = expert_lora.make_inputs(SMALL, 24)
    return x, weights, torch.rand(24, 3).topk(2).indices.int(), grad


@pytest.fixture
def one_thread_off_the_first_core():
    """Leaves the first core to the thread of kt-kernel."""
    before = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, before[1] - {0} or before[1])
    yield
    torch.set_num_threads(before[0])
    os.sched_setaffinity(0, before[1])


@pytest.mark.parametrize("weight_format", expert_lora.FORMATS)
def test_a_step_is_compared_with_fp64(inputs, weight_format):
    layer = expert_lora.layers(SMALL, weight_format)["lora"]
    truth = expert_lora.exact(layer[0], inputs)
    results = expert_lora.step_of(layer, inputs)()
    assert len(results) == len(truth) == len(expert_lora.RESULTS)
    expert_lora.check("ExpertLoRA", results, truth)
    for index, name in enumerate(expert_lora.RESULTS):
        wrong = [*results]
        wrong[index] = 1.1 * wrong[index]
        with pytest.raises(ValueError, match=f"{name} must be within"):
            expert_lora.check("ExpertLoRA", wrong, truth)
        wrong[index] = torch.full_like(wrong[index], float("nan"))
        with pytest.raises(ValueError, match="got nan"):
            expert_lora.check("ExpertLoRA", wrong, truth)


def test_without_kt_kernel_the_table_says_why(monkeypatch, capsys):
    monkeypatch.setattr(expert_lora, "SHAPES", {"small": SMALL})
    monkeypatch.setattr(kt_kernel.importlib.util, "find_spec", lambda name: None)
    arguments = ["--seconds", "0.01", "--tokens", "3", "--formats", "bfloat16"]
    monkeypatch.setattr("sys.argv", ["expert_lora", *arguments])
    threads = torch.get_num_threads()
    expert_lora.main()
    torch.set_num_threads(threads)
    _, _, line, _, reason = capsys.readouterr().out.splitlines()
    assert line.startswith("| small | bfloat16 | 3 | ") and line.endswith("| - | - |")
    assert reason == "kt-kernel is not compared: kt-kernel is not installed."


@pytest.mark.parametrize("weight_format", CLASSES)
def test_kt_kernel_computes_the_step(one_thread_off_the_first_core, inputs, weight_format):
    """Only where it is installed. Its second step reads factors that have changed."""
    if why := kt_kernel.missing():
        pytest.skip(why)
    lora = expert_lora.layers(SMALL, weight_format)["lora"][0]
    peer = KTExpertLoRA(lora, SMALL[-1], weight_format, 24)
    step = peer.bind(*inputs)
    expert_lora.check("kt-kernel", joined(step()), expert_lora.exact(lora, inputs))
    for factor in (*peer.factors, *expert_lora.factors_of(lora)):
        factor.data.mul_(-0.5)
    expert_lora.check("kt-kernel", joined(step()), expert_lora.exact(lora, inputs))
