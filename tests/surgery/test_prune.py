"""Criteria and budgets on numbers by hand; pruned and merged layers against masks and means."""

from __future__ import annotations

import copy
import importlib.util
import sys

import pytest
import torch
from tests.helpers.fresh_python import run_python
from tests.surgery.models import TwoLayers, deepseek, tokens

from moe_ops import surgery, zoo
from moe_ops.layers import Experts

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers"
)
needs_scipy = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="needs scipy")
X = torch.randn(9, 6, generator=torch.Generator().manual_seed(3))


def layer_profile(**sums) -> surgery.LayerProfile:
    found = surgery.LayerProfile.empty(4, 2, 3, 1)
    for name, value in sums.items():
        setattr(found, name, torch.tensor(value))
    return found


# ------------------------------------------------------------------------------------- criteria


def test_criteria_by_hand():
    found = surgery.ExpertProfile(
        {
            "a": layer_profile(
                tokens=8,
                load=[4, 0, 2, 10],
                logit=[[8.0, 0.0, -4.0, 2.0], [1.0, 0.0, 1.0, 1.0]],
                share=[2.0, 0.0, 1.0, 5.0],
                gate_norm=[6.0, 0.0, 5.0, 10.0],
                max_output=[[1.0, 0.0, 9.0, 2.0], [3.0, 0.0, 1.0, 2.0]],
            )
        }
    )
    expected = {
        "frequency": [4.0, 0.0, 2.0, 10.0],
        "tcess": [1.0, 0.0, -0.5, 0.25],
        "tcess_softmax": [0.25, 0.0, 0.125, 0.625],
        "gate_norm": [6.0, 0.0, 5.0, 10.0],
        "reap": [1.5, 0.0, 2.5, 1.0],
        "max_output": [3.0, 0.0, 9.0, 2.0],
    }
    assert surgery.criteria.CRITERIA.keys() == expected.keys()
    for by, values in expected.items():
        assert surgery.score_experts(found, by)["a"].tolist() == values
    assert surgery.score_experts(found, lambda layer: -layer.load)["a"].tolist() == [-4, 0, -2, -10]
    with pytest.raises(ValueError, match="by must be one of frequency"):
        surgery.score_experts(found, "size")


def test_budgets_by_hand():
    model = TwoLayers(num_experts=4, top_k=1)
    scores = {"layers.0": torch.tensor([3.0, 1.0, 3.0, 1.0]), "layers.1": torch.ones(4) * 100}
    scores["layers.1"][3] = 700.0
    choose = surgery.select_experts
    assert choose(model, scores, 2) == {"layers.0": [0, 2], "layers.1": [0, 3]}
    assert choose(model, scores, 0.75) == {"layers.0": [0, 1, 2], "layers.1": [0, 1, 3]}
    # Over the means 2 and 250: 1.5, .5, 1.5, .5 and .4, .4, .4, 2.8; one of each layer is certain.
    assert choose(model, scores, 2, budget="global") == {"layers.0": [0, 1, 2], "layers.1": [3]}
    for keep in (0, 5, 0.0, 1.5):
        with pytest.raises(ValueError, match="keep must be"):
            choose(model, scores, keep)
    with pytest.raises(ValueError, match="budget must be"):
        choose(model, scores, 2, budget="all")


def test_groups_are_kept_or_dropped():
    model = deepseek(num_experts=8, top_k=2)  # 4 groups, a token uses 2, scored by their best two.
    name = "layers.1.mlp"
    scores = {name: torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2])}
    with pytest.raises(ValueError, match="must leave each of the 4 groups enough"):
        surgery.select_experts(model, scores, 4, groups="keep")
    kept = surgery.select_experts(model, scores, 8, groups="keep")
    assert kept == {name: list(range(8))}
    with pytest.raises(ValueError, match="multiple of the 4 groups"):
        surgery.select_experts(model, scores, 6, groups="keep")
    for ids, groups in (([0, 1, 4, 5], (2, 2)), ([0, 2, 4, 6], (1, 1)), ([0, 1, 2], (1, 1))):
        pruned = surgery.prune_experts(copy.deepcopy(model), {name: ids})
        router = pruned.get_submodule(f"{name}.router")
        assert (router.num_groups, router.num_topk_groups) == groups
        assert pruned.config.num_groups == groups[0]


