"""Packed copies of a bank's weights: the next result is always that of the weights as they are."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import gc
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_ops
from moe_ops.expert_weights import packing
from moe_ops.layers import Experts, MoE
from moe_ops.testing import DTYPES, assert_identical, short

H, I, E, K, T = 48, 40, 4, 2, 9


@pytest.fixture(autouse=True)
def off():
    """Tests begin with nothing packed and banks that pack when they are told to."""
    gc.collect()
    with moe_ops.prepacking("off"):
        yield


@pytest.fixture
def counted(monkeypatch):
    """How often each op ran."""
    calls = {"moe_ffn": 0, "moe_ffn_packed": 0, "pack_experts": 0}

    def watch(name):
        function = getattr(packing, name)

        def spy(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(packing, name, spy)

    for name in calls:
        watch(name)
    return calls


def make(dtype=torch.float32, **kwargs) -> Experts:
    bank = Experts(E, H, I, dtype=dtype, **kwargs)
    with torch.no_grad():
        for p in bank.parameters():
            p.normal_(std=0.3)
    return bank.eval()


def operands(dtype=torch.float32, tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.rand(tokens, E).argsort(1)[:, :K].int()
    return torch.randn(tokens, H).to(dtype), torch.rand(tokens, K), ids


def plain(bank: Experts, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """moe_ffn on the parameters as they are."""
    with torch.no_grad():
        return moe_ops.moe_ffn(
            x,
            bank.w_gate_up,
            bank.w_down,
            weights,
            ids,
            b_gate_up=bank.b_gate_up,
            b_down=bank.b_down,
            activation=bank.activation,
            interleaved=bank.interleaved,
            alpha=bank.alpha,
            limit=bank.limit,
        )


def assert_right(bank: Experts, call: tuple[Tensor, ...] | None = None) -> None:
    """The bank's next result is that of its weights, up to the order of the sums."""
    call = operands(bank.w_down.dtype) if call is None else call
    with torch.no_grad():
        got, want = bank(*call).double(), plain(bank, *call).double()
    eps = torch.finfo(bank.w_down.dtype).eps
    assert (got - want).norm() <= 4 * eps * want.norm()


def is_packed(bank: nn.Module) -> bool:
    return moe_ops.packed_bytes(bank) > 0


# --- values


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(
    ("activation", "interleaved", "bias"),
    [
        ("swiglu", False, False),
        ("geglu_tanh", False, True),
        ("swiglu_oai", True, True),
        ("swiglu_oai", False, True),
        ("relu2", False, False),
        ("gelu", False, True),
    ],
)
def test_packed_equals_unpacked(activation, interleaved, bias, dtype, counted):
    bank = make(dtype, activation=activation, interleaved=interleaved, bias=bias)
    weight_bytes = sum(w.numel() * w.element_size() for w in (bank.w_gate_up, bank.w_down))
    assert bank.prepack() == moe_ops.packed_bytes(bank) >= weight_bytes
    for tokens in (0, 1, 4, 70):
        assert_right(bank, operands(dtype, tokens))
    assert counted["moe_ffn_packed"] == 4
    assert is_packed(bank)
    assert bank.unpack() >= weight_bytes
    assert not is_packed(bank)


def test_moe_and_whole_models():
    first = MoE.build(H, I, E, K, num_shared_experts=1).eval()
    model = nn.Sequential(first, MoE.build(H, I, E, K)).eval()
    x = torch.randn(3, 5, H)
    with torch.no_grad():
        want = model(x)
        assert first.prepack() == moe_ops.packed_bytes(first.experts) > 0
        assert moe_ops.prepack(model) == 2 * moe_ops.packed_bytes(first)
        torch.testing.assert_close(model(x), want)
        assert moe_ops.packed_bytes(model) == moe_ops.packed_bytes()
        assert first.unpack() > 0
        assert moe_ops.unpack(model) > 0
    assert moe_ops.packed_bytes(model) == moe_ops.packed_bytes() == 0


def test_packing_twice_packs_once(counted):
    bank = make()
    bank.prepack()
    bank.prepack()
    assert counted["pack_experts"] == 2  # One for each of the two weights.


def test_packed_bits_repeat():
    bank, call = make(), operands()
    bank.prepack()
    with torch.no_grad():
        first = bank(*call)
        assert_identical(bank(*call), first)


# --- everything that changes weights


def sgd(bank, **kwargs):
    return torch.optim.SGD(bank.parameters(), lr=0.1, momentum=0.9, **kwargs)


def adamw(bank, **kwargs):
    return torch.optim.AdamW(bank.parameters(), lr=0.1, **kwargs)


