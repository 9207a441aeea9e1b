"""QLoRA: peft's adapters on attention and on quantized experts."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_ops

from . import test_lora
from .models import build

peft = pytest.importorskip("peft")
lora = importlib.import_module("moe_ops.hf.lora")

STEPS, RATE = 20, 3e-3


TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def config_for(targets=TARGETS):
    options = {"r": 4, "lora_alpha": 8, "bias": "none", "task_type": "CAUSAL_LM"}
    modules = ["q_proj", "v_proj"]
    return peft.LoraConfig(target_modules=modules, target_parameters=targets, **options)


def adapted(model):
    torch.manual_seed(2)
    return peft.get_peft_model(model, config_for())


def train(model, ids, steps=STEPS):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, RATE)
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(model(ids, labels=ids).loss.detach())


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, lora.QuantizedExpertsLora)]


def float_model():
    return build("mixtral", hidden_size=64, intermediate_size=64).train()


@pytest.fixture(scope="module")
def trained():
    """A quantized model, with trained adapters, and the losses beside float experts."""
    ids = torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    base = moe_ops.quantize(float_model(), moe_ops.Int8WeightConfig())
    quantized, with_floats = adapted(copy.deepcopy(base)), adapted(float_model())
    before = float(quantized(ids, labels=ids).loss.detach())
    losses = train(quantized, ids), train(with_floats, ids)
    return ids, base, quantized, before, losses


def test_the_loss_of_float_lora(trained):
    _, base, quantized, before, (ours, floats) = trained
    assert ours < 0.97 * before
    assert abs(ours - floats) <= 0.01 * floats, (before, ours, floats)
    assert len(layers_of(quantized)) == 4
    for layer, other in zip(
        quantized.base_model.model.model.layers, base.model.layers, strict=True
    ):
        wrapper = layer.mlp.experts
        for factors in (wrapper.lora_B.default, wrapper.base_layer.lora_B.default):
            assert factors.weight.any()
        for name, buffer in wrapper.get_base_layer().named_buffers():
            assert torch.equal(buffer, other.mlp.experts.get_buffer(name))


def adapters_of(model):
    return {n: p for n, p in model.named_parameters() if "lora_" in n}


def test_saved_and_read(trained, tmp_path):
    """An adapter that is trained on quantized experts loads on float ones, by peft alone, and
    back."""
    ids, base, quantized, *_ = trained
    quantized.save_pretrained(tmp_path / "one")
    floats = peft.PeftModel.from_pretrained(float_model(), tmp_path / "one")
    assert not layers_of(floats)
    floats.save_pretrained(tmp_path / "two")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "two")
    assert len(layers_of(again)) == 4
    for model in (floats, again):
        got, wanted = adapters_of(model), adapters_of(quantized)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    with torch.no_grad():
        wanted = quantized.eval()(ids).logits
        assert torch.equal(again.eval()(ids).logits, wanted)
        # The same adapter on weights that were not rounded.
        assert (floats.eval()(ids).logits - wanted).norm() <= 0.06 * wanted.norm()
        with again.disable_adapter():
            assert torch.equal(again(ids).logits, base.eval()(ids).logits)
        names = ["default", "__base__", "default", "__base__"]
        mixed = again(ids, adapter_names=names).logits
        torch.testing.assert_close(mixed[::2], wanted[::2], rtol=1e-4, atol=1e-4)
        again.load_adapter(tmp_path / "one", "second")
        again.base_model.set_adapter(["default", "second"])
        assert not torch.allclose(again(ids).logits, wanted)


def test_names_of_before(trained, tmp_path):
    ids, base, quantized, *_ = trained
    quantized.save_pretrained(tmp_path)
    tensors = {}
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        if ".experts." in name:
            part = "gate_up" if ".base_layer." in name else "down"
            name = name.replace(".base_layer", "").removesuffix("weight") + part
            is_a = "lora_A" in name
            tensor = tensor.view(6, 4, -1) if is_a else tensor.view(-1, 4, 6).permute(2, 0, 1)
        tensors[name] = tensor.contiguous()
    assert "base_model.model.model.layers.0.mlp.experts.lora_A.gate_up" in tensors
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = peft.LoraConfig.from_pretrained(tmp_path)
    config.target_modules, config.target_parameters = ["q_proj", "v_proj", "experts"], None
    again = peft.PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path, config=lora.on_quantized_experts(config)
    )
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, quantized.eval()(ids).logits)


def test_interleaved_experts_with_biases(tmp_path):
    model = test_lora.adapted("gpt_oss", 3)
    model.save_pretrained(tmp_path)
    base = moe_ops.quantize(build("gpt_oss"), moe_ops.Int8WeightConfig())
    quantized = peft.PeftModel.from_pretrained(base, tmp_path)
    ids = torch.randint(1, 64, (2, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, got = model(ids).logits, quantized(ids).logits
        assert (got - wanted).norm() <= 0.06 * wanted.norm()
        with quantized.disable_adapter():
            bare = quantized(ids).logits
        assert (bare - wanted).norm() > 0.2 * wanted.norm()


def test_merged(trained):
    ids, _, quantized, *_ = trained
    model = copy.deepcopy(quantized).eval()
    with torch.no_grad():
        wanted = model(ids).logits
        with pytest.warns(UserWarning, match="rounded once more"):
            merged = model.merge_and_unload()
        got = merged(ids).logits
    assert not any("lora" in name for name, _ in merged.named_modules())
    # Roundings of weights, and of tokens to 8 bits, that a random model amplifies.
    assert (got - wanted).norm() <= 0.06 * wanted.norm()


def test_what_is_refused(trained):
    config = config_for()
    config.use_dora = True
    with pytest.raises(ValueError, match="neither DoRA"):
        peft.get_peft_model(copy.deepcopy(trained[1]), config)
    config = peft.LoraConfig(target_modules=".*experts")
    with pytest.raises(ValueError, match="must be a list"):
        lora.on_quantized_experts(config)
