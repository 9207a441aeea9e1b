"""enable, disable, status and expect_calls; importing without transformers."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import moe_ops.hf
from moe_ops._requirements import transformers_is_too_old
from moe_ops.hf.experts.forward import experts_forward

from .models import BLOCK_NAMES, UNDECORATED, build, tokens


def dense_model():
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return AutoModelForCausalLM.from_config(config)


def test_import_registers_the_implementation():
    assert ALL_EXPERTS_FUNCTIONS["moe_ops"] is experts_forward


def test_dense_model_raises():
    with pytest.raises(ValueError, match="Qwen3ForCausalLM holds no MoE block"):
        moe_ops.hf.enable(dense_model())


def test_dense_model_has_no_status():
    assert moe_ops.hf.status(dense_model()) == {}


def test_set_experts_implementation():
    model = build("qwen3_moe")
    model.set_experts_implementation("moe_ops")
    assert set(moe_ops.hf.status(model).values()) == {"moe_ops"}


def test_set_experts_implementation_by_dict():
    model = build("qwen3_moe")
    model.set_experts_implementation({"": "moe_ops"})
    assert set(moe_ops.hf.status(model).values()) == {"moe_ops"}


def test_report_names_blocks():
    assert moe_ops.hf.enable(build("qwen3_moe")) == {
        "model.layers.0.mlp.experts": "experts_implementation",
        "model.layers.1.mlp.experts": "experts_implementation",
    }


def test_report_of_an_undecorated_model():
    assert moe_ops.hf.enable(build("jetmoe")) == {
        "model.layers.0.self_attention": "forward",
        "model.layers.0.mlp": "forward",
        "model.layers.1.self_attention": "forward",
        "model.layers.1.mlp": "forward",
    }


def test_enable_twice_reports_the_same():
    model = build("dbrx")
    assert moe_ops.hf.enable(model) == moe_ops.hf.enable(model)
    moe_ops.hf.disable(model)
    assert set(moe_ops.hf.status(model).values()) == {"transformers"}


def test_enable_twice_remembers_the_first_implementation():
    model = build("mixtral")
    moe_ops.hf.enable(model)
    moe_ops.hf.enable(model)
    assert set(moe_ops.hf.disable(model).values()) == {"eager"}


def test_disable_after_loading_with_moe_ops_goes_to_the_default():
    model = build("mixtral", experts="moe_ops")
    assert set(moe_ops.hf.disable(model).values()) == {"grouped_mm"}
    assert model.get_experts_implementation()[""] == "grouped_mm"


@pytest.mark.parametrize("model_type", ["mixtral", "jetmoe"])
def test_disable_without_enable_does_nothing(model_type):
    model = build(model_type)
    before = moe_ops.hf.status(model)
    assert moe_ops.hf.disable(model) == {}
    assert moe_ops.hf.status(model) == before


@pytest.mark.parametrize("model_type", ["mixtral", "dbrx", "llama4_text"])
def test_a_lone_block_can_be_switched(model_type):
    block = build(model_type).get_submodule(BLOCK_NAMES[model_type])
    assert len(moe_ops.hf.enable(block)) == 1
    with moe_ops.hf.assert_used(block):
        block(torch.randn(1, 3, 32))


def test_a_wrapped_model_can_be_switched():
    wrapper = torch.nn.Sequential(build("mixtral"))
    assert "0.model.layers.1.mlp.experts" in moe_ops.hf.enable(wrapper)


@pytest.mark.parametrize("model_type", UNDECORATED)
def test_custom_name_on_an_undecorated_model_is_detected(model_type):
    model = build(model_type, experts="moe_ops")  # transformers accepts and ignores the name.
    assert set(moe_ops.hf.status(model).values()) == {"transformers"}
    with (
        pytest.raises(RuntimeError, match=r"no block .* is on moe_ops.*call moe_ops.hf.enable"),
        moe_ops.hf.assert_used(model),
    ):
        model(input_ids=tokens())


def test_blocks_that_are_never_called_are_detected():
    model = build("mixtral", experts="moe_ops")
    for layer in model.model.layers:
        layer.mlp.forward = lambda hidden_states: hidden_states
    with (
        pytest.raises(RuntimeError, match="none of the 2 blocks"),
        moe_ops.hf.assert_used(model),
    ):
        model(input_ids=tokens())


def test_expect_calls_lets_other_errors_through():
    model = build("mixtral", experts="moe_ops")
    with pytest.raises(ZeroDivisionError), moe_ops.hf.assert_used(model):
        raise ZeroDivisionError


def test_expect_calls_removes_its_hooks():
    model = build("mixtral", experts="moe_ops")
    with moe_ops.hf.assert_used(model):
        model(input_ids=tokens())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("model_type", UNDECORATED)
def test_copies_stay_switched(model_type):
    model = build(model_type)
    moe_ops.hf.enable(model)
    clone = copy.deepcopy(model)
    assert moe_ops.hf.status(clone) == moe_ops.hf.status(model)
    assert torch.equal(clone(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


@pytest.mark.parametrize("model_type", UNDECORATED)
def test_a_switched_block_can_be_pickled(model_type):
    block = build(model_type).get_submodule(BLOCK_NAMES[model_type])
    moe_ops.hf.enable(block)
    clone = pickle.loads(pickle.dumps(block))
    assert moe_ops.hf.status(clone) == moe_ops.hf.status(block)


def test_a_subclass_with_its_own_forward_is_left_alone():
    block = build("dbrx").get_submodule(BLOCK_NAMES["dbrx"])
    block.experts.__class__ = type("MyExperts", (type(block.experts),), {})
    with pytest.raises(ValueError, match="holds no MoE block"):
        moe_ops.hf.enable(block)


def test_a_forward_set_on_the_module_is_refused_and_nothing_changes():
    model = build("llama4_text")
    block = model.get_submodule(BLOCK_NAMES["llama4_text"])
    block.forward = block.forward
    with pytest.raises(ValueError, match="must have its class's forward, got one set on the modul"):
        moe_ops.hf.enable(model)
    assert set(moe_ops.hf.status(model).values()) == {"transformers"}


def test_hooks_that_would_never_run_are_refused():
    model = build("dbrx")
    model.transformer.blocks[1].ffn.experts.mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"blocks.1.ffn.experts.mlp must have no forward hooks"):
        moe_ops.hf.enable(model)
    assert set(moe_ops.hf.status(model).values()) == {"transformers"}


def test_a_hook_on_the_activation_still_runs():
    model = build("jetmoe")
    seen = []
    model.model.layers[0].mlp.activation.register_forward_hook(lambda *_: seen.append(1))
    expected = model(input_ids=tokens()).logits
    moe_ops.hf.enable(model)
    actual = model(input_ids=tokens()).logits
    assert len(seen) == 2
    assert (actual - expected).norm() <= 40 * torch.finfo(torch.float32).eps * expected.norm()


def test_megamoe_is_refused():
    model = build("mixtral")
    model.config._experts_implementation = "deepgemm_megamoe"
    with pytest.raises(ValueError, match="must not use deepgemm_megamoe"):
        moe_ops.hf.enable(model)


def test_missing_transformers_is_one_sentence(monkeypatch):
    forget_hf(monkeypatch)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"not installed: pip install torch-moe-ops\[hf\]"):
        importlib.import_module("moe_ops.hf")


@pytest.mark.parametrize("version", ["4.57.1", "5.0.0", "5.6.2"])
def test_old_transformers_is_one_sentence(monkeypatch, version):
    forget_hf(monkeypatch)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    message = rf'needs transformers 5.7 or newer and found {version}: pip .* "transformers>=5.7"'
    with pytest.raises(ImportError, match=message):
        importlib.import_module("moe_ops.hf")


@pytest.mark.parametrize(
    ("version", "too_old"),
    [("4.57.1", True), ("5.6.2", True), ("5.7", False), ("5.7.0.dev0", False), ("6.0.0", False)],
)
def test_which_transformers_is_too_old(version, too_old):
    assert transformers_is_too_old(version) == too_old


def forget_hf(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[:2] == ["moe_ops", "hf"]]:
        monkeypatch.delitem(sys.modules, name)
