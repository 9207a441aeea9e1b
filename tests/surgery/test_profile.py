"""The sums of a profile against loops over tokens and experts."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from tests.surgery.models import TwoLayers, deepseek, tokens

import moe_ops
from moe_ops import Int8WeightConfig, surgery, zoo
from moe_ops.layers import MoE

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers"
)
X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(3))  # 3 sequences of 4 tokens


def expert(layer: MoE, e: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = (layer.experts.w_gate_up[e] @ x).chunk(2)
    return layer.experts.w_down[e] @ (torch.nn.functional.silu(gate) * up)


def by_loops(layer: MoE, sequences: torch.Tensor, positions: int) -> surgery.LayerProfile:
    """A layer with two experts per token, softmax over all and no renormalization."""
    count, hidden = layer.router.num_experts, layer.router.hidden_size
    sums = surgery.LayerProfile.empty(count, 2, hidden, positions)
    for sequence in sequences:
        for place, x in enumerate(sequence):
            logits = layer.router.weight @ x
            sums.tokens += 1
            sums.logit_sum += logits
            sums.logit_products += logits[:, None] * logits
            sums.probability += logits.softmax(0)
            best = logits.topk(2).indices.tolist()
            for k, e in enumerate(best):
                y = expert(layer, e, x)
                sums.load[e] += 1
                sums.logit[k, e] += logits[e]
                sums.weight[e] += logits.softmax(0)[e]
                sums.share[e] += logits[best].softmax(0)[k]
                sums.gate_norm[e] += logits.softmax(0)[e] * y.norm()
                sums.output_norm[e] += y.norm()
                sums.output[e] += y
                sums.output_count[e] += 1
                if y.abs().max() > sums.max_output[:, e].max():
                    sums.max_channel[e] = y.abs().argmax()
                bin = min(place, positions)
                sums.max_output[bin, e] = max(sums.max_output[bin, e], y.abs().max())
                for other in best:
                    sums.together[e, other] += 1
    return sums


def assert_same(got: surgery.LayerProfile, expected: surgery.LayerProfile) -> None:
    assert vars(got).keys() == vars(expected).keys()
    for name, value in vars(expected).items():
        torch.testing.assert_close(
            getattr(got, name), value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
def test_sums_are_those_of_loops_whatever_the_batches():
    model = TwoLayers()
    first = by_loops(model.layers[0], X, 2)
    middle = X + model.layers[0](X)
    second = by_loops(model.layers[1], middle, 2)
    found = surgery.profile_experts(model.train(), [X], positions=2)
    assert model.training and list(found) == ["layers.0", "layers.1"]
    assert_same(found["layers.0"], first)
    assert_same(found["layers.1"], second)
    in_parts = surgery.profile_experts(model, [X[:1], X[1:]], positions=2)
    added = surgery.profile_experts(model, [X[:1]], positions=2)
    assert_same(in_parts["layers.1"], second)
    assert_same(added.add(surgery.profile_experts(model, [X[1:]], positions=2))["layers.1"], second)


@torch.no_grad()
def test_correlation_is_that_of_the_logits():
    model = TwoLayers()
    logits = X.flatten(0, 1) @ model.layers[0].router.weight.t()
    found = surgery.profile_experts(model, [X])["layers.0"]
    torch.testing.assert_close(
        found.correlation(), torch.corrcoef(logits.double().t()), rtol=1e-5, atol=1e-5
    )
    with torch.no_grad():
        model.layers[0].router.weight[2] = 0.0
    constant = surgery.profile_experts(model, [X])["layers.0"].correlation()
    assert bool((constant[2] == 0).all()) and bool(torch.isfinite(constant).all())


@torch.no_grad()
def test_all_outputs_are_means_over_all_tokens():
    model = TwoLayers()
    found = surgery.profile_experts(model, [X], all_outputs=True)["layers.0"]
    flat = X.flatten(0, 1)
    expected = torch.stack([sum(expert(model.layers[0], e, x) for x in flat) for e in range(4)])
    torch.testing.assert_close(found.output.float(), expected, rtol=1e-4, atol=1e-5)
    assert found.output_count.tolist() == [12] * 4


def test_empty_slots_and_masks_do_not_count():
    model = TwoLayers(num_experts=5, top_k=2, kind="topp", top_p=0.3)
    found = surgery.profile_experts(model, [X])["layers.0"]
    assert 12 <= int(found.load.sum()) < 24
    assert torch.equal(found.together.diagonal(), found.load)
    none = surgery.profile_experts(model, [X], outputs=False)["layers.0"]
    assert torch.equal(none.load, found.load) and not none.gate_norm.any()


def test_saved_and_read(tmp_path):
    pytest.importorskip("safetensors")
    model = TwoLayers()
    found = surgery.profile_experts(model, [X])
    found.save(tmp_path / "found.safetensors")
    again = surgery.ExpertProfile.load(tmp_path / "found.safetensors")
    assert list(again) == list(found)
    for name in found:
        for key, value in vars(found[name]).items():
            assert torch.equal(getattr(again[name], key), value)
    (tmp_path / "other").write_bytes(b"no file of tensors")
    with pytest.raises(ValueError, match="must be a file of ExpertProfile"):
        surgery.ExpertProfile.load(tmp_path / "other")


@pytest.mark.parametrize("name", ["jetmoe", "coe", "topp", "moduleformer"])
def test_language_models_of_the_zoo(name):
    torch.manual_seed(0)
    model = zoo.create_model(name).eval()
    found = surgery.profile_experts(model, [tokens(2, 5, 256)])
    calls = {"coe": model.config.num_iterations} if name == "coe" else {}
    assert len(found) == model.config.num_layers
    for layer in found.layers.values():
        assert int(layer.tokens) == 10 * calls.get(name, 1)
        assert float(layer.gate_norm.sum()) > 0


@needs_transformers
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3", "phimoe", "dbrx"])
def test_models_of_transformers(model_type):
    """Outputs times weights add up to what the experts gave; padding does not count."""
    from tests.hf import models

    model = models.build(model_type)
    ids = models.tokens(1, 6)
    name = models.BLOCK_NAMES[model_type]
    seen = {}
    experts = model.get_submodule(name).experts
    handle = experts.register_forward_hook(lambda m, args, y: seen.update(y=y, args=args))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = surgery.profile_experts(model, [batch])[name]
    handle.remove()
    _, index, weights = seen["args"]
    assert int(found.tokens) == 6
    assert torch.equal(found.load, index.flatten().bincount(minlength=found.num_experts))
    total = torch.zeros(found.num_experts, dtype=torch.float64)
    total.scatter_add_(0, index.flatten(), weights.flatten().double())
    torch.testing.assert_close(found.weight, total)
    # With each weight 1, the sum of a token's outputs is that of the experts.
    with torch.no_grad():
        y = experts(seen["args"][0], index, torch.ones_like(weights))
    y = y.reshape(-1, y.shape[-1]).sum(0)
    torch.testing.assert_close(found.output.sum(0).float(), y, rtol=1e-4, atol=1e-4)
    batch["attention_mask"][0, 4:] = 0
    assert int(surgery.profile_experts(model, [batch])[name].tokens) == 4


@needs_transformers
@pytest.mark.parametrize("switched", [False, True])
@pytest.mark.parametrize("model_type", ["jetmoe", "llama4_text"])
@torch.no_grad()
def test_models_outside_of_the_experts_interface(model_type, switched):
    """The gated outputs add up to what the block adds to its shared expert and bias."""
    from tests.hf import models

    import moe_ops.hf

    model, ids = models.build(model_type), models.tokens(1, 6)
    if switched:
        moe_ops.hf.enable(model)
    name = models.BLOCK_NAMES[model_type]
    block, seen = model.get_submodule(name), {}
    handle = block.register_forward_hook(lambda m, args, y: seen.update(x=args[0], y=y))
    found = surgery.profile_experts(model, [ids])
    handle.remove()
    layer = found[name]
    assert int(layer.tokens) == 6 and int(layer.load.sum()) == 12
    with surgery.ablate_experts(model, [(name, e) for e in range(layer.num_experts)]):
        rest = block(seen["x"])
    if model_type == "llama4_text":  # Weights are on the input, so outputs are what is added.
        added = (seen["y"][0] - rest[0]).reshape(6, -1)
        torch.testing.assert_close(layer.output.sum(0).float(), added.sum(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.gate_norm, layer.output_norm)
    else:
        assert 0 < float(layer.gate_norm.sum()) < float(layer.output_norm.sum())


def test_errors_are_sentences():
    model = deepseek()
    with pytest.raises(ValueError, match="inputs must reach every layer"):
        surgery.profile_experts(model, [])
    with pytest.raises(ValueError, match="must hold a routed layer"):
        surgery.profile_experts(torch.nn.Linear(2, 2), [])
    quantized = moe_ops.quantize(TwoLayers(4), Int8WeightConfig())
    with pytest.raises(ValueError, match="profile the float model that it was made from"):
        surgery.profile_experts(quantized, [X])
    with pytest.raises(ValueError, match="positions must be at least 1"):
        surgery.profile_experts(model, [], positions=0)
    one, other = (surgery.profile_experts(TwoLayers(e), [X]) for e in (4, 5))
    with pytest.raises(ValueError, match="must be of the same layers"):
        one.add(other)
