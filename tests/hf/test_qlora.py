"""QLoRA: peft's adapters on attention and on quantised experts."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch

import moe_ops

from .models import build

peft = pytest.importorskip("peft")
lora = importlib.import_module("moe_ops.hf.lora")

STEPS, RATE = 20, 3e-3


def config_for(experts):
    options = {"r": 4, "lora_alpha": 8, "bias": "none", "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(target_modules=["q_proj", "v_proj", *experts], **options)


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


@torch.no_grad()
def same_start(quantised, with_floats):
    """Gives both the same factors: peft draws those of experts in another order than moe_ops."""
    floats = {n: p for n, p in with_floats.named_parameters() if "lora_" in n}
    for name, parameter in quantised.named_parameters():
        if "experts" not in name and name in floats:
            parameter.copy_(floats[name])
    wrappers = [m for m in with_floats.modules() if isinstance(m, lora.ParamWrapper)]
    layers = layers_of(quantised)
    banks = list(dict.fromkeys(m.get_base_layer() for m in wrappers))
    for wrapper in wrappers:
        layer = layers[banks.index(wrapper.get_base_layer())]
        factor = getattr(layer.lora_A.default, wrapper.parameter_name.removesuffix("_proj"))
        factor.copy_(wrapper.lora_A.default.weight.view_as(factor))


@pytest.fixture(scope="module")
def trained():
    """A model, its quantised form with trained adapters, and the losses of both ways."""
    model = build("mixtral", hidden_size=64, intermediate_size=64).train()
    ids = torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    frozen = copy.deepcopy(model)
    moe_ops.quantize_experts(frozen, "int8")
    base = copy.deepcopy(frozen)
    config = lora.on_quantized_experts(config_for(["experts"]))
    quantised = peft.get_peft_model(frozen, config)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    float_config = config_for([])
    float_config.target_parameters = targets
    with_floats = peft.get_peft_model(model, float_config)
    same_start(quantised, with_floats)
    before = float(quantised(ids, labels=ids).loss.detach())
    losses = train(quantised, ids), train(with_floats, ids)
    return ids, base, quantised, before, losses


def test_the_loss_of_float_lora(trained):
    _, base, quantised, before, (ours, floats) = trained
    assert ours < 0.97 * before
    assert abs(ours - floats) <= 0.01 * floats, (before, ours, floats)
    experts = layers_of(quantised)
    assert len(experts) == 2
    for layer, other in zip(experts, base.model.layers, strict=True):
        assert all(b.any() for b in (layer.lora_B.default.gate_up, layer.lora_B.default.down))
        for name, buffer in layer.base_layer.named_buffers():
            assert torch.equal(buffer, other.mlp.experts.get_buffer(name))


def test_saved_and_read(trained, tmp_path):
    ids, base, quantised, *_ = trained
    quantised.save_pretrained(tmp_path)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path, config=lora.on_quantized_experts(config)
    )
    with torch.no_grad():
        wanted = quantised.eval()(ids).logits
        assert torch.equal(again.eval()(ids).logits, wanted)
        with again.disable_adapter():
            assert torch.equal(again(ids).logits, base.eval()(ids).logits)


def test_merged(trained):
    ids, _, quantised, *_ = trained
    model = copy.deepcopy(quantised).eval()
    with torch.no_grad():
        wanted = model(ids).logits
        with pytest.warns(UserWarning, match="rounded once more"):
            merged = model.merge_and_unload()
        got = merged(ids).logits
    assert not any("lora" in name for name, _ in merged.named_modules())
    # Roundings of weights, and of tokens to 8 bits, that a random model amplifies.
    assert (got - wanted).norm() <= 0.06 * wanted.norm()


def test_what_is_refused(trained):
    config = config_for(["experts"])
    config.use_dora = True
    with pytest.raises(ValueError, match="neither DoRA"):
        peft.get_peft_model(copy.deepcopy(trained[1]), lora.on_quantized_experts(config))
