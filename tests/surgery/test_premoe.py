"""Patterns of tasks, their retrieval, and loading only what a task needs."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from tests.helpers.quantized import weight_config
from tests.surgery.models import TwoLayers, deepseek, tokens

from moe_ops import surgery
from moe_ops.zoo.deepseek import DeepSeek

pytest.importorskip("safetensors")
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers"
)
# Tasks whose tokens lie along different axes, so that a router of unit rows tells them apart.
TASKS = {
    name: [torch.eye(6)[axis] * 3 + 0.1 * torch.randn(20, 6, generator=torch.Generator())]
    for name, axis in (("up", 0), ("down", 2))
}


def planted() -> TwoLayers:
    model = TwoLayers()
    with torch.no_grad():
        for layer in model.layers:
            layer.router.weight.copy_(
                torch.eye(6)[[0, 0, 2, 2]] * torch.tensor([[2], [1], [2], [1]])
            )
            layer.experts.w_down.mul_(0.1)
    return model


def test_patterns_by_hand():
    model = planted()
    found = surgery.TaskRoutingPatterns.collect(model, TASKS)
    assert found.tasks == ["up", "down"] and found.layers == ["layers.0", "layers.1"]
    (x,) = TASKS["up"]
    logits = x @ model.layers[0].router.weight.t()
    torch.testing.assert_close(found.vectors[0, 0].float(), logits.mean(0).detach())
    # TCESS as released: the logit of the best expert, which is 0 for up and 2 for down.
    expected = torch.zeros(4)
    expected[0] = logits[:, 0].mean()
    torch.testing.assert_close(found.scores[0, 0].float(), expected.detach())
    assert found.keep(model, "up", 2) == {"layers.0": [0, 1], "layers.1": [0, 1]}
    assert found.keep(model, "down", 2)["layers.1"] == [0, 2]  # Ties go to the smaller id.
    by_use = surgery.TaskRoutingPatterns.collect(model, TASKS, by="gate_norm")
    assert by_use.keep(model, "down", 2)["layers.0"] == [2, 3]


@pytest.mark.parametrize("layer", [0, -1, None])
def test_prompts_find_their_task(layer):
    model = planted()
    found = surgery.TaskRoutingPatterns.collect(model, TASKS)
    for name, (x,) in TASKS.items():
        got = found.retrieve(model, x[:5], layer=layer)
        assert got.task == name and got.distances.argmin() == found.tasks.index(name)


def test_the_first_layer_needs_no_expert():
    model = planted()
    found = surgery.TaskRoutingPatterns.collect(model, TASKS)
    for layer in model.layers:
        layer.experts.to_empty(device="meta")
    assert found.retrieve(model, TASKS["down"][0]).task == "down"
    assert not any(m._forward_hooks for m in model.modules())


def test_saved_and_read(tmp_path):
    found = surgery.TaskRoutingPatterns.collect(planted(), TASKS)
    found.save(tmp_path / "patterns.safetensors")
    again = surgery.TaskRoutingPatterns.load(tmp_path / "patterns.safetensors")
    assert (again.tasks, again.layers) == (found.tasks, found.layers)
    assert torch.equal(again.vectors, found.vectors) and torch.equal(again.scores, found.scores)
    surgery.profile_experts(planted(), TASKS["up"]).save(tmp_path / "profile.safetensors")
    with pytest.raises(ValueError, match="must be a file of TaskRoutingPatterns"):
        surgery.TaskRoutingPatterns.load(tmp_path / "profile.safetensors")


def test_errors_are_sentences():
    model = planted()
    with pytest.raises(ValueError, match="tasks must be at least one"):
        surgery.TaskRoutingPatterns.collect(model, {})
    with pytest.raises(ValueError, match="by must be one of"):
        surgery.TaskRoutingPatterns.collect(model, TASKS, by="size")
    found = surgery.TaskRoutingPatterns.collect(model, TASKS)
    with pytest.raises(ValueError, match="task must be one of up, down"):
        found.keep(model, "left", 2)


# --------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("shard", [10**9, 4000])
@torch.no_grad()
def test_partly_loaded_zoo_model_is_the_pruned_one(tmp_path, shard):
    model, ids = deepseek(num_experts=8, top_k=2), tokens()
    model.save_pretrained(tmp_path, max_shard_bytes=shard)
    keep = {"layers.1.mlp": [1, 2, 6, 7]}
    got, read, total = surgery.load_pruned(tmp_path, keep, model_class=DeepSeek)
    expected = surgery.prune_experts(model, keep)
    assert got.config == expected.config
    assert torch.equal(got(ids), expected(ids))
    # Read is what the pruned model has, byte by byte.
    held = sum(t.nbytes for t in expected.state_dict().values())
    assert read == held and read < total


@needs_transformers
@pytest.mark.parametrize(
    "model_type", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe"]
)
@torch.no_grad()
def test_partly_loaded_model_of_transformers_is_the_pruned_one(model_type, tmp_path):
    from tests.hf import models

    models.skip_unknown_router(model_type)
    model, ids = models.build(model_type), models.tokens()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    keep = {layer.name: [1, 2, 4, 5] for layer in surgery.find_routed_layers(model)}
    got, read, total = surgery.load_pruned(tmp_path, keep)
    expected = surgery.prune_experts(model, keep)
    torch.testing.assert_close(got(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)
    held = sum(t.nbytes for t in expected.state_dict().values())
    assert read == held and read < total


@needs_transformers
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("format", ["int8", "int4"])
@torch.no_grad()
def test_partly_loaded_quantized_model_is_that_of_the_pruned_one(format, model_type, tmp_path):
    """Codes and scales of the experts kept are read, those of the others are not."""
    from tests.hf import models

    import moe_ops

    # As many experts as inputs: a scale of inputs is none of experts.
    sizes = {"num_local_experts": 32, "intermediate_size": 32}
    model, ids = models.build(model_type, **sizes), models.tokens()
    keep = {layer.name: [1, 2, 4, 31] for layer in surgery.find_routed_layers(model)}
    group = 32 if format == "int4" else None
    calibration = [ids] if model_type == "mixtral" else None
    moe_ops.quantize(model, weight_config(format, group), calibration=calibration)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    got, read, total = surgery.load_pruned(tmp_path, keep)
    with surgery.override_routing(model, surgery.rules.only(keep)):
        expected = model(ids).logits
    # Of int4, tokens are sums of two integers, which the last bit of a hidden state may change.
    atol = 1e-4 if format == "int4" else 1e-5
    torch.testing.assert_close(got(ids).logits, expected, rtol=1e-4, atol=atol)
    names = [name for name, module in got.named_modules() if name.endswith(".experts")]
    for name in names:
        bank = got.get_submodule(name)
        assert bank.num_experts == 4 and bank.format_name == model.get_submodule(name).format_name
        whole = model.get_submodule(name).w_down
        assert torch.equal(bank.w_down, whole[[1, 2, 4, 31]])
    held = sum(t.nbytes for t in got.state_dict().values())
    assert len(names) == 2 and read == held and read < total


def test_what_cannot_be_loaded(tmp_path):
    model = deepseek(num_experts=8, top_k=2, num_layers=3)
    model.save_pretrained(tmp_path)
    for keep, message in (
        ({"layers.1.mlp": [0, 1]}, "must name the 2 routed layers"),
        ({"layers.1.mlp": [0, 1], "layers.2.mlp": [0, 1, 2]}, "the same number of experts"),
        ({"layers.1.mlp": [0, 9], "layers.2.mlp": [0, 1]}, r"must be in \[0, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            surgery.load_pruned(tmp_path, keep, model_class=DeepSeek)


@needs_transformers
def test_other_quantized_checkpoints_are_refused(tmp_path):
    config = {"model_type": "mixtral", "quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"float checkpoint, or one whose experts .* got .*gptq"):
        surgery.load_pruned(tmp_path, {})
