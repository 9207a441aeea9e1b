"""Experts in detectors of transformers: the start, the layer written out, losses, and files."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from bench.studies.dynamicdino.metrics import pairs_kept
from bench.studies.dynamicdino.shapes import ALL, draw_scenes
from bench.studies.dynamicdino.training import freeze

from moe_ops import zoo
from moe_ops.zoo.dynamicdino import DETECTORS, decoder_layers, moe_tuning

SMALL = {"hidden_size": 32, "ffn_size": 16, "num_heads": 2, "num_queries": 8}
SCENES = draw_scenes(3, ALL, torch.Generator().manual_seed(1), side=32, num_phrases=3)


def detector(kind="mm-grounding-dino", **options):
    """Dense, with heads whose boxes move."""
    torch.manual_seed(0)
    model = zoo.create_model("dynamicdino", num_copies=0, detector=kind, **{**SMALL, **options})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bbox_embed" in name or "fc" in name:
                p.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def dense():
    return detector()


def generator():
    return torch.Generator().manual_seed(2)


def outputs(model):
    with torch.no_grad():
        out = model(SCENES.images, SCENES.input_ids)
    return out.logits[..., : SCENES.input_ids.shape[1]], out.pred_boxes


@pytest.mark.parametrize("kind", DETECTORS)
def test_starts_as_the_dense_detector(kind):
    dense = detector(kind)
    wanted = outputs(dense)
    for options in (
        {"num_copies": 4},
        {"num_copies": 3, "num_slices": 4, "top_k": 8},
        {"num_copies": 4, "num_slices": 1},
    ):
        model = dense.with_experts(generator(), **options).eval()
        with model.recorded() as routing:
            found = outputs(model)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)
        assert len(routing) == 2
        for one in routing:
            assert pairs_kept(one.topk_ids, model.config.num_slices) == 1
            used = one.topk_ids.unique() // model.config.num_slices
            assert len(used.unique()) > 1


def test_slices_add_up_to_the_network(dense):
    layer = decoder_layers(dense.detector)[0]
    bank = dense.with_experts(num_copies=2, num_slices=4).mixtures[0].experts
    x = torch.randn(5, 32)
    outputs = bank.outputs(x)
    wanted = layer.fc2(layer.fc1(x).relu())
    assert outputs.shape == (5, 8, 32)
    for first in (0, 4):
        torch.testing.assert_close(outputs[:, first : first + 4].sum(1), wanted)
    torch.testing.assert_close(bank.b_down, layer.fc2.bias.expand(8, 32) / 4)
    torch.testing.assert_close(bank.w_gate_up[5], layer.fc1.weight[4:8])


def test_equals_a_plain_transcription(dense):
    """Once the rows of a copy have parted."""
    model = dense.with_experts(generator(), num_copies=3, num_slices=2).double()
    moe = model.mixtures[0]
    with torch.no_grad():
        moe.router.weight.normal_()
    x = torch.randn(6, 32, dtype=torch.float64)
    bank, rows = moe.experts, []
    for token in x:
        scores = moe.router.weight @ token
        best = sorted(range(6), key=lambda e: -scores[e].item())[:2]
        weights = 2 * scores[best].softmax(0)
        rows.append(
            sum(
                w * (bank.w_down[e] @ (bank.w_gate_up[e] @ token + bank.b_gate_up[e]).relu()
                     + bank.b_down[e])
                for w, e in zip(weights, best, strict=True)
            )
        )  # fmt: skip
    torch.testing.assert_close(moe(x), torch.stack(rows))


def test_what_is_trained(dense):
    model = dense.with_experts(num_copies=2)
    names = freeze(model.detector)
    trained = {n for n, p in model.detector.named_parameters() if p.requires_grad}
    assert set(names) == trained
    for part in (
        "model.encoder.layers.0.fusion_layer.attn.vision_proj.weight",
        "model.decoder.layers.1.fc1.moe.router.weight",
        "model.decoder.layers.1.fc1.moe.experts.b_down",
        "bbox_embed.0.layers.2.weight",
    ):
        assert part in trained or f"model.decoder.{part}" in trained, part
    for part in ("text_backbone", "backbone", "self_attn", "enhancer", "deformable", "level_embed"):
        assert not any(part in name for name in trained), part
    found = model.loss(SCENES.images, SCENES.input_ids, SCENES.labels)
    assert len(found.routing) == 2 and found.balance > 1.9
    torch.testing.assert_close(found.loss, found.detection + 0.01 * found.balance)
    found.loss.backward()
    for name, p in model.detector.named_parameters():
        assert p.requires_grad == (p.grad is not None), name
    assert {n for n in freeze(dense.detector) if ".fc" in n} == {
        f"model.decoder.layers.{i}.fc{j}.{what}"
        for i in (0, 1) for j in (1, 2) for what in ("weight", "bias")
    }  # fmt: skip
    dense.detector.requires_grad_(True)


def test_loss_trains_the_proposals(dense):
    """All but the proposals is transformers' loss; their boxes and scores have gradients."""
    model = dense
    out = model(SCENES.images, SCENES.input_ids, labels=SCENES.labels)
    found = model.loss(SCENES.images, SCENES.input_ids, SCENES.labels)
    weights = {"ce": 2.0, "bbox": 5.0, "giou": 2.0}
    theirs = sum(
        weights[name.split("_")[1]] * term
        for name, term in out.loss_dict.items()
        if not name.endswith("_enc") and name.split("_")[1] in weights
    )
    assert found.detection > theirs  # More by the loss of the proposals.
    plain = dict(model.detector.named_parameters())
    names = ("model.encoder_output_bbox_embed.layers.2.weight", "model.enc_output.weight")
    ours = torch.autograd.grad(found.loss, [plain[name] for name in names])
    assert all(bool(g.abs().sum() > 0) for g in ours)
    without = torch.autograd.grad(out.loss, [plain[name] for name in names], allow_unused=True)
    assert without == (None, None)
    ids = SCENES.input_ids.clone()
    ids[1, 3] = ids[1, 4]  # The second image's first phrase has three tokens and no full stop.
    with pytest.raises(ValueError, match="as many tokens in all images"):
        model.loss(SCENES.images, ids, [{**x, "class_labels": x["class_labels"] * 0}
                                        for x in SCENES.labels])  # fmt: skip


def test_what_is_refused(dense):
    sparse = dense.with_experts(num_copies=2)
    noisy = detector()
    decoder_layers(noisy.detector)[0].activation_dropout = 0.1
    for call, words in (
        (lambda: moe_tuning(torch.nn.Linear(2, 2)), "of transformers, got Linear"),
        (lambda: moe_tuning(sparse.detector), "must be dense, got one with experts"),
        (lambda: sparse.with_experts(num_copies=2), "must be dense, got one with experts"),
        (lambda: moe_tuning(noisy.detector), "activation_dropout 0, got 0.1"),
        (lambda: dense.with_experts(num_copies=-1), "num_copies must be at least 1, got -1"),
        (lambda: dense.with_experts(num_copies=2, num_slices=3), "must divide intermediate_size"),
        (
            lambda: zoo.create_model("dynamicdino", backbone="vgg"),
            "backbone must be one of convnext",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_meta_device_is_named():
    with torch.device("meta"), pytest.raises(ValueError, match="DynamicDino: the default device"):
        zoo.create_model("dynamicdino")
