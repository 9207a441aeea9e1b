"""peft's target_parameters on experts, computed by moe_ops, against peft's own way."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch

from .models import build

peft = pytest.importorskip("peft")
lora = importlib.import_module("moe_ops.hf.lora")

TYPES = ("qwen3_moe", "gpt_oss")  # [E, 2I, H] without biases; [E, H, 2I] with, interleaved.


def config_for(rank=3, experts=("gate_up_proj", "down_proj")):
    targets = [f"mlp.experts.{name}" for name in experts]
    options = {"lora_alpha": 2 * rank, "bias": "none", "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(r=rank, target_modules=["q_proj"], target_parameters=targets, **options)


def adapted(model_type, *ranks, experts=("gate_up_proj", "down_proj")):
    model = build(model_type)
    names = ["default", "second"][: len(ranks)]
    for name, rank in zip(names, ranks, strict=True):
        if name == "default":
            model = peft.get_peft_model(model, config_for(rank, experts))
        else:
            model.add_adapter(name, config_for(rank, experts))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 64, (2, 6), generator=torch.Generator().manual_seed(1))


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("model_type", "experts"), [*((t, ("gate_up_proj", "down_proj")) for t in TYPES),
                                ("mixtral", ("down_proj",))],
)  # fmt: skip
def test_values_gradients_and_names(model_type, experts, ids, tmp_path):
    theirs = adapted(model_type, 3, experts=experts)
    ours = copy.deepcopy(theirs)
    found = lora.fuse_adapters(ours)
    assert found
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    wanted, got = gradients(theirs, ids), gradients(ours, ids)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-3, atol=1e-5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    # What one saves the other reads.
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(model_type), tmp_path)
    with torch.no_grad():
        logits = ours(ids).logits
        torch.testing.assert_close(again(ids).logits, logits, rtol=1e-4, atol=1e-5)
        lora.fuse_adapters(again)
        assert torch.equal(again(ids).logits, logits)
        with ours.disable_adapter():
            bare = ours(ids).logits
        assert torch.equal(bare, build(model_type)(ids).logits)
        lora.unfuse_adapters(again)
        torch.testing.assert_close(again(ids).logits, logits, rtol=1e-4, atol=1e-5)
        merged = ours.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_several_adapters(ids):
    model = adapted("qwen3_moe", 3, 2).eval()
    lora.fuse_adapters(model)
    wanted = []
    with torch.no_grad():
        for name in ("default", "second"):
            model.set_adapter(name)
            wanted.append(model(ids).logits)
        with model.disable_adapter():
            wanted.append(model(ids).logits)
        batch = torch.cat([ids[:1], ids[1:], ids[:1]])
        got = model(batch, adapter_names=["second", "default", "__base__"]).logits
        rows = [wanted[1][:1], wanted[0][1:], wanted[2][:1]]
        torch.testing.assert_close(got, torch.cat(rows), rtol=1e-4, atol=1e-5)
        # The stack that is kept follows a change.
        for name, parameter in model.named_parameters():
            if "lora_B.second" in name:
                parameter.zero_()
        got = model(batch, adapter_names=["second", "default", "__base__"]).logits
        torch.testing.assert_close(got[:1], wanted[2][:1], rtol=1e-4, atol=1e-5)
    model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        total = model(ids).logits
        lora.unfuse_adapters(model)
        torch.testing.assert_close(model(ids).logits, total, rtol=1e-4, atol=1e-5)


def test_nothing_to_fuse():
    with pytest.raises(ValueError, match="must have experts with adapters"):
        lora.fuse_adapters(build("mixtral"))
