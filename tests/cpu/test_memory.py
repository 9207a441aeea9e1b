"""Large outputs keep their memory, and what is computed in it is right; weights in huge pages."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from tests.helpers import fresh_python

import moe_ops
from moe_ops import layers, memory, quant, reference
from moe_ops.testing import assert_close_by_norm, assert_identical

MIB = 2**20
CACHED = memory.get_cache_limit() > 64 * MIB and not torch.__version__.startswith("2.10.")
needs_cache = pytest.mark.skipif(
    not CACHED,
    reason="the buffer cache needs torch 2.11, Linux and a limit above 64 MiB",
)


def large_wgrad(rows: int = 5, out: int = 1536, dtype: torch.dtype = torch.float32):
    grad, a = torch.randn(rows, out, dtype=dtype), torch.randn(rows, 1536, dtype=dtype)
    return grad, a, torch.tensor([0, 2, rows])  # 18 MiB in fp32


@needs_cache
def test_the_next_output_takes_the_memory_of_the_last():
    memory.empty_cache()
    arguments = large_wgrad()
    first = moe_ops.grouped_gemm_wgrad(*arguments)
    address = first.data_ptr()
    assert memory.cached_bytes() == 0
    del first
    assert memory.cached_bytes() >= 18 * MIB
    assert moe_ops.grouped_gemm_wgrad(*arguments).data_ptr() == address


@needs_cache
def test_live_outputs_never_share_memory():
    arguments = large_wgrad()
    outputs = [moe_ops.grouped_gemm_wgrad(*arguments) for _ in range(3)]
    assert len({t.data_ptr() for t in outputs}) == 3


@needs_cache
def test_release_returns_everything():
    moe_ops.grouped_gemm_wgrad(*large_wgrad())
    assert memory.cached_bytes() > 0
    memory.empty_cache()
    assert memory.cached_bytes() == 0


@needs_cache
def test_a_gradient_is_taken_over_without_a_copy():
    memory.empty_cache()
    grad, a, offsets = large_wgrad()
    b = torch.randn(2, 1536, 1536, requires_grad=True)
    moe_ops.grouped_gemm(a, b, offsets).backward(grad)
    assert memory.cached_bytes() == 0, "the gradient was copied and its memory given back"
    b.grad.mul_(2)
    assert torch.equal(b.grad, 2 * moe_ops.grouped_gemm_wgrad(grad, a, offsets))


@needs_cache
def test_tensors_may_be_freed_by_any_thread():
    memory.empty_cache()
    outputs = [moe_ops.grouped_gemm_wgrad(*large_wgrad())]
    thread = threading.Thread(target=outputs.clear)
    thread.start()
    thread.join()
    assert memory.cached_bytes() >= 18 * MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out", [1536, 1540, 1531])
def test_values_in_used_memory(out: int, dtype: torch.dtype):
    grad, a, offsets = large_wgrad(out=out, dtype=dtype)
    moe_ops.grouped_gemm_wgrad(grad, a, offsets).fill_(float("nan"))
    actual = moe_ops.grouped_gemm_wgrad(grad, a, offsets)
    expected = reference.grouped_gemm_wgrad(grad.double(), a.double(), offsets)
    magnitude = reference.grouped_gemm_wgrad(grad.double().abs(), a.double().abs(), offsets)
    assert_close_by_norm(actual, expected, magnitude, sum_length=5)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    run = fresh_python.run_python("-c", textwrap.dedent(code), env=environment)
    assert run.returncode == 0, run.stderr
    return run


@pytest.mark.parametrize(("setting", "kept"), [("0", False), ("64", True), ("9" * 30, True)])
def test_limit_from_the_environment(setting: str, kept: bool):
    run = run_python(
        """
        import torch, moe_ops
        from moe_ops import memory
        r = moe_ops.grouped_gemm_wgrad(
            torch.randn(3, 1536), torch.randn(3, 1536), torch.tensor([0, 3])
        )
        del r
        print(memory.cached_bytes() > 0)
        """,
        MOE_OPS_CACHE_MB=setting,
    )
    assert run.stdout.strip() == str(kept and CACHED)
    assert "MOE_OPS_CACHE_MB" not in run.stderr


@pytest.mark.parametrize("setting", ["nonsense", "-1", "1e3", "64 ", ""])
def test_a_limit_that_is_no_number_is_ignored_aloud(setting: str):
    code = "import moe_ops; print(moe_ops.memory.get_cache_limit())"
    run = run_python(code, MOE_OPS_CACHE_MB=setting)
    assert int(run.stdout) == memory.get_cache_limit()
    assert f"MOE_OPS_CACHE_MB={setting} is not a whole number of MiB; ignored." in run.stderr


# What is kept counts against a limit of the address space, where nobody could take it back.
LIMITED = """
    import resource, torch, moe_ops
    from moe_ops import memory

    MIB = 2**20
    torch.set_num_threads(1)

    def output(mib):
        rows, offsets = torch.ones(2, 1024), torch.tensor([0] + [2] * 1024)
        return moe_ops.grouped_gemm_wgrad(rows[:, :mib], rows[:, :256], offsets)

    def used():
        pages = int(open("/proc/self/statm").read().split()[0])
        return pages * resource.getpagesize()

    output(8)
    kept = [output(mib) for mib in (65, 55, 50)]
    before = used() - sum(t.nbytes for t in kept)
