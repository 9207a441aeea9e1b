"""Packed copies of a bank's weights: results, modules that hold them, what cannot be packed."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from tests.layers.pack_weights.banks import (
    E,
    H,
    I,
    K,
    T,
    assert_right,
    is_packed,
    make,
    operands,
    plain,
)
from tests.layers.pack_weights.changes import adamw, data, in_place, step
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_ops
from moe_ops.layers import Experts, MoE
from moe_ops.testing import DTYPES, assert_identical, short

# CUDA has no packed copies.
pytestmark = pytest.mark.cpu_only


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
    assert bank.pack_weights() == moe_ops.packed_weight_bytes(bank) >= weight_bytes
    for tokens in (0, 1, 4, 70):
        assert_right(bank, operands(dtype, tokens))
    assert counted["moe_ffn_packed"] == 4
    assert is_packed(bank)
    assert bank.unpack_weights() >= weight_bytes
    assert not is_packed(bank)


def test_moe_and_whole_models():
    first = MoE.build(H, I, E, K, num_shared_experts=1).eval()
    model = nn.Sequential(first, MoE.build(H, I, E, K)).eval()
    x = torch.randn(3, 5, H)
    with torch.no_grad():
        want = model(x)
        assert first.pack_weights() == moe_ops.packed_weight_bytes(first.experts) > 0
        assert moe_ops.pack_weights(model) == 2 * moe_ops.packed_weight_bytes(first)
        torch.testing.assert_close(model(x), want)
        assert moe_ops.packed_weight_bytes(model) == moe_ops.packed_weight_bytes()
        assert first.unpack_weights() > 0
        assert moe_ops.unpack_weights(model) > 0
    assert moe_ops.packed_weight_bytes(model) == moe_ops.packed_weight_bytes() == 0


def test_packing_twice_packs_once(counted):
    bank = make()
    bank.pack_weights()
    bank.pack_weights()
    assert counted["pack_experts"] == 2  # One for each of the two weights.


def test_packed_bits_repeat():
    bank, call = make(), operands()
    bank.pack_weights()
    with torch.no_grad():
        first = bank(*call)
        assert_identical(bank(*call), first)


def test_state_dict_copies_and_pickles():
    bank, call = make(bias=True), operands()
    before = bank.state_dict()
    bank.pack_weights()
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
    assert f"packed={moe_ops.packed_weight_bytes(bank) / 2**20:.1f} MiB" in repr(bank)


def save(bank):
    file = io.BytesIO()
    torch.save(bank, file)
    file.seek(0)
    return file


def test_moving_nowhere_keeps_the_copy():
    bank = make()
    bank.pack_weights()
    bank.to("cpu").float().requires_grad_(False)
    assert is_packed(bank)


def test_moving_away_frees_the_copy():
    bank = make()
    bank.pack_weights()
    bank.to("meta")
    assert moe_ops.packed_weight_bytes() == 0


def test_a_copy_dies_with_its_bank():
    bank = make()
    bank.pack_weights()
    assert moe_ops.packed_weight_bytes() > 0
    del bank
    gc.collect()
    assert moe_ops.packed_weight_bytes() == 0


def test_bank_operations_start_unpacked():
    bank = make()
    bank.pack_weights()
    assert not is_packed(bank.select([0, 1]))
    assert is_packed(bank)


def test_no_bank_says_so():
    with pytest.raises(ValueError, match=r"must hold a bank of experts .* got Linear"):
        moe_ops.pack_weights(nn.Linear(3, 3))


def test_weights_elsewhere_say_so():
    with pytest.raises(ValueError, match=r"on the CPU, got Parameter torch\.float32 on meta"):
        make(device="meta").pack_weights()


def test_autocast_goes_its_own_way(counted):
    bank, call = make(), operands()
    bank.pack_weights()
    with torch.no_grad(), torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = bank(*call)
    assert y.dtype == torch.bfloat16
    assert counted["moe_ffn_packed"] == 0
    assert is_packed(bank)
    half, call = make(torch.bfloat16), operands()
    half.pack_weights()
    with torch.no_grad(), torch.autocast(torch.get_default_device().type, torch.bfloat16):
        half(*call)  # x is cast, the weights need not be
    assert counted["moe_ffn_packed"] == 1


def test_compile_holds_moe_ffn():
    """A copy in a graph would outlive the checks; compiled calls do without."""
    bank, call = make(), operands()
    bank.pack_weights()
    compiled = torch.compile(bank, fullgraph=True, backend="aot_eager")
    for change in (lambda bank: None, in_place, data, lambda bank: step(bank, adamw, fused=True)):
        change(bank)
        with torch.no_grad():
            assert_identical(compiled(*call), plain(bank, *call))


def test_compiled_training_and_packed_evaluation():
    with moe_ops.set_packing_policy("always"):
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
    bank.pack_weights()
    program = torch.export.export(bank, call, strict=strict)
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert any("moe_ops.moe_ffn.default" in t for t in targets), targets
    assert not any("packed" in t for t in targets)
    with torch.no_grad():
        assert_identical(program.module()(*call), plain(bank, *call))
    assert is_packed(bank)


def test_fake_tensors():
    bank, call = make(), operands()
    bank.pack_weights()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        y = bank(*(mode.from_tensor(t) for t in call))
    assert y.shape == (T, H)
    with FakeTensorMode(), torch.no_grad():
        fake = Experts(E, H, I).eval()
        with moe_ops.set_packing_policy("always"):
            assert fake(torch.empty(T, H), torch.empty(T, K), torch.zeros(T, K).int()).shape
    assert is_packed(bank)


def test_make_fx_and_jit_trace_hold_no_copy():
    bank, call = make(), operands()
    bank.pack_weights()
    with torch.no_grad():
        graph = torch.fx.experimental.proxy_tensor.make_fx(bank)(*call)
        assert "moe_ffn_packed" not in graph.code
        want = plain(bank, *call)
        assert_identical(graph(*call), want)
    assert is_packed(bank)


def test_functional_call_with_other_weights():
    bank, call = make(), operands()
    bank.pack_weights()
    other = {name: p.detach() * 2 for name, p in bank.named_parameters()}
    with torch.no_grad():
        got = torch.func.functional_call(bank, other, call)
        twin = copy.deepcopy(bank)
        twin.load_state_dict(other)
        assert_identical(got, plain(twin, *call))
    assert_right(bank)


def test_banks_on_cuda_are_passed_over():
    """Their kernels read the weights as they are: a model that works on the CPU works there."""
    bank, other = make(), make()
    bank.pack_weights()
    for name, weight in list(bank.named_parameters()):
        with FakeTensorMode():  # There need not be a GPU.
            moved = torch.empty(weight.shape, device="cuda")
        setattr(bank, name, nn.Parameter(moved, requires_grad=False))
    model = nn.ModuleList([bank, other])
    assert moe_ops.pack_weights(bank) == 0
    assert moe_ops.pack_weights(model) == moe_ops.packed_weight_bytes(other) > 0
