"""Generated scenes, average precision, and training that is cut and gone on with."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytest.importorskip("transformers")

from bench.studies.dynamicdino import training
from bench.studies.dynamicdino.metrics import Found, average_precision, co_selection, pairs_kept
from bench.studies.dynamicdino.shapes import (
    ALL,
    FIRST,
    HELD_OUT,
    KNOWN,
    draw_scenes,
    phrase,
    tokens_of,
)
from bench.studies.dynamicdino.starts import with_start
from tests.zoo.test_dynamicdino import detector, outputs

from moe_ops.zoo.dynamicdino import DETECTORS, decoder_layers


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_scenes_show_what_the_labels_say():
    side = 96
    scenes = draw_scenes(24, ALL, generator(), side=side)
    grid = (torch.arange(side) + 0.5) / side
    seen = set()
    for image, phrases, labels in zip(scenes.images, scenes.phrases, scenes.labels, strict=True):
        assert len(phrases.unique()) == 6 and 1 <= len(labels["boxes"]) <= 4
        assert scenes.images.shape[1:] == (3, side, side)
        covered = torch.zeros(side, side, dtype=torch.bool)
        for label, box in zip(labels["class_labels"], labels["boxes"], strict=True):
            color, shape = divmod(int(phrases[label]), 6)
            seen.add((color, shape))
            x, y, w, h = box
            inside = ((grid - x).abs() <= w / 2)[None] & ((grid - y).abs() <= h / 2)[:, None]
            covered |= inside
            # A color has channels that are 0, which the background never has.
            off = [c for c in range(3) if image[c][inside].min() == -1]
            rgb = ["gb", "rb", "rg", "b", "g", "r"][color]
            assert "".join("rgb"[c] for c in off) == rgb
            drawn = (image[off[0]] == -1) & inside
            for axis, size in ((0, w), (1, h)):
                across = drawn.any(axis).float().sum() / side
                assert abs(across - size) < 3 / side, (color, shape)
            full = {0: 0.785, 1: 1.0, 2: 0.5, 3: 0.58, 4: 0.5, 5: 0.55}[shape]
            assert drawn.sum() / inside.sum() == pytest.approx(full, abs=0.06)
        assert not (image[:, ~covered] == -1).any()
    assert len(seen) > 20
    assert torch.equal(draw_scenes(24, ALL, generator(), side=side).images, scenes.images)


def test_phrases_and_pairs():
    assert phrase(0) == "red circle" and phrase(35) == "cyan ring"
    ids = tokens_of(torch.tensor([[0, 35]]))
    assert ids.tolist() == [[101, 200, 300, 1012, 205, 305, 1012, 102]]
    assert set(FIRST) < set(KNOWN) and sorted((*KNOWN, *HELD_OUT)) == list(ALL)
    for pairs in (FIRST, KNOWN, HELD_OUT):
        assert len({p // 6 for p in pairs}) == len({p % 6 for p in pairs}) == 6
    with pytest.raises(ValueError, match="at most the number of pairs, 6, got 7"):
        draw_scenes(1, HELD_OUT, num_phrases=7)


def test_average_precision():
    pytest.importorskip("pycocotools", reason="pip install torch-moe-ops[studies]")
    scenes = draw_scenes(12, ALL, generator())
    boxes, scores, pairs = torch.zeros(12, 5, 4) + 0.01, torch.zeros(12, 5), torch.zeros(12, 5)
    for i, (labels, phrases) in enumerate(zip(scenes.labels, scenes.phrases, strict=True)):
        count = len(labels["boxes"])
        boxes[i, :count], scores[i, :count] = labels["boxes"], 1.0
        pairs[i, :count] = phrases[labels["class_labels"]].float()
    found = Found(boxes, scores, pairs.long())
    assert average_precision(found, scenes) == pytest.approx({"AP": 1, "AP50": 1, "AP75": 1})
    # Boxes of 0.9 of the height: IoU 0.9, which nine of the ten thresholds accept.
    found = Found(boxes * torch.tensor([1, 1, 1, 0.9]), scores, pairs.long())
    judged = average_precision(found, scenes)
    assert judged["AP"] == pytest.approx(0.85, abs=0.06) and judged["AP50"] == pytest.approx(1)
    # Pairs that are not asked for do not count.
    wrong = Found(boxes, scores, (pairs.long() + 1) % 36)
    assert average_precision(wrong, scenes)["AP"] < 0.2
    some = average_precision(found, scenes, KNOWN)
    assert some["AP50"] == pytest.approx(1)
    with pytest.raises(ValueError, match="objects of pairs, got none"):
        average_precision(found, scenes.take(0, 0), HELD_OUT)


def test_missing_package_names_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install torch-moe-ops\[studies\]"):
        training.train(tmp_path, training.Settings(), progress=False)


def test_analysis():
    ids = torch.tensor([[0, 1], [1, 0], [2, 1], [2, 3]])
    assert pairs_kept(ids, 2) == 0.75 and pairs_kept(ids, 1) == 1
    wanted = torch.tensor([[2, 2, 0, 0], [2, 3, 1, 0], [0, 1, 2, 1], [0, 0, 1, 1.0]])
    assert torch.equal(co_selection(ids, 4), wanted)


@pytest.mark.parametrize("kind", DETECTORS)
def test_other_starts_differ_from_the_dense_detector(kind):
    dense = detector(kind)
    wanted = outputs(dense)
    for start in ("random_router", "random_experts"):
        model = with_start(dense, generator(2), num_copies=4, start=start).eval()
        assert (outputs(model)[1] - wanted[1]).abs().max() > 1e-3, start
        assert len(model.mixtures) == len(decoder_layers(dense.detector)) == 2
    paired = with_start(dense, generator(2), num_copies=4).eval()
    torch.testing.assert_close(outputs(paired)[1], wanted[1], atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="start must be one of paired"):
        with_start(dense, start="none", num_copies=2)