"""


@needs_cache
@pytest.mark.parametrize("megabytes", ["", "2000"], ids=["default", "wanted"])
def test_kept_memory_is_returned_before_an_output_fails(megabytes: str):
    run_python(
        LIMITED
        + """
    del kept
    assert memory.cached_bytes() >= 170 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (before + 225 * MIB, -1))
    y = output(130)
    assert y[0, 0, 0] == 2
    assert memory.cached_bytes() == 0
    """,
        **({"MOE_OPS_CACHE_MB": megabytes} if megabytes else {}),
    )


@needs_cache
def test_nothing_is_kept_of_a_limited_address_space():
    run_python(
        LIMITED
        + """
    resource.setrlimit(resource.RLIMIT_AS, (before + 250 * MIB, -1))
    assert memory.get_cache_limit() == 0
    del kept
    assert memory.cached_bytes() == 0
    torch.empty(200 * MIB, dtype=torch.uint8)
    """
    )


# --------------------------------------------------------------------------------- huge pages


def in_huge_pages(tensor: torch.Tensor) -> int:
    """Bytes in huge pages of the mappings that hold the tensor."""
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) < last and first < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            total += int(line.split()[1]) * 1024
    return total


def test_huge_pages_keep_values_and_address():
    weights = torch.randn(3, 1024, 1024)
    before, address = weights.clone(), weights.data_ptr()
    for _ in range(5):  # Whoever needs memory may have a page split again at any time.
        moved = memory.use_huge_pages(weights)
        assert weights.data_ptr() == address
        assert_identical(weights, before)
        assert 0 <= moved <= weights.nbytes
        assert moved % (2 * MIB) == 0
        kept = in_huge_pages(weights) >= moved and memory.use_huge_pages(weights) >= moved
        if kept:
            break
    assert kept


def test_huge_pages_of_modules_and_views():
    layer = torch.nn.Linear(1024, 2048)
    moved = memory.use_huge_pages(layer.weight)
    again = memory.use_huge_pages(layer, layer.weight[3:], layer.weight.detach())
    assert moved <= again <= layer.weight.nbytes, "one memory, counted once"


def test_what_has_no_large_memory_is_left_alone():
    large = torch.zeros(1024, 4096)
    assert memory.use_huge_pages(torch.zeros(1000), large.to("meta"), large.to_sparse()) == 0


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Address and size of what banks wanted in huge pages, part by part."""
    parts: list[tuple[int, int]] = []

    def move(address: int, size: int) -> int:
        parts.append((address, size))
        return size

    gc.collect()
    monkeypatch.setattr(memory, "_by_themselves", True)
    monkeypatch.setattr(memory._library, "use_huge_pages", move)
    monkeypatch.setattr(memory, "HUGE_PAGES_AFTER_ROWS", 32)
    return parts


def call(bank: torch.nn.Module, tokens: int = 64) -> torch.Tensor:
    ids = torch.arange(tokens)[:, None] % bank.num_experts
    return bank(torch.randn(tokens, bank.hidden_size), torch.ones(tokens, 1), ids)


def test_banks_move_once_they_have_been_read_often(moved: list[tuple[int, int]]):
    bank = layers.Experts(2, 512, 1024)
    call(bank).sum().backward()  # 16 rows per expert count.
    assert moved == []
    for _ in range(4):
        call(bank)
    for w, (address, size) in zip((bank.w_gate_up, bank.w_down), moved, strict=True):
        assert 0 <= address - w.data_ptr() < 2 * MIB and address % (2 * MIB) == 0
        assert address + size == w.data_ptr() + w.nbytes
    moved.clear()
    bank.w_down = torch.nn.Parameter(bank.w_down.detach().clone())
    call(bank)
    assert moved == []
    for _ in range(3):
        call(bank)
    assert len(moved) == 2