# -------------------------------------------------------------------------------------- pruning


@torch.no_grad()
def test_pruned_model_routes_as_with_only_these_experts():
    model, ids = deepseek(num_experts=8, top_k=2), tokens()
    keep = {"layers.1.mlp": [1, 2, 5, 6, 7]}
    with surgery.override_routing(model, surgery.rules.only(keep)):
        expected = model(ids)
    pruned = surgery.prune_experts(copy.deepcopy(model), keep)
    torch.testing.assert_close(pruned(ids), expected)
    assert pruned.config.num_experts == 5 and model.config.num_experts == 8
    assert model(ids).shape == expected.shape


@torch.no_grad()
def test_all_experts_kept_is_the_identity():
    model, ids = deepseek(num_experts=8, top_k=2), tokens()
    plain, config = model(ids), model.config
    surgery.prune_experts(model, {"layers.1.mlp": list(range(8))})
    assert torch.equal(model(ids), plain) and model.config == config


@torch.no_grad()
def test_fewer_experts_than_k_and_uneven_layers():
    model = TwoLayers()
    surgery.prune_experts(model, {"layers.0": [3]})
    assert model.layers[0].router.top_k == 1 and model(X).shape == X.shape
    with pytest.raises(ValueError, match="must not repeat"):
        surgery.prune_experts(model, {"layers.1": [1, 1]})
    with pytest.raises(ValueError, match="must be named in full"):
        surgery.prune_experts(model, {"layers.*": [1]})
    with pytest.raises(ValueError, match=r"must be in \[0, 4\)"):
        surgery.prune_experts(model, {"layers.1": [4]})


@pytest.mark.parametrize("name", ["deepseek", "coe", "topp"])
@torch.no_grad()
def test_pruned_zoo_models_are_saved_and_read(name, tmp_path):
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    model = zoo.create_model(name).eval()
    ids = tokens(1, 5, 256)
    names = [layer.name for layer in surgery.find_routed_layers(model)]
    surgery.prune_experts(model, {n: [0, 3, 4, 5, 6, 7] for n in names})
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.num_experts == 6
    torch.testing.assert_close(again(ids), model(ids))
    if len(names) > 1:
        surgery.prune_experts(model, {names[0]: [0, 1, 2, 3, 4]})
        assert model(ids).shape[:2] == (1, 5)
        with pytest.raises(ValueError, match="must have the same number of experts"):
            model.save_pretrained(tmp_path)


@torch.no_grad()
def test_moduleformer_is_saved_with_uneven_layers(tmp_path):
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    model, ids = zoo.create_model("moduleformer").eval(), tokens(1, 5, 256)
    surgery.prune_experts(model, {"layers.1.mlp": [0, 2, 3]})
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids), model(ids))


@torch.no_grad()
def test_zeroed_experts_come_back():
    model, name = TwoLayers(), "layers.0"
    plain = model(X)
    keep = model.layers[0].experts.w_down.clone()
    with surgery.ablate_experts(model, [(name, 0), (name, 0), ("layers.1", 2)]):
        assert not model.layers[0].experts.w_down[0].any()
        assert not torch.equal(model(X), plain)
    assert torch.equal(model.layers[0].experts.w_down, keep) and torch.equal(model(X), plain)
    with pytest.raises(ValueError, match="must have a float expert 9"):
        with surgery.ablate_experts(model, [(name, 0), (name, 9)]):
            pass
    assert torch.equal(model(X), plain)


# -------------------------------------------------------------------------------------- merging


