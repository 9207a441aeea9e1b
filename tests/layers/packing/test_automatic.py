"""Banks that pack themselves: when, within which budget, and beside other threads."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import os
import sys

import pytest
import torch
from tests.helpers.fresh_python import run_python
from tests.layers.packing.banks import assert_right, is_packed, make, operands, plain
from tests.layers.packing.changes import in_place
from torch import Tensor

import moe_ops
from moe_ops import memory
from moe_ops.expert_weights import packing
from moe_ops.layers import Experts
from moe_ops.testing import assert_identical

# CUDA has no packed copies.
pytestmark = pytest.mark.cpu_only


def slots(bank: Experts, tokens: int, times: int = 1) -> None:
    call = operands(bank.w_down.dtype, tokens)
    with torch.no_grad():
        for _ in range(times):
            bank(*call)


@pytest.fixture
def small(monkeypatch):
    gc.collect()  # Banks of earlier tests would take turns with those of this one.
    monkeypatch.setattr(packing, "MIN_BYTES", 0)
    monkeypatch.setattr(packing, "ROWS_PER_EXPERT", 64)


def test_auto_packs_after_enough_use(small, counted):
    with moe_ops.set_packing_policy("auto"):
        bank = make()
        slots(bank, tokens=16, times=8)  # 64 rows per expert
        assert not is_packed(bank)
        assert_right(bank)
        assert is_packed(bank)
    assert counted["moe_ffn_packed"] == 1
    assert not is_packed(bank)  # "off" again: copies that banks made by themselves go.


def test_the_rows_of_a_call_count_up_to_what_gains():
    """A call that has many rows an expert reads each weight once."""
    assert memory.counted_rows(8, 4) == 8
    assert memory.counted_rows(10**6, 4) == 4 * memory.ROWS_THAT_COUNT
    # By the default, 64 calls of a prefill, or 8192 tokens to 8 of 64 experts each by itself.
    assert packing.ROWS_PER_EXPERT == 64 * memory.ROWS_THAT_COUNT == 8192 * 8 / 64


def test_one_large_call_is_not_enough(small):
    with moe_ops.set_packing_policy("auto"):
        bank = make()
        slots(bank, tokens=1000, times=4)
        assert not is_packed(bank)
        slots(bank, tokens=1)
        assert is_packed(bank)


def written(bank: Experts) -> list[int]:
    """Returns, for each of the two copies, how many of the first experts differ from zeros."""
    state = packing._banks[bank]
    copies = state.copies or state.begun
    if copies is None:
        return [0, 0]
    rows = [c.view(bank.num_experts, -1).any(1) for c in (copies.gate_up, copies.down)]
    assert all(bool(r[: int(r.sum())].all()) for r in rows), "in order"
    return [int(r.sum()) for r in rows]


def test_a_call_packs_a_part(small, monkeypatch, counted):
    size = make().pack_weights()
    zeros = packing._new_copy
    monkeypatch.setattr(packing, "_new_copy", lambda *a: zeros(*a).zero_())
    monkeypatch.setattr(packing, "BYTES_A_CALL", size // 4)
    with moe_ops.set_packing_policy("auto"):
        bank = make()
        slots(bank, tokens=1000, times=4)
        for experts in (1, 2, 3):
            assert counted["moe_ffn_packed"] == 0
            slots(bank, tokens=5)
            assert written(bank) == [experts] * 2
            assert moe_ops.packed_weight_bytes(bank) == size, "reserved memory is reported"
        slots(bank, tokens=5)
        assert counted["moe_ffn_packed"] == 1
        assert_right(bank)
        in_place(bank)
        assert_right(bank)
        # Weights that change halfway begin again.
        slots(bank, tokens=1000, times=4)
        slots(bank, tokens=5, times=2)
        assert written(bank) == [2, 2]
        in_place(bank)
        slots(bank, tokens=1000, times=4)
        assert written(bank) == [0, 0]
        slots(bank, tokens=5)
        assert written(bank) == [1, 1]
    assert not is_packed(bank)


def test_one_bank_of_many_packs_in_a_pass(small):
    with moe_ops.set_packing_policy("auto"):
        banks = [make() for _ in range(3)]
        for bank in banks * 4:
            slots(bank, tokens=1000)
        counts = []
        for _ in range(4):
            for bank in banks:
                slots(bank, tokens=5)
            counts.append(sum(map(is_packed, banks)))
        assert all(b - a <= 1 for a, b in zip([0, *counts], counts, strict=False)), counts
        assert counts[-1] == 3


def test_memory_stats_has_the_copies(small):
    before = memory.memory_stats()["packed weights"]
    bank = make()
    size = bank.pack_weights()
    assert memory.memory_stats()["packed weights"] == before + size
    bank.unpack_weights()
    assert memory.memory_stats()["packed weights"] == before
    assert memory.memory_stats()["outputs"] == memory.cached_bytes()


def test_auto_counts_unchanged_weights_only(small):
    with moe_ops.set_packing_policy("auto"):
        bank = make()
        for _ in range(5):
            slots(bank, tokens=100, times=2)
            in_place(bank)
        assert not is_packed(bank)


def test_auto_leaves_small_banks_alone():
    with moe_ops.set_packing_policy("auto"):
        bank = make()
        slots(bank, tokens=100, times=6)
        assert not is_packed(bank)


@pytest.mark.parametrize("case", ["training", "grad", "deterministic", "off"])
def test_auto_does_not_pack(case, small):
    with moe_ops.set_packing_policy("off" if case == "off" else "auto"):
        bank, call = make(), operands(tokens=200)
        bank.train(case == "training")
        if case == "deterministic":
            torch.use_deterministic_algorithms(True)
        try:
            with torch.set_grad_enabled(case == "grad"):
                for _ in range(6):
                    bank(*call)
        finally:
            torch.use_deterministic_algorithms(False)
        assert not is_packed(bank)


def test_inference_mode_packs(small):
    with moe_ops.set_packing_policy("auto"):
        bank, call = make(), operands(tokens=200)
        with torch.inference_mode():
            for _ in range(6):
                bank(*call)
        assert is_packed(bank)
        in_place(bank)
        with torch.inference_mode():
            assert_identical(bank(*call), plain(bank, *call))


def test_weights_made_in_inference_mode_are_never_packed():
    """They count no versions, so nothing would tell when their copy is old."""
    with torch.inference_mode():
        bank = make()
    with moe_ops.set_packing_policy("always"), torch.inference_mode():
        call = operands()
        for _ in range(3):
            assert_identical(bank(*call), plain(bank, *call))
    assert not is_packed(bank)
    with pytest.raises(
        ValueError, match=r"pack_weights: w_gate_up must be made outside inference mode"
    ):
        bank.pack_weights()


def test_budget_counts_all_copies():
    first, second, third = make(), make(), make()
    size = first.pack_weights()
    with moe_ops.set_packing_policy("always", max_bytes=2 * size):
        assert_right(second)
        assert_right(third)
        assert [is_packed(b) for b in (first, second, third)] == [True, True, False]
        first.unpack_weights()
        with moe_ops.set_packing_policy("always", max_bytes=2 * size + 1):
            assert_right(third)
        assert is_packed(third)
    first.pack_weights()
    assert moe_ops.packed_weight_bytes() == size
    assert third.pack_weights() == size  # Asked for: no budget holds it back.


def test_auto_keeps_to_a_quarter_of_the_memory(small, monkeypatch):
    bank = make()
    size = bank.pack_weights()
    bank.unpack_weights()
    for available, packs in ((4 * size - 4, False), (4 * size, True)):
        monkeypatch.setattr(packing, "available_memory", lambda available=available: available)
        with moe_ops.set_packing_policy("auto"):
            assert moe_ops.packing.packing_settings() == ("auto", available // 4)
            slots(bank, tokens=200, times=6)
            assert is_packed(bank) == packs


def test_available_memory():
    available = moe_ops.memory.available_memory()
    if sys.platform == "linux":
        assert 0 < available <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_no_memory_is_no_error(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("not enough memory")

    bank = make()
    monkeypatch.setattr(packing, "pack_experts", fail)
    with moe_ops.set_packing_policy("always"):
        assert_right(bank)
    with pytest.raises(RuntimeError, match="not enough memory"):
        bank.pack_weights()
    assert not is_packed(bank)
    monkeypatch.undo()
    bank.pack_weights()
    assert_right(bank)


def test_settings():
    with moe_ops.set_packing_policy("always", max_bytes=7):
        assert moe_ops.packing.packing_settings() == ("always", 7)
        with moe_ops.set_packing_policy(max_bytes=9):
            assert moe_ops.packing.packing_settings() == ("always", 9)
        assert moe_ops.packing.packing_settings() == ("always", 7)
        moe_ops.set_packing_policy("off")
        assert moe_ops.packing.packing_settings()[0] == "off"
    with pytest.raises(ValueError, match="policy must be one of auto, off, always, got 'on'"):
        moe_ops.set_packing_policy("on")
    with pytest.raises(ValueError, match="max_bytes must be at least 0, got -1"):
        moe_ops.set_packing_policy(max_bytes=-1)


@pytest.mark.parametrize(
    ("environment", "settings", "warning"),
    [
        ({}, "('auto', None)", ""),
        ({"MOE_OPS_PACKING": "off"}, "('off', None)", ""),
        (
            {"MOE_OPS_PACKING": "always", "MOE_OPS_PACKING_MB": "3"},
            f"('always', {3 << 20})",
            "",
        ),
        ({"MOE_OPS_PACKING": "yes"}, "('auto', None)", "MOE_OPS_PACKING=yes is not one of"),
        ({"MOE_OPS_PACKING_MB": "1e3"}, "('auto', None)", "MOE_OPS_PACKING_MB=1e3 is not a whole"),
    ],
)
def test_environment(environment, settings, warning):
    unset = {"MOE_OPS_PACKING": None, "MOE_OPS_PACKING_MB": None}
    code = "from moe_ops.expert_weights import packing; print(tuple(packing._settings))"
    run = run_python("-c", code, env=unset | environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == settings
    assert warning in run.stderr
    assert bool(warning) == ("Warning" in run.stderr)


def test_many_threads_and_a_bank_that_packs(small):
    """Whatever the moment, a call gives the packed or the unpacked result, nothing between."""
    with moe_ops.set_packing_policy("auto"):
        bank, call = make(), operands(tokens=40)
        unpacked = plain(bank, *call)
        halves = bank.gated and not bank.interleaved
        packed = moe_ops.moe_ffn_packed(
            call[0],
            bank.w_gate_up.detach(),
            bank.w_down.detach(),
            moe_ops.pack_experts(bank.w_gate_up, halves=halves),
            moe_ops.pack_experts(bank.w_down),
            *call[1:],
        )

        def one(i: int) -> Tensor:
            with torch.no_grad():
                if i % 25 == 0:
                    bank.unpack_weights()
                return bank(*call)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            results = list(pool.map(one, range(200)))
        for y in results:
            assert torch.equal(y, packed) or torch.equal(y, unpacked)


def test_weights_that_change_while_they_are_packed(monkeypatch):
    bank, call = make(), operands()
    pack = packing.pack_experts

    def slow(w, **kwargs):
        packed = pack(w, **kwargs)
        in_place(bank)
        return packed

    monkeypatch.setattr(packing, "pack_experts", slow)
    with moe_ops.set_packing_policy("always"):
        with torch.no_grad():
            got = bank(*call)
        assert_identical(got, plain(bank, *call))
        assert not is_packed(bank)
    with pytest.raises(RuntimeError, match="must not change while they are packed"):
        bank.pack_weights()
    assert not is_packed(bank)


def test_other_threads_do_not_wait_for_packing(monkeypatch):
    bank, call = make(), operands()
    pack, results = packing.pack_experts, []

    def slow(w, **kwargs):
        with concurrent.futures.ThreadPoolExecutor(1) as pool, contextlib.suppress(TimeoutError):
            results.append(pool.submit(inference).result(timeout=30))
        return pack(w, **kwargs)

    def inference() -> Tensor:
        with torch.no_grad():
            return bank(*call)

    monkeypatch.setattr(packing, "pack_experts", slow)
    with moe_ops.set_packing_policy("always"):
        inference()
    assert len(results) == 2
    for y in results:
        assert_identical(y, plain(bank, *call))