def test_a_call_moves_a_part_of_one_bank(
    moved: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "BYTES_A_CALL", 2 * MIB)
    banks = [layers.Experts(2, 512, 1024) for _ in range(3)]
    for bank in banks:
        call(bank)
    counts = []
    for _ in range(4):
        for bank in banks:
            call(bank)
        counts.append(len(moved))
    assert counts[-1] >= 3
    assert all(b - a <= 1 or a == 0 for a, b in zip([0, *counts], counts, strict=False)), counts
    assert all(size <= 2 * MIB for _, size in moved)


def test_small_shared_and_transformed_banks_do_not_move(moved: list[tuple[int, int]]):
    shared = layers.Experts(2, 512, 1024).share_memory()
    for bank in (layers.Experts(2, 64, 32), shared):
        for _ in range(4):
            call(bank)
    bank = layers.Experts(2, 512, 1024)
    pairs = {name: torch.stack([p.detach()] * 2) for name, p in bank.named_parameters()}
    arguments = (torch.ones(64, 512), torch.ones(64, 1), torch.zeros(64, 1, dtype=torch.int64))
    with torch.no_grad():
        for _ in range(4):
            torch.func.vmap(lambda p: torch.func.functional_call(bank, p, arguments))(pairs)
    assert moved == []


def test_quantized_banks_ask_for_huge_pages_before_they_are_filled(
    moved: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[int, int]] = []

    def madvise(address: int, size: int, advice: int) -> bool:
        asked.append((address, size))
        return True

    monkeypatch.setattr(memory, "madvise", madvise)
    bank = layers.Experts(4, 1024, 2048)
    quantized = moe_ops.quantize(bank, moe_ops.Int8WeightConfig())
    for w in (quantized.w_gate_up, quantized.w_down):
        assert any(
            0 <= address - w.data_ptr() < 2 * MIB and address + size == w.data_ptr() + w.nbytes
            for address, size in asked
        )
    other = quant.QuantizedExperts(4, 1024, 2048, format="int8")
    asked.clear()
    other.load_state_dict(quantized.state_dict())
    for _ in range(4):
        call(other)
    assert asked == moved == [], "nothing is moved that has been filled"
    other.move_to_huge_pages()
    assert len(moved) == 2


@pytest.mark.parametrize("is_linked", [False, True])
def test_pages_of_a_mapped_file_are_released(tmp_path: Path, is_linked: bool):
    values = torch.arange(4 * MIB // 4, dtype=torch.int32)
    path = tmp_path / "weights.safetensors"
    if is_linked:  # As in the cache of huggingface_hub
        blob = tmp_path / "blobs" / ("0123456789abcdef" * 4)
        blob.parent.mkdir()
        path.symlink_to(blob)
    values.numpy().tofile(path)
    mapped = torch.from_file(str(path), shared=False, size=values.numel(), dtype=torch.int32)
    mapped[5] = 7  # A page of its own, that the file does not have.
    assert int(mapped.sum()) == int(values.sum()) + 2
    asked = memory.release_file_pages()
    assert asked >= 4 * MIB if sys.platform == "linux" else asked == 0
    assert mapped[5] == 7
    assert int(mapped.sum()) == int(values.sum()) + 2
    assert memory.release_file_pages("no such file") == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_processes_and_the_environment_can_decline():
    code = (
        "import os, sys, torch; from moe_ops import layers, memory;"
        "seen = []; memory._library.use_huge_pages = lambda *t: seen.append(t) or 0;"
        "memory.HUGE_PAGES_AFTER_ROWS = 1;"
        "bank = layers.Experts(2, 512, 1024);"
        "child = sys.argv[1] == 'fork' and os.fork();"
        "child and sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]));"
        "torch.set_num_threads(1);"
        "bank(torch.randn(4, 512), torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.int64));"
        "os._exit(len(seen))"
    )
    for mode, setting, expected in (("fork", "1", 0), ("own", "1", 1), ("own", "0", 0)):
        environment = {"MOE_OPS_HUGE_PAGES": setting}
        run = fresh_python.run_python("-c", code, mode, env=environment)
        assert run.returncode == expected, (mode, setting)