@pytest.fixture
def doubled() -> tuple[TwoLayers, TwoLayers]:
    """A model, and one in which each expert is there twice, the second time with its neurons in
    another order."""
    model = TwoLayers(num_experts=3, top_k=1, renormalize=True)
    double = TwoLayers(num_experts=6, top_k=2, renormalize=True)
    with torch.no_grad():
        for one, two in zip(model.layers, double.layers, strict=True):
            order = torch.randperm(5, generator=torch.Generator().manual_seed(1))
            gate, up = one.experts.w_gate_up.split(5, dim=1)
            rows = torch.cat([gate[:, order], up[:, order]], 1)
            two.experts.w_gate_up.copy_(torch.cat([one.experts.w_gate_up, rows]))
            down = one.experts.w_down
            two.experts.w_down.copy_(torch.cat([down, down[:, :, order]]))
            two.router.weight.copy_(torch.cat([one.router.weight] * 2))
    return model, double


@needs_scipy
@torch.no_grad()
def test_permuted_copies_merge_without_loss_when_aligned(doubled):
    model, double = doubled
    torch.testing.assert_close(double(X), model(X))
    groups = {f"layers.{i}": [[0, 3], [4, 1], [2, 5]] for i in range(2)}
    unaligned = surgery.merge_experts(copy.deepcopy(double), groups)
    order = surgery.align_neurons(double, groups)
    merged = surgery.merge_experts(copy.deepcopy(double), groups, neuron_order=order)
    assert not torch.allclose(unaligned(X), model(X), atol=1e-3)
    assert merged.layers[0].router.top_k == 2
    for layer in merged.layers:  # Two equal experts were two of the token's; now they are one.
        layer.router.top_k = 1
    torch.testing.assert_close(merged(X), model(X))


@torch.no_grad()
def test_groups_of_one_are_the_identity_and_weights_are_used():
    model = TwoLayers()
    plain = model(X)
    same = surgery.merge_experts(copy.deepcopy(model), {"layers.0": [[0], [1], [2], [3]]})
    assert torch.equal(same(X), plain)
    weights = {"layers.0": torch.tensor([3, 1, 0, 0])}
    two = surgery.merge_experts(model, {"layers.0": [[0, 1], [2, 3]]}, weights=weights)
    old = TwoLayers().layers[0]
    w, r = old.experts.w_down, old.router.weight
    expected = torch.stack([0.75 * w[0] + 0.25 * w[1], 0.5 * (w[2] + w[3])])
    torch.testing.assert_close(two.layers[0].experts.w_down.data, expected.data)
    expected = torch.stack([0.75 * r[0] + 0.25 * r[1], 0.5 * (r[2] + r[3])])
    torch.testing.assert_close(two.layers[0].router.weight.data, expected.data)
    first = surgery.merge_experts(TwoLayers(), {"layers.0": [[1, 0], [2, 3]]}, router_rows="first")
    assert torch.equal(first.layers[0].router.weight.data, r[[1, 2]].data)


@pytest.mark.parametrize("interleaved", [False, True])
@needs_scipy
@torch.no_grad()
def test_alignment_knows_layouts_and_biases(interleaved):
    torch.manual_seed(0)
    bank = Experts(2, 4, 6, activation="swiglu_oai", bias=True, interleaved=interleaved)
    for bias in (bank.b_gate_up, bank.b_down):
        bias.normal_()
    order = torch.randperm(6)
    # Expert 1 becomes a copy of expert 0 with its neurons in this order.
    rows = torch.stack([order * 2, order * 2 + 1], 1).flatten()
    rows = rows if interleaved else torch.cat([order, order + 6])
    bank.w_gate_up[1], bank.b_gate_up[1] = bank.w_gate_up[0, rows], bank.b_gate_up[0, rows]
    bank.w_down[1], bank.b_down[1] = bank.w_down[0][:, order], bank.b_down[0]
    model = TwoLayers(2, 1)
    model.layers[0].experts = bank
    found = surgery.align_neurons(model, {"layers.0": [[0, 1]]})["layers.0"]
    assert found[0].tolist() == list(range(6)) and torch.equal(order[found[1]], torch.arange(6))