def step(bank, optimizer, **kwargs):
    """A step with gradients from somewhere else: no call of the bank gives it away."""
    for p in bank.parameters():
        p.grad = torch.randn_like(p)
    optimizer(bank, **kwargs).step()


def load(bank, **kwargs):
    bank.load_state_dict({k: v + 1 for k, v in bank.state_dict().items()}, **kwargs)


def in_place(bank):
    with torch.no_grad():
        bank.w_down.mul_(1.5)


def part(bank):
    with torch.no_grad():
        bank.w_gate_up[1, 3, 7] += 2


def through_a_view(bank):
    with torch.no_grad():
        bank.w_gate_up.view(-1)[5] += 2


def in_inference_mode(bank):
    with torch.inference_mode():
        bank.w_down[2].mul_(-1)


def data(bank):
    bank.w_gate_up.data.mul_(-1)


def data_of_one_expert(bank):
    bank.w_down.data[:, :, : I // 4] = 0


def numpy(bank):
    array = bank.w_down.detach().numpy()
    array *= 2


def assign_data(bank):
    bank.w_down.data = bank.w_down.data * 2


def offload_and_bring_back(bank):
    values, shape = bank.w_down.data.clone() * 2, bank.w_down.shape
    bank.w_down.data = torch.empty(0)
    bank.w_down.data = torch.empty(shape)
    bank.w_down.data.copy_(values)


def replace(bank):
    bank.w_down = nn.Parameter(bank.w_down.detach() * 2)


def replace_by_views(bank):
    with torch.no_grad():
        bank.w_down = nn.Parameter((bank.w_down * 2).transpose(1, 2).contiguous().transpose(1, 2))


def swap(bank):
    torch.utils.swap_tensors(bank.w_down, nn.Parameter(bank.w_down.detach() * 2))


def copied_from_another(bank):
    with torch.no_grad():
        for p, q in zip(bank.parameters(), make().parameters(), strict=True):
            p.copy_(q)


def reset(bank):
    bank.reset_parameters()


CHANGES = {
    "in place": in_place,
    "one element": part,
    "view": through_a_view,
    "inference mode": in_inference_mode,
    ".data": data,
    ".data of a part": data_of_one_expert,
    "numpy": numpy,
    "new .data": assign_data,
    "offload": offload_and_bring_back,
    "new parameter": replace,
    "new strides": replace_by_views,
    "swap_tensors": swap,
    "copy_": copied_from_another,
    "reset": reset,
    "load_state_dict": load,
    "load_state_dict assign": lambda bank: load(bank, assign=True),
    "sgd": lambda bank: step(bank, sgd),
    "sgd foreach": lambda bank: step(bank, sgd, foreach=True),
    "sgd fused": lambda bank: step(bank, sgd, fused=True),
    "adamw": lambda bank: step(bank, adamw),
    "adamw fused": lambda bank: step(bank, adamw, fused=True),
    "double": lambda bank: bank.double(),
    "half": lambda bank: bank.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("policy", ["off", "always"])
def test_changed_weights_count_at_the_next_call(policy, change):
    with moe_ops.prepacking(policy):
        bank = make()
        if policy == "off":
            bank.prepack()
        assert_right(bank)
        assert is_packed(bank)
        change(bank)
        assert_right(bank)
        assert_right(bank)
        assert is_packed(bank) == (policy == "always")


def test_a_fused_step_that_hardly_moves_anything():
    """Too few elements change for samples to find them, and fused steps count no version."""
    bank = make(torch.bfloat16)
    bank.prepack()
    version = bank.w_down._version
    for p in bank.parameters():
        p.grad = torch.zeros_like(p)
    bank.w_down.grad[1, 2, 3] = 100.0
    torch.optim.SGD(bank.parameters(), lr=0.1, fused=True).step()
    assert bank.w_down._version == version, "fused steps count versions now: good"
    assert not is_packed(bank)


def test_a_step_of_other_parameters_changes_nothing():
    bank, other = make(), nn.Linear(3, 3)
    bank.prepack()
    other(torch.randn(2, 3)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert is_packed(bank)


def test_memory_of_old_weights_given_to_new_ones():
    """Storage addresses come back; what was packed for the old owner must not."""
    bank = make()
    for i in range(20):
        bank.prepack()
        bank.w_down = None
        bank.w_down = nn.Parameter(torch.full((E, H, I), float(i)))
        assert_right(bank)


def test_new_layout_of_the_same_numbers():
    bank = make(activation="swiglu_oai", bias=True)
    bank.prepack()
    bank.interleaved = True
    assert_right(bank)


# --- training


def test_train_drops_the_copy():
    bank = make()
    bank.prepack()
    assert bank.eval() is bank
    assert is_packed(bank)
    assert bank.train() is bank
    assert not is_packed(bank)
    moe = MoE(MoE.build(H, I, E, K).router, bank).eval()
    moe.prepack()
    moe.train()
    assert not is_packed(moe)


def test_training_ignores_the_copy(counted):
    bank, (x, weights, ids) = make(), operands()
    bank.prepack()
    y = bank(x, weights, ids)
    assert y.requires_grad
    assert counted["moe_ffn_packed"] == 0
    assert not is_packed(bank)  # The weights are about to change, perhaps in a way unseen.
    grads = torch.autograd.grad(y.sum(), list(bank.parameters()))
    assert all(g is not None for g in grads)


def test_gradients_of_the_input_alone_leave_the_copy(counted):
    bank, (x, weights, ids) = make().requires_grad_(False), operands()
    bank.prepack()
    y = bank(x.requires_grad_(), weights, ids)
    torch.autograd.grad(y.sum(), x)
    assert counted["moe_ffn_packed"] == 0
    assert is_packed(bank)
    bank(x.detach(), weights, ids)  # Grad mode is on and nothing wants one.
    assert counted["moe_ffn_packed"] == 1


def test_a_bank_in_training_mode_is_packed_only_when_asked(counted):
    with moe_ops.prepacking("always"):
        bank = make().train()
        assert_right(bank)
        assert not is_packed(bank)
        bank.prepack()
        assert_right(bank)
    assert counted["moe_ffn_packed"] == 1


def test_train_and_evaluate_in_turn():
    torch.manual_seed(0)
    with moe_ops.prepacking("always"):
        bank, optimizer = make(), None
        optimizer = adamw(bank, fused=True)
        for _ in range(3):
            bank.train()
            x, weights, ids = operands()
            optimizer.zero_grad()
            bank(x, weights, ids).square().mean().backward()
            optimizer.step()
            bank.eval()
            assert_right(bank)
            assert is_packed(bank)


# --- nobody else notices


def test_state_dict_copies_and_pickles():
    bank, call = make(bias=True), operands()
    before = bank.state_dict()
    bank.prepack()
    assert bank.state_dict().keys() == before.keys()
    assert len(list(bank.buffers())) == 0
    for twin in (
        copy.deepcopy(bank),
        copy.copy(bank),
        pickle.loads(pickle.dumps(bank)),
        torch.load(save(bank), weights_only=False),
    ):
        assert not is_packed(twin)
        assert "packed" not in repr(twin)
        with torch.no_grad():
            assert_identical(twin(*call), plain(bank, *call))
    assert len(pickle.dumps(bank)) == len(pickle.dumps(copy.deepcopy(bank)))
    assert is_packed(bank)
    assert f"packed={moe_ops.packed_bytes(bank) / 2**20:.1f} MiB" in repr(bank)


def save(bank):
    file = io.BytesIO()
    torch.save(bank, file)
    file.seek(0)
    return file


def test_moving_nowhere_keeps_the_copy():
    bank = make()
    bank.prepack()
    bank.to("cpu").float().requires_grad_(False)
    assert is_packed(bank)


def test_moving_away_frees_the_copy():
    bank = make()
    bank.prepack()
    bank.to("meta")
    assert moe_ops.packed_bytes() == 0


def test_a_copy_dies_with_its_bank():
    bank = make()
    bank.prepack()
    assert moe_ops.packed_bytes() > 0
    del bank
    gc.collect()
    assert moe_ops.packed_bytes() == 0


def test_bank_operations_start_unpacked():
    bank = make()
    bank.prepack()
    assert not is_packed(bank.select([0, 1]))
    assert is_packed(bank)


# --- packing by itself


def slots(bank: Experts, tokens: int, times: int = 1) -> None:
    call = operands(bank.w_down.dtype, tokens)
    with torch.no_grad():
        for _ in range(times):
            bank(*call)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(packing, "MIN_BYTES", 0)


def test_auto_packs_after_enough_use(small, counted):
    with moe_ops.prepacking("auto"):
        bank = make()
        slots(bank, tokens=16, times=8)  # 64 slots an expert
        assert not is_packed(bank)
        assert_right(bank)
        assert is_packed(bank)
    assert counted["moe_ffn_packed"] == 1
    assert not is_packed(bank)  # "off" again: copies that banks made by themselves go.


def test_auto_wants_two_calls(small):
    with moe_ops.prepacking("auto"):
        bank = make()
        slots(bank, tokens=1000)
        slots(bank, tokens=1)
        assert not is_packed(bank)
        slots(bank, tokens=1)
        assert is_packed(bank)


def test_auto_counts_unchanged_weights_only(small):
    with moe_ops.prepacking("auto"):
        bank = make()
        for _ in range(5):
            slots(bank, tokens=100, times=2)
            in_place(bank)
        assert not is_packed(bank)


def test_auto_leaves_small_banks_alone():
    with moe_ops.prepacking("auto"):
        bank = make()
        slots(bank, tokens=100, times=5)
        assert not is_packed(bank)


@pytest.mark.parametrize("case", ["training", "grad", "deterministic", "off"])
def test_auto_does_not_pack(case, small):
    with moe_ops.prepacking("off" if case == "off" else "auto"):
        bank, call = make(), operands(tokens=200)
        bank.train(case == "training")
        if case == "deterministic":
            torch.use_deterministic_algorithms(True)
        try:
            with torch.set_grad_enabled(case == "grad"):
                for _ in range(5):
                    bank(*call)
        finally:
            torch.use_deterministic_algorithms(False)
        assert not is_packed(bank)


def test_inference_mode_packs(small):
    with moe_ops.prepacking("auto"):
        bank, call = make(), operands(tokens=200)
        with torch.inference_mode():
            for _ in range(4):
                bank(*call)
        assert is_packed(bank)
        in_place(bank)
        with torch.inference_mode():
            assert_identical(bank(*call), plain(bank, *call))


def test_weights_made_in_inference_mode_are_never_packed():
    """They count no versions, so nothing would tell when their copy is old."""
    with torch.inference_mode():
        bank = make()
    with moe_ops.prepacking("always"), torch.inference_mode():
        call = operands()
        for _ in range(3):
            assert_identical(bank(*call), plain(bank, *call))
    assert not is_packed(bank)
    with pytest.raises(ValueError, match=r"prepack: w_gate_up must be made outside inference mode"):
        bank.prepack()


def test_budget_counts_all_copies():
    first, second, third = make(), make(), make()
    size = first.prepack()
    with moe_ops.prepacking("always", max_bytes=2 * size):
        assert_right(second)
        assert_right(third)
        assert [is_packed(b) for b in (first, second, third)] == [True, True, False]
        first.unpack()
        with moe_ops.prepacking("always", max_bytes=2 * size + 1):
            assert_right(third)
        assert is_packed(third)
    first.prepack()
    assert moe_ops.packed_bytes() == size
    assert third.prepack() == size  # Asked for: no budget holds it back.


def test_auto_keeps_to_a_quarter_of_the_memory(small, monkeypatch):
    bank = make()
    size = bank.prepack()
    bank.unpack()
    for available, packs in ((4 * size - 4, False), (4 * size, True)):
        monkeypatch.setattr(packing, "available_memory", lambda available=available: available)
        with moe_ops.prepacking("auto"):
            assert moe_ops.packing.prepack_settings() == ("auto", available // 4)
            slots(bank, tokens=200, times=4)
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
    with moe_ops.prepacking("always"):
        assert_right(bank)
    with pytest.raises(RuntimeError, match="not enough memory"):
        bank.prepack()
    assert not is_packed(bank)
    monkeypatch.undo()
    bank.prepack()
    assert_right(bank)


def test_settings():
    with moe_ops.prepacking("always", max_bytes=7):
        assert moe_ops.packing.prepack_settings() == ("always", 7)
        with moe_ops.prepacking(max_bytes=9):
            assert moe_ops.packing.prepack_settings() == ("always", 9)
        assert moe_ops.packing.prepack_settings() == ("always", 7)
        moe_ops.prepacking("off")
        assert moe_ops.packing.prepack_settings()[0] == "off"
    with pytest.raises(ValueError, match="policy must be one of auto, off, always, got 'on'"):
        moe_ops.prepacking("on")
    with pytest.raises(ValueError, match="max_bytes must be at least 0, got -1"):
        moe_ops.prepacking(max_bytes=-1)


@pytest.mark.parametrize(
    ("environment", "settings", "warning"),
    [
        ({}, "('auto', None)", ""),
        ({"MOE_OPS_PREPACK": "off"}, "('off', None)", ""),
        (
            {"MOE_OPS_PREPACK": "always", "MOE_OPS_PREPACK_MB": "3"},
            f"('always', {3 << 20})",
            "",
        ),
        ({"MOE_OPS_PREPACK": "yes"}, "('auto', None)", "MOE_OPS_PREPACK=yes is not one of"),
        ({"MOE_OPS_PREPACK_MB": "1e3"}, "('auto', None)", "MOE_OPS_PREPACK_MB=1e3 is not a whole"),
    ],
)
def test_environment(environment, settings, warning):
    rest = {k: v for k, v in os.environ.items() if not k.startswith("MOE_OPS_PREPACK")}
    path = os.pathsep.join(p for p in sys.path if p)
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "from moe_ops.expert_weights import packing; print(tuple(packing._settings))",
        ],
        env=rest | environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == settings
    assert warning in run.stderr
    assert bool(warning) == ("Warning" in run.stderr)


# --- what cannot be packed


def test_no_bank_says_so():
    with pytest.raises(ValueError, match=r"must hold a bank of experts .* got Linear"):
        moe_ops.prepack(nn.Linear(3, 3))


def test_weights_elsewhere_say_so():
    with pytest.raises(ValueError, match=r"on the CPU, got Parameter torch\.float32 on meta"):
        make(device="meta").prepack()


def test_autocast_goes_its_own_way(counted):
    bank, call = make(), operands()
    bank.prepack()
    with torch.no_grad(), torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = bank(*call)
    assert y.dtype == torch.bfloat16
    assert counted["moe_ffn_packed"] == 0
    assert is_packed(bank)
    half, call = make(torch.bfloat16), operands()
    half.prepack()
    with torch.no_grad(), torch.autocast(torch.get_default_device().type, torch.bfloat16):
        half(*call)  # x is cast, the weights need not be
    assert counted["moe_ffn_packed"] == 1


# --- graphs


def test_compile_holds_moe_ffn():
    """A copy in a graph would outlive the checks; compiled calls do without."""
    bank, call = make(), operands()
    bank.prepack()
    compiled = torch.compile(bank, fullgraph=True, backend="aot_eager")
    for change in (lambda bank: None, in_place, data, lambda bank: step(bank, adamw, fused=True)):
        change(bank)
        with torch.no_grad():
            assert_identical(compiled(*call), plain(bank, *call))


def test_compiled_training_and_packed_evaluation():
    with moe_ops.prepacking("always"):
        bank, (x, weights, ids) = make(), operands()
        compiled = torch.compile(bank, fullgraph=True, backend="aot_eager")
        optimizer = adamw(bank, fused=True)
        for _ in range(3):
            compiled(x, weights, ids).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert_right(bank)
            assert is_packed(bank)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    bank, call = make(), operands()
    bank.prepack()
    program = torch.export.export(bank, call, strict=strict)
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert any("moe_ops.moe_ffn.default" in t for t in targets), targets
    assert not any("packed" in t for t in targets)
    with torch.no_grad():
        assert_identical(program.module()(*call), plain(bank, *call))
    assert is_packed(bank)


def test_fake_tensors():
    bank, call = make(), operands()
    bank.prepack()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        y = bank(*(mode.from_tensor(t) for t in call))
    assert y.shape == (T, H)
    with FakeTensorMode(), torch.no_grad():
        fake = Experts(E, H, I).eval()
        with moe_ops.prepacking("always"):
            assert fake(torch.empty(T, H), torch.empty(T, K), torch.zeros(T, K).int()).shape
    assert is_packed(bank)


def test_make_fx_and_jit_trace_hold_no_copy():
    bank, call = make(), operands()
    bank.prepack()
    with torch.no_grad():
        graph = torch.fx.experimental.proxy_tensor.make_fx(bank)(*call)
        assert "moe_ffn_packed" not in graph.code
        want = plain(bank, *call)
        assert_identical(graph(*call), want)
    assert is_packed(bank)


def test_functional_call_with_other_weights():
    bank, call = make(), operands()
    bank.prepack()
    other = {name: p.detach() * 2 for name, p in bank.named_parameters()}
    with torch.no_grad():
        got = torch.func.functional_call(bank, other, call)
        twin = copy.deepcopy(bank)
        twin.load_state_dict(other)
        assert_identical(got, plain(twin, *call))
    assert_right(bank)


# --- threads


def test_many_threads_and_a_bank_that_packs(small):
    """Whatever the moment, a call gives the packed or the unpacked result, nothing between."""
    with moe_ops.prepacking("auto"):
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
                    bank.unpack()
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
    with moe_ops.prepacking("always"):
        with torch.no_grad():
            got = bank(*call)
        assert_identical(got, plain(bank, *call))
        assert not is_packed(bank)
    with pytest.raises(RuntimeError, match="must not change while they are packed"):
        bank.prepack()
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
    with moe_ops.prepacking("always"):
        inference()
    assert len(results) == 2
    for y in results:
        assert_identical(y, plain(bank, *call))
