"""Packed copies of the experts of transformers' models."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

import moe_ops.hf
from moe_ops.expert_weights import packing

from .models import CONFIGS, MODEL_TYPES, NUM_FFNS, VOCAB, build

# DBRX keeps gate and up apart, so its experts are no moe_ffn.
PACKED = tuple(name for name in MODEL_TYPES if name != "dbrx")


@pytest.fixture(autouse=True)
def off():
    gc.collect()
    with moe_ops.set_packing_policy("off"):
        yield


@pytest.fixture
def ids():
    return torch.randint(1, VOCAB, (2, 11))


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def make(model_type):
    model = build(model_type).eval()
    moe_ops.hf.enable(model)
    return model


def assert_close(a, b):
    assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.fixture
def packed_calls(monkeypatch):
    calls = []
    function = packing.moe_ffn_packed

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return function(*args, **kwargs)

    monkeypatch.setattr(packing, "moe_ffn_packed", spy)
    return calls


@pytest.mark.cpu_only  # CUDA has no packed copies.
@pytest.mark.parametrize("model_type", PACKED)
def test_logits_are_the_same(model_type, ids, packed_calls):
    model = make(model_type)
    want, keys = logits(model, ids), list(model.state_dict())
    size = moe_ops.pack_weights(model)
    assert size == moe_ops.packed_weight_bytes(model) > 0
    assert list(model.state_dict()) == keys
    assert_close(logits(model, ids), want)
    assert len(packed_calls) == NUM_FFNS[model_type]
    assert moe_ops.packed_weight_bytes(model) == size  # Used, and not thrown away.
    assert moe_ops.packed_weight_bytes(copy.deepcopy(model)) == 0
    assert moe_ops.unpack_weights(model) == size
    assert torch.equal(logits(model, ids), want)


@pytest.mark.parametrize("model_type", PACKED)
def test_changed_weights_count(model_type, ids):
    model = make(model_type)
    moe_ops.pack_weights(model)
    other = build(model_type).eval()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.01 * torch.randn_like(p))
    model.load_state_dict(other.state_dict())
    moe_ops.hf.enable(other)
    assert torch.equal(logits(model, ids), logits(other, ids))
    assert moe_ops.packed_weight_bytes(model) == 0
    moe_ops.pack_weights(model)
    for p in model.parameters():
        p.data.mul_(1.125)
    for p in other.parameters():
        p.data.mul_(1.125)
    assert torch.equal(logits(model, ids), logits(other, ids))
    assert moe_ops.packed_weight_bytes(model) == 0


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text", "jetmoe"])
def test_training_drops_the_copies(model_type, ids):
    model = make(model_type)
    moe_ops.pack_weights(model)
    model.train()
    model(ids, labels=ids).loss.backward()
    assert moe_ops.packed_weight_bytes(model) == 0


@pytest.mark.cpu_only  # CUDA has no packed copies.
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text", "jetmoe"])
def test_generate_packs_by_itself(model_type, ids, monkeypatch):
    monkeypatch.setattr(packing, "MIN_BYTES", 0)
    monkeypatch.setattr(packing, "ROWS_PER_EXPERT", 8)
    model = make(model_type)
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **arguments)
    assert moe_ops.packed_weight_bytes(model) == 0
    with moe_ops.set_packing_policy("auto"):
        assert torch.equal(model.generate(ids, **arguments), want)
        assert moe_ops.packed_weight_bytes(model) > 0


def test_disable_frees(ids):
    model = make("mixtral")
    moe_ops.pack_weights(model)
    moe_ops.hf.disable(model)
    assert moe_ops.packed_weight_bytes() == 0
    with pytest.raises(ValueError, match=r"pack_weights: model must hold a bank of experts"):
        moe_ops.pack_weights(model)


@pytest.mark.parametrize("model_type", ["dbrx", "mixtral"])
def test_blocks_without_moe_ffn_say_so(model_type):
    model = build(model_type) if model_type == "mixtral" else make(model_type)
    with pytest.raises(ValueError, match=r"pack_weights: model must hold a bank of experts"):
        moe_ops.pack_weights(model)


def test_an_activation_that_no_op_knows_stays_unpacked(ids):
    model = make("mixtral")
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = torch.nn.Softplus()
    with moe_ops.set_packing_policy("always"):
        logits(model, ids)
        assert moe_ops.packed_weight_bytes() == 0


def test_compiled_models_do_without(ids):
    torch.compiler.reset()
    model = make("mixtral")
    want = logits(model, ids)
    moe_ops.pack_weights(model)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.equal(logits(compiled, ids), want)
    torch.compiler.reset()


def test_every_model_type_is_sorted():
    assert set(PACKED) | {"dbrx"} == set(CONFIGS)
