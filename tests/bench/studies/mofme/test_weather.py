"""Weather, photos, tiles, and measures of restored images."""

from __future__ import annotations

import math

import pytest
import torch
from bench.studies import images as _images
from bench.studies.images import psnr, ssim
from bench.studies.mofme import weather
from bench.studies.mofme.rivals import Restoration, RivalConfig
from bench.studies.mofme.tiles import restore, starts
from bench.studies.mofme.training import evaluate
from bench.studies.mofme.weather import (
    WEATHER,
    add_haze,
    add_rain,
    add_snow,
    crops,
    degrade,
    load_photos,
    read_photo,
)
from tests.zoo.mofme.test_model import SMALL, generator, images, small
from torch import nn

from moe_ops.layers import Routing


def test_restore_covers_the_image_with_tiles():
    assert starts(10, 4, 0) == [0, 4, 6] and starts(10, 4, 2) == [0, 2, 4, 6]
    assert starts(4, 4, 3) == [0]
    model = small()
    image = torch.rand(3, 14, 11)
    torch.testing.assert_close(restore(model, image, 8, 4), image)
    with torch.no_grad():
        nn.init.normal_(model.tail[-1].weight)
    whole = images(1, 16)
    torch.testing.assert_close(restore(model, whole[0], 16), model.eval()(whole)[0][0])
    assert not model.training
    with pytest.raises(ValueError, match=r"tile must be in \(overlap, 11\], got 12"):
        restore(model, image, 12)


def test_weather():
    there = images()
    for function in (add_rain, add_snow, add_haze):
        made = function(there, generator())
        assert torch.equal(made, function(there, generator())) and made.shape == there.shape
        assert 0 <= made.min() and made.max() <= 1 and not torch.equal(made, there)
    rain, snow = add_rain(there * 0.5, generator()), add_snow(there * 0.5, generator())
    # Drops and flakes lighten what is dark, and leave pixels between them alone.
    for made in (rain, snow):
        assert bool((made >= there * 0.5 - 1e-6).all())
    assert float((rain == there * 0.5).float().mean()) > 0.2
    # Haze shrinks contrast to what is kept, at least exp(-1.6) of it.
    flat = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    kept = add_haze(flat, generator())[1] - add_haze(flat[[0, 0]], generator())[1]
    assert bool((kept > math.exp(-1.6)).all()) and bool((kept < 1).all())


def test_degrade_and_crops():
    photos = [torch.full((3, 20, 30), 0.2), torch.full((3, 17, 16), 0.7)]
    clean = crops(photos, 12, 16, generator())
    assert clean.shape == (12, 3, 16, 16)
    assert {round(float(v), 1) for v in clean.unique()} == {0.2, 0.7}
    made = degrade(clean, generator(), ("haze", "rain"))
    assert made.weather.tolist() == [WEATHER.index("haze"), WEATHER.index("rain")] * 6
    assert torch.equal(made.clean, clean)
    ramp = torch.arange(40.0).expand(3, 4, 40)
    pieces = crops([ramp], 50, 4, generator())
    steps = pieces.diff(dim=-1)[:, 0, 0, 0]
    assert set(steps.tolist()) == {1.0, -1.0}


def test_photos_of_a_folder(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pip install torch-moe-ops[studies]")
    for number in range(3):
        picture = image.new("RGB", (8, 6), (10 * number, 0, 255))
        picture.putpixel((0, 0), (10 * number, 255, 255))
        picture.save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    train, test = load_photos(tmp_path)
    assert [tuple(p.shape) for p in (*train, *test)] == [(3, 3, 4)] * 3 and len(test) == 1
    # Pixels are means of four.
    torch.testing.assert_close(test[0][:, 0, 0], torch.tensor([20 / 255, 0.25, 1.0]))
    torch.testing.assert_close(read_photo(tmp_path / "1.png"), train[1])
    (tmp_path / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match="two photos to train on and one to test on, got 1"):
        load_photos(tmp_path)


def test_photos_of_packages(monkeypatch):
    """Those that are not installed are named."""
    monkeypatch.setattr(weather, "PHOTOS", (("none", "not_a_package", "a.png"),))
    assert weather.missing_photos() == ["none"]
    with pytest.raises(FileNotFoundError, match=r"installed packages.*torch-moe-ops\[studies\]"):
        load_photos()


def test_measures(monkeypatch):
    truth = images(2)
    off = truth + torch.tensor([0.1, 0.01])[:, None, None, None]
    torch.testing.assert_close(psnr(off, truth), torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0)
    counts = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    assert _images.mutual_information(counts) == pytest.approx(math.log(2))
    assert _images.mutual_information(torch.ones(3, 4)) == pytest.approx(0, abs=1e-9)

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(_images.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"SSIM needs torchmetrics.*torch-moe-ops\[studies\]"):
        ssim(truth, truth)


def test_ssim():
    pytest.importorskip("torchmetrics", reason="pip install torch-moe-ops[studies]")
    truth = images(2)
    torch.testing.assert_close(ssim(truth, truth), torch.ones(2))
    assert bool((ssim(1 - truth, truth) < 0.5).all())


def test_evaluate():
    data = degrade(images(9), generator())
    found = evaluate(small(), data, progress=False)
    untouched = psnr(data.degraded, data.clean)
    assert found["psnr"] == pytest.approx(float(untouched.mean()))
    assert found["psnr snow"] == pytest.approx(float(untouched[data.weather == 1].mean()))
    assert 0 <= found["information"] < math.log(3)
    dense = Restoration(RivalConfig(**SMALL, experts="dense"))
    assert "information" not in evaluate(dense, data, progress=False)
    # A router that reads the weather tells all of it.
    model = small(top_k=1)
    kinds = data.weather.repeat_interleave(16)
    model.layers[0].ffn.router.forward = lambda x: routed_to(kinds)
    told = evaluate(model, data, progress=False)["information"]
    assert told == pytest.approx(math.log(3))


def routed_to(ids):
    return Routing(None, torch.ones(len(ids), 1), ids[:, None].int())
