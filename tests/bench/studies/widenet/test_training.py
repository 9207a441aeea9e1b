"""WideNet's images; the command."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bench.studies import python_texts, train
from bench.studies.widenet import training
from bench.studies.widenet.controls import build
from bench.studies.widenet.images import glyphs, warped_digits


def test_digits():
    assert glyphs().shape == (10, 1, 7, 5) and len(glyphs().flatten(1).unique(dim=0)) == 10
    draw = torch.Generator().manual_seed(0)
    images, labels = warped_digits(200, 16, draw, noise=0.0)
    assert images.shape == (200, 1, 16, 16) and set(labels.tolist()) == set(range(10))
    assert (images.flatten(1).amax(1) > 0.3).all() and images.max() <= 1.5
    # The picture is about the glyph: bright pixels of a one fill less than those of an eight.
    light = [float((images[labels == d] > 0.2).float().mean()) for d in (1, 8)]
    assert 0.01 < light[0] < light[1] < 0.5
    again = warped_digits(200, 16, torch.Generator().manual_seed(0), noise=0.0)
    assert torch.equal(again[0], images)


SMALL = training.Settings(
    arms=("widenet", "shared-norms", "unshared"), domains=("reference", "maths"), hidden_size=16,
    num_layers=2, intermediate_size=8, steps=4, batch_size=2, length=16, image_size=8, rows=2,
    pictures=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def texts():
    return {name: python_texts.Text.of(bytes(range(32, 120)) * 5) for name in SMALL.domains}


def test_command(texts, tmp_path, capsys, monkeypatch):
    report = training.train(tmp_path / "text", SMALL, texts=texts, progress=False)
    arms = report["arms"]
    assert list(arms) == list(SMALL.arms)
    assert set(arms["widenet"]) == {"parameters", "loss", "kept", "divergence"}
    assert set(arms["unshared"]) == {"parameters", "loss"}
    assert arms["shared-norms"]["parameters"] < arms["widenet"]["parameters"]
    assert arms["widenet"]["parameters"] < arms["unshared"]["parameters"]
    seeing = ["widenet", "--folder", str(tmp_path / "images"), "--quiet", "--trunk", "vision",
              "--arms", "widenet", "--hidden-size", "16", "--num-layers", "2",
              "--intermediate-size", "8", "--steps", "2", "--batch-size", "2", "--image-size", "8",
              "--rows", "2", "--pictures", "0"]  # fmt: skip
    train.main(seeing)
    first = capsys.readouterr().out
    assert "accuracy" in first
    # What is there is not trained again.
    monkeypatch.setattr(training, "train_steps", None)
    train.main(seeing)
    assert capsys.readouterr().out == first
    changed = dataclasses.replace(SMALL, steps=5)
    with pytest.raises(ValueError, match="must hold models of these settings"):
        training.train(tmp_path / "text", changed, texts=texts, progress=False)
    with pytest.raises(ValueError, match="arms must be one of widenet"):
        training.Settings(arms=("vit",))


def test_arms_use_as_many_features_for_a_token():
    configs = {arm: training.make_config(SMALL, arm) for arm in training.ARMS}
    assert {c.top_k * c.intermediate_size for c in configs.values()} == {16}
    assert configs["widenet"].sharing == "own_norms" and configs["widenet"].num_experts == 4
    assert configs["unshared-experts"].num_experts == 4


@torch.no_grad()
def test_picture_of_experts_by_depth(texts, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    models = {arm: build(training.make_config(SMALL, arm)) for arm in SMALL.arms}
    drawn = []
    plot = training.plot_expert_scores

    def kept(panels, **options):
        drawn.append(panels)
        return plot(panels, **options)

    monkeypatch.setattr(training, "plot_expert_scores", kept)
    found = {arm: training.evaluate(models[arm], SMALL, texts)[1] for arm in SMALL.arms}
    training.draw(found, tmp_path / "experts.png")
    assert (tmp_path / "experts.png").stat().st_size > 1000
    (panels,) = drawn
    assert list(panels) == ["widenet", "shared-norms"]  # The others have no experts.
    for name, loads in panels.items():
        wanted = torch.zeros(2, 4)
        for text in texts.values():
            rows = text.spread(SMALL.rows, SMALL.length + 1)
            for depth, routed in enumerate(models[name].loss(rows).routing):
                wanted[depth] += torch.bincount(routed.routing.topk_ids.flatten(), minlength=4)
        wanted = wanted / wanted.sum(1, keepdim=True)
        torch.testing.assert_close(torch.stack(loads), wanted.double(), rtol=1e-6, atol=1e-6)
    training.draw({"unshared": found["unshared"]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
