"""Processes that fork, threads that call at once, and interpreters beside the main one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
CHILDREN = 12
CHILDREN_OF_FULL = 500


def run_python(code: str, *arguments: str) -> str:
    """Returns what the code prints, in a process with one thread of torch's and a limit of time
    that only a hang reaches."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


# Two threads take and give back large outputs, so that at any moment one of them is likely to hold
# a lock of the allocator, while a third one forks. A child that inherits a lock which nobody will
# release waits for ever: it is given a minute, in which it needs milliseconds. What torch and
# Python initialize at their first calls has no such protection, so the main thread makes those
# before, with an output that is small enough to stay out of the cache.
FORKS = """
    import os, signal, sys, threading
    import torch, moe_ops

    def inputs(rows):
        grad = torch.ones(rows, 1024)
        return grad, grad[:, :256], torch.tensor([0] + [rows] * 9)

    def output(rows):
        return moe_ops.grouped_gemm_wgrad(*inputs(rows))

    def is_right(y, value):
        return bool(y[0, 0, 0] == value) and y[1:].count_nonzero().item() == 0

    def fork_beside_threads(children):
        done = threading.Event()

        def work():
            while not done.is_set():
                assert output(2)[0, 0, 0] == 2

        threads = [threading.Thread(target=work) for _ in range(2)]
        for t in threads:
            t.start()
        hung = wrong = 0
        for _ in range(children):
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                y = output(3)
                kept = is_right(y, 3)
                del y
                os._exit(0 if kept and is_right(output(1), 1) else 1)
            _, status = os.waitpid(child, 0)
            hung += os.WIFSIGNALED(status)
            wrong += os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0
        done.set()
        for t in threads:
            t.join()
        return hung, wrong

    grad, rows, offsets = inputs(2)
    is_right(moe_ops.grouped_gemm_wgrad(grad[:, :8], rows, offsets), 2)
"""
# Of each process only one child is forked, while the threads make their first large outputs.
FIRST_CALLS = (
    FORKS
    + """
    failed = 0
    for _ in range(int(sys.argv[1])):
        process = os.fork()
        if process == 0:
            os._exit(fork_beside_threads(1) != (0, 0))
        failed += os.waitpid(process, 0)[1] != 0
    print(failed)
"""
)


@pytest.mark.parametrize(
    "children", [CHILDREN, pytest.param(CHILDREN_OF_FULL, marks=pytest.mark.full)]
)
def test_fork_while_other_threads_compute(children: int):
    run = run_python(FORKS + "    print(*fork_beside_threads(int(sys.argv[1])))", str(children))
    assert run.split() == ["0", "0"]


@pytest.mark.parametrize("processes", [40, pytest.param(1500, marks=pytest.mark.full)])
def test_fork_while_other_threads_make_their_first_outputs(processes: int):
    assert run_python(FIRST_CALLS, str(processes)).split() == ["0"]


def test_workers_of_a_data_loader():
    assert run_python(
        """
        import torch, moe_ops
        from moe_ops import layers
        from torch.utils.data import DataLoader

        torch.manual_seed(0)
        layer = layers.MoE(layers.TopKRouter(64, 4, 2), layers.Experts(4, 64, 128))
        data = torch.randn(64, 8, 64)
        want = layer(data[:8]).detach()  # before the fork

        def collate(samples):
            with torch.no_grad():
                x = torch.stack(samples)
                return x, layer(x)

        loader = DataLoader(
            data, 8, num_workers=2, collate_fn=collate, multiprocessing_context="fork"
        )
        for i, (x, y) in enumerate(loader):
            layer(x).sum().backward()  # the parent computes beside its workers
            if i == 0:
                assert torch.equal(y, want)
        print(i)
        """
    ).split() == ["7"]


def test_many_threads_at_once():
    assert run_python(
        """
        import threading
        import torch, moe_ops

        torch.manual_seed(0)
        torch.set_num_threads(1)
        x, w = torch.randn(600, 48), torch.randn(3, 96, 48)
        down, weights = torch.randn(3, 48, 48), torch.rand(600, 2)
        ids = torch.randint(3, (600, 2))
        offsets = torch.tensor([0, 200, 600])

        def run():
            leaves = [t.clone().requires_grad_() for t in (x, w, down)]
            y = moe_ops.moe_ffn(*leaves, weights, ids)
            large = moe_ops.grouped_gemm_wgrad(
                torch.ones(4, 2048), torch.ones(4, 1024), torch.tensor([0, 1, 4])
            )
            return [y, *torch.autograd.grad(y.sum(), leaves), large]

        want, wrong = run(), []

        def work():
            for _ in range(4):
                wrong.extend(not torch.equal(a, b) for a, b in zip(run(), want, strict=True))

        threads = [threading.Thread(target=work) for _ in range(32)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        print(len(wrong), sum(wrong))
        """
    ).split() == [str(32 * 4 * 5), "0"]


def test_a_subinterpreter_is_refused():
    assert "use threads or processes instead" in run_python(
        """
        try:
            import _interpreters as interpreters
        except ImportError:
            import _xxsubinterpreters as interpreters
        other = interpreters.create()
        code = "try:\\n import moe_ops\\nexcept ImportError as e:\\n print(e, flush=True)"
        interpreters.run_string(other, code)
        """
    )