def test_uncurl_finds_planted_groups():
    model = TwoLayers(num_experts=6, top_k=2)
    kinds = torch.tensor([0, 1, 2, 0, 1, 2])
    with torch.no_grad():
        for layer in model.layers:
            rows = torch.eye(6)[kinds * 2] + 0.05 * torch.randn(6, 6)
            layer.router.weight.copy_(rows)
    found = surgery.profile_experts(model, [torch.randn(400, 6)])
    for name, groups in surgery.uncurl_groups(found, 3).items():
        assert sorted(map(sorted, groups)) == [[0, 3], [1, 4], [2, 5]]
        load = found[name].load
        assert all(load[group[0]] == load[group].max() for group in groups)
    for number in (1, 2, 5, 6):
        groups = surgery.uncurl_groups(found, number)["layers.0"]
        assert len(groups) == number and sorted(e for group in groups for e in group) == [*range(6)]
    with pytest.raises(ValueError, match=r"num_groups must be in \[1, 6\]"):
        surgery.uncurl_groups(found, 7)


@needs_scipy
def test_hierarchical_groups_by_hand():
    found = layer_profile(load=[1, 5, 2, 9], output_count=[1, 5, 2, 9])
    found.output = torch.tensor([[0.0, 0, 0], [5.0, 0, 0], [2.2, 0, 0], [90.0, 0, 0]]).double()
    # Means 0, 1, 1.1 and 10: first 1 with 1.1, then these with 0.
    one = surgery.ExpertProfile({"a": found})
    assert surgery.hc_smoe_groups(one, 3)["a"] == [[0], [1, 2], [3]]
    assert surgery.hc_smoe_groups(one, 2)["a"] == [[1, 2, 0], [3]]


# --------------------------------------------------------------------------------- transformers

_FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        torch.save(model(torch.load(folder + "/ids")).logits, folder + "/logits")
assert "moe_ops" not in sys.modules
"""


@needs_transformers
@torch.no_grad()
def test_checkpoints_load_in_plain_transformers(tmp_path):
    """All in one fresh process, since importing transformers takes longer than the rest."""
    from tests.hf import models

    pruned = {}
    for model_type in ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"):
        model, ids = models.build(model_type), models.tokens()
        plain = model(ids).logits
        layers = surgery.find_routed_layers(model)
        surgery.prune_experts(model, {layer.name: range(layer.num_experts) for layer in layers})
        assert torch.equal(model(ids).logits, plain), model_type
        kept = {layer.name: [0, 1, 3, 4, 5] for layer in layers}
        with surgery.override_routing(model, surgery.rules.only(kept)):
            expected = model(ids).logits
        surgery.prune_experts(model, kept)
        pruned[model_type] = model(ids).logits
        torch.testing.assert_close(pruned[model_type], expected, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path / model_type)
        torch.save(ids, tmp_path / model_type / "ids")
    folders = [str(tmp_path / model_type) for model_type in pruned]
    done = run_python("-c", _FRESH, *folders, transformers=True)
    assert done.returncode == 0, done.stderr
    for model_type, logits in pruned.items():
        fresh = torch.load(tmp_path / model_type / "logits")
        torch.testing.assert_close(fresh, logits, rtol=1e-4, atol=1e-5, msg=model_type)


@needs_transformers
@pytest.mark.parametrize("model_type", ["gpt_oss", "phimoe", "granitemoe", "glm4_moe"])
@torch.no_grad()
def test_merging_in_models_of_transformers(model_type):
    """Copies of experts are merged back; whatever the layout, the model computes the same."""
    from tests.hf import models

    models.skip_unknown_router(model_type)
    model, ids = models.build(model_type), models.tokens()
    layer = surgery.find_routed_layers(model)[-1]
    count = layer.num_experts
    again = copy.deepcopy(model)
    surgery.prune_experts(again, {layer.name: [*range(count)]})
    groups = {layer.name: [[e] for e in range(count)]}
    surgery.merge_experts(again, groups, neuron_order=surgery.align_neurons(again, groups))
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    pairs = {layer.name: [[e, e + 1] for e in range(0, count, 2)]}
    surgery.merge_experts(again, pairs, neuron_order=surgery.align_neurons(again, pairs))
    got = surgery.find_routed_layers(again)[-1]
    assert got.num_experts == count // 2
    assert bool(torch.isfinite(again(ids).logits).all())
    assert getattr(again.config, "n_group", None) in (None, 1, 2, 4)


@needs_transformers
@pytest.mark.parametrize("model_type", ["dbrx", "jetmoe", "llama4_text"])
@torch.no_grad()
def test_models_outside_of_the_experts_interface(model_type, tmp_path):
    from tests.hf import models

    import moe_ops.hf

    model, ids = models.build(model_type), models.tokens()
    plain = model(ids).logits
    layers = surgery.find_routed_layers(model)
    surgery.prune_experts(model, {layer.name: range(layer.num_experts) for layer in layers})
    assert torch.equal(model(ids).logits, plain)
    kept = {layer.name: [1, 2, 3] for layer in layers}
    with surgery.override_routing(model, surgery.rules.only(kept)):
        expected = model(ids).logits
    surgery.prune_experts(model, kept)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    moe_ops.hf.enable(model)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    if model_type == "jetmoe":  # Attention has as many experts as before.
        with pytest.raises(ValueError, match=r"attention experts are as many .*zoo\.jetmoe"):
            model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"must be a feed-forward layer: .*zoo\.jetmoe"):
            surgery.prune_experts(model, {"model.layers.0.self_attention.experts": [0, 1]})
        return
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-5)


@needs_transformers
@torch.no_grad()
def test_attention_experts(tmp_path):
    """Those of transformers' JetMoE too, by way of the zoo's: transformers reads what it saves."""
    from tests.hf import models

    from moe_ops.zoo.jetmoe import JetMoE

    theirs, ids = models.build("jetmoe"), models.tokens()
    theirs.save_pretrained(tmp_path / "whole")
    model = JetMoE.from_pretrained(tmp_path / "whole")
    plain = model(ids)
    layers = surgery.find_routed_layers(model)
    assert len(layers) == 4 and sum(layer.experts is None for layer in layers) == 2
    surgery.prune_experts(model, {layer.name: range(layer.num_experts) for layer in layers})
    assert torch.equal(model(ids), plain)
    kept = {layer.name: [0, 2, 3] if layer.experts is None else [1, 2, 3] for layer in layers}
    with surgery.override_routing(model, surgery.rules.only(kept)):
        expected = model(ids)
    attention = [layer.name for layer in layers if layer.experts is None]
    some = surgery.prune_experts(copy.deepcopy(model), {name: kept[name] for name in attention})
    with pytest.raises(ValueError, match="must have the same number of experts"):
        some.save_pretrained(tmp_path / "some")
    surgery.prune_experts(model, kept)
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)
    assert model.config.num_experts == 3
    model.save_pretrained(tmp_path / "pruned")
    again = type(theirs).from_pretrained(tmp_path / "pruned", attn_implementation="eager")
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-5)


@needs_transformers
def test_optimized_routers_are_refused():
    from tests.hf import models

    import moe_ops.hf

    model = models.build("mixtral")
    moe_ops.hf.optimize(model)
    with pytest.raises(ValueError, match=r"call moe_ops\.hf\.restore first"):
        surgery.prune_experts(model, {"model.layers.0.mlp": [0, 1, 2]})
    moe_ops.hf.restore(model)
    surgery.prune_experts(model, {"model.layers.0.mlp": [0, 1, 2]})


def test_missing_scipy_is_said_in_one_sentence(monkeypatch):
    model, groups = TwoLayers(), {"layers.0": [[0, 1], [2, 3]]}
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"align_neurons needs scipy.*torch-moe-ops\[surgery\]"):
        surgery.align_neurons(model, groups)
    monkeypatch.setitem(sys.modules, "scipy.cluster.hierarchy", None)
    with pytest.raises(ImportError, match="hc_smoe_groups needs scipy"):
        surgery.hc_smoe_groups(surgery.profile_experts(model, [X]), 2)
