"""Threads that have not used CUDA before: they have no context, and device 0 is current."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from .calls import Step, assert_same_bits, call_of

# The device thread of autograd starts with the first backward pass of the process, and the first
# thing it does is to encode the tensor maps of a Hopper kernel.
COLD_BACKWARD = """
import sys, torch, moe_ops
if "torch_cuda" in sys.argv:
    import torch_cuda
    torch_cuda.install()
torch.manual_seed(0)
a = torch.randn(128, 64).bfloat16().to(sys.argv[1]).requires_grad_()
b = torch.randn(2, 64, 64).bfloat16().to(sys.argv[1])
offsets = torch.tensor([0, 64, 128], dtype=torch.int32).to(sys.argv[1])
grad = torch.ones(128, 64).bfloat16().to(sys.argv[1])
out = moe_ops.grouped_gemm(a, b, offsets)
out.backward(grad)
want = torch.cat([grad[:64].float() @ b[0].float(), grad[64:].float() @ b[1].float()])
torch.testing.assert_close(a.grad.float(), want, rtol=2e-2, atol=2e-2)
"""


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_first_backward_of_a_process(device):
    if torch.device(device).index >= torch.cuda.device_count():
        pytest.skip("needs two CUDA devices (PTXSIM_DEVICES=2)")
    simulated = ["torch_cuda"] if "torch_cuda" in sys.modules else []
    command = [sys.executable, "-c", COLD_BACKWARD, device, *simulated]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("device", range(min(2, torch.cuda.device_count())))
def test_new_thread(device):
    call = call_of("moe_ffn", torch.bfloat16, 5, f"cuda:{device}")
    want = Step("moe_ffn")(call)
    got: list[object] = []

    def run() -> None:
        try:
            got.append(Step("moe_ffn")(call))
        except BaseException as error:
            got.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert isinstance(got[0], list), got[0]
    assert_same_bits(got[0], want)
