"""Placed models that move back to one device, against the models before."""

from __future__ import annotations

import importlib

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_ops
import moe_ops.hf

from .models import MODEL_TYPES, build, tokens
from .placed_models import SIZES, experts_of, generate, pair


def everywhere(model):
    """Returns the devices of a model's tensors."""
    return {t.device.type for t in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "deepseek_v4", "longcat_flash"])
def test_unplace(model_type, dense, tmp_path):
    """Values are those before, the classes too, and moves are torch's own."""
    model = build(model_type).cpu()
    moe_ops.hf.enable(model)
    classes = [type(m) for m in model.modules()]
    ids = tokens().cpu()
    with torch.no_grad(), torch.device("cpu"):
        want = model(ids).logits
    where = moe_ops.hf.place(model, dense)
    with torch.no_grad():
        placed_logits = model(ids.to(dense)).logits.cpu()
    found = moe_ops.hf.unplace(model)
    assert found == {name: "cpu" for name in where if name in found}
    assert len(found) == len(where) - (2 if model_type == "jetmoe" else 0)  # Attention's experts.
    assert [type(m) for m in model.modules()] == classes
    assert not any("_moe_ops_fused" in m.__dict__ for m in model.modules())
    assert not any(key.startswith("_moe_ops_s") for m in model.modules() for key in m.__dict__)
    with torch.no_grad(), torch.device("cpu"):
        got = model(ids).logits
    assert torch.equal(got, want)
    torch.testing.assert_close(placed_logits, want, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    with torch.device("cpu"):
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path, experts_implementation="moe_ops", attn_implementation="eager"
        )
    for name, t in again.state_dict().items():
        assert torch.equal(t, model.state_dict()[name])
    moe_ops.hf.disable(model)
    assert everywhere(model.to("meta")) == {"meta"}


@pytest.mark.parametrize("config", [None, moe_ops.Int8WeightConfig()], ids=["float", "int8"])
def test_unplace_to_the_device_of_the_rest(config, dense):
    """With streamed experts and adapters; it trains there, and may be placed again."""
    peft = pytest.importorskip("peft")
    lora = importlib.import_module("moe_ops.hf.lora")
    model = build("mixtral", **SIZES).cpu()
    moe_ops.hf.place(model, dense, quantization=config, stream_min_tokens=1)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=targets)
    )
    lora.fuse_adapters(tuned)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.1)
    ids = tokens().to(dense)
    want = tuned(ids).logits.detach()
    assert set(moe_ops.hf.unplace(tuned, dense).values()) == {dense}
    assert everywhere(tuned) == {dense}
    assert not experts_of(tuned)
    # Kernels of a GPU round the tokens of quantized experts to 16 bits, not to 8.
    close = {"rtol": 1e-4, "atol": 1e-5} if config is None else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(tuned(ids).logits.detach(), want, **close)
    tuned(ids, labels=ids).loss.backward()
    trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.device == p.device for p in trained.values())
    moe_ops.hf.place(tuned.cpu(), dense)
    assert len(experts_of(tuned)) == 2
    torch.testing.assert_close(tuned(ids).logits.detach(), want, rtol=1e-4, atol=1e-5)


def test_unplaced_quantized_files_load(dense, tmp_path):
    build("qwen3_moe").cpu().save_pretrained(tmp_path / "float")
    config = moe_ops.Int8WeightConfig()
    with torch.device("cpu"):
        model = moe_ops.hf.load_placed(
            AutoModelForCausalLM, tmp_path / "float", dense, quantization=config
        )
    ids = tokens()
    with torch.no_grad():
        want = model(ids.to(dense)).logits.cpu()
    moe_ops.hf.unplace(model)
    model.save_pretrained(tmp_path / "int8")
    with torch.device("cpu"), torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
        assert torch.equal(again(ids.cpu()).logits, model(ids.cpu()).logits)
    torch.testing.assert_close(model(ids.cpu()).logits.detach(), want, rtol=1e-4, atol=1e-5)


def test_models_that_unplace_refuses(dense):
    with pytest.raises(ValueError, match="unplace: model must have experts that place put on the"):
        moe_ops.hf.unplace(build("qwen3_moe"))
    with pytest.raises(ValueError, match="put on the CPU, got 'tiny'"):
        moe_ops.hf.unplace("tiny")
    _, model = pair("deepseek_v3", dense)
    want = generate(model, dense)
    for device, match in (
        ("xpu", "device must be cuda or cpu, got 'xpu'"),
        ("cuda:7", "torch sees"),
    ):
        with pytest.raises(ValueError, match=f"unplace: .*{match}"):
            moe_ops.hf.unplace(model, device)
    moe_ops.hf.optimize(model)
    with pytest.raises(ValueError, match="must not be optimized; call restore first"):
        moe_ops.hf.unplace(model)
    moe_ops.hf.restore(model)
    (bank,) = experts_of(model)
    parametrize = torch.nn.utils.parametrize
    parametrize.register_parametrization(bank, "down_proj", torch.nn.Identity())
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts must have the class that place"):
        moe_ops.hf.unplace(model)
    parametrize.remove_parametrizations(bank, "down_proj")
    assert torch.equal(generate(model, dense), want)
    assert moe_ops.hf.unplace(model, dense) == {"model.layers.1.mlp.experts": dense}
    assert torch.equal(generate(model, dense), want)
