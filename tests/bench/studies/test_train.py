"""The command that trains a system of the zoo; training that is cut and gone on with."""

from __future__ import annotations

import dataclasses
import importlib
import random

import pytest
import torch
from bench.studies import language, python_texts, train, trainer
from bench.studies.__main__ import main

ALPHABETS = {
    "general": b"abcdefgh+-*/=<>%", "digits": b"01234567", "letters": b"abcdefgh",
    "signs": b"+-*/=<>%",
}  # fmt: skip
# Small settings; the run that is cut, the step of the cut, and the name of its arm.
CASES = {
    "adamoe": (
        {"arms": ("dense", "additive"), "pretrain_steps": 8, "steps": 8, "batch_size": 16,
         "hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "episodes": 16},
        ("fit adamoe additive", 6, "additive"),
    ),
    "bam": (
        {"arms": ("own K/V", "BTX", "dense"), "domains": ("general", "digits"), "seed_steps": 2,
         "specialist_steps": 2, "steps": 2, "batch_size": 2, "length": 16, "hidden_size": 16,
         "num_layers": 1, "rows": 2},
        ("train own-kv", 2, "own-kv"),
    ),
    "composition": (
        {"domains": ("digits", "letters", "signs"), "hidden_size": 16, "num_layers": 1,
         "steps": 12, "general_steps": 12, "batch_size": 2, "length": 16, "prompts": 6,
         "prompt_length": 8, "labeled": 2, "router_steps": 20},
        ("train letters", 8, "letters"),
    ),
    "dynamicdino": (
        {"arms": ("experts",), "pretrain_steps": 2, "steps": 4, "batch_size": 2,
         "hidden_size": 32, "num_queries": 8, "scenes": 4},
        ("fit experts", 4, "experts"),
    ),
    "factorllm": (
        {"arms": ("prior",), "domains": ("letters",), "dense_steps": 2, "steps": 4,
         "batch_size": 2, "length": 16, "hidden_size": 16, "num_layers": 1, "rows": 2},
        ("train prior", 4, "prior"),
    ),
    "gntmove": (
        {"arms": ("dense", "move"), "steps": 6, "scenes": 1, "rays": 4, "size": 12, "views": 2,
         "hidden_size": 8, "num_layers": 2, "num_points": 2, "test_scenes": 2, "ssim": 0,
         "pictures": 1},
        ("fit gntmove moe", 4, "move"),
    ),
    "mofme": (
        {"arms": ("dense", "film"), "steps": 6, "batch_size": 3, "crop": 16, "hidden_size": 8,
         "num_layers": 1, "num_experts": 3, "test_crops": 3, "ssim": 0, "pictures": 2},
        ("fit mofme film", 4, "film"),
    ),
    "sentence": (
        {"domains": ("digits", "letters"), "span": 8, "pretrain_steps": 3, "steps": 4,
         "batch_size": 4, "hidden_size": 8, "num_layers": 1, "pairs": 6},
        ("fit experts", 6, "experts"),
    ),
    "thor": (
        {"arms": ("thor", "switch"), "pairs": 20, "hidden_size": 16, "num_layers": 1,
         "num_experts": 2, "steps": 4, "batch_size": 2, "longest": 20, "beam": 1,
         "translated": 3},
        ("fit thor", 4, "thor"),
    ),
    "widenet": (
        {"arms": ("widenet", "unshared"), "domains": ("digits", "letters"), "hidden_size": 16,
         "num_layers": 2, "intermediate_size": 8, "steps": 4, "batch_size": 2, "length": 16,
         "image_size": 8, "rows": 2, "pictures": 0},
        ("fit widenet", 4, "widenet"),
    ),
}  # fmt: skip
# The pictures that a report goes with.
PICTURES = {"gntmove": "views.png", "mofme": "restored.png"}


def small(module, monkeypatch) -> None:
    """Replaces what is large or not installed everywhere."""
    name = module.__name__.split(".")[-2]
    if name == "dynamicdino":  # Training does not depend on how it is judged.
        monkeypatch.setattr(module, "check_installed", lambda: None)
        monkeypatch.setattr(
            module,
            "average_precision",
            lambda found, scenes, pairs: {
                "AP": float(found.scores.mean()), "AP50": float(found.boxes.mean())
            },
        )  # fmt: skip
    if name == "mofme":
        draw = torch.Generator().manual_seed(0)
        photos = [list(torch.rand(2, 3, 24, 24, generator=draw)) for _ in range(2)]
        tiny = module.RivalConfig(channels=2, num_heads=1, head_size=4)
        monkeypatch.setattr(module, "load_photos", lambda folder: photos)
        monkeypatch.setattr(module.RivalConfig, "tiny", classmethod(lambda cls: tiny))


def forget_times(report):
    """Drops what no two runs have in common."""
    return {
        k: forget_times(v) if isinstance(v, dict) else v
        for k, v in report.items()
        if k not in ("seconds", "pictures")
    }


@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_where_it_was_cut(name, tmp_path, monkeypatch):
    if name in PICTURES:
        pytest.importorskip("matplotlib", reason="pip install torch-moe-ops[viz]")
    if name == "composition":
        pytest.importorskip("scipy")
    module = pytest.importorskip(f"bench.studies.{name}.training")
    small(module, monkeypatch)
    values, (what, step, arm) = CASES[name]
    settings = module.Settings(**values)
    draw = random.Random(0)
    texts = {
        domain: python_texts.Text.of(bytes(draw.choices(ALPHABETS[domain], k=2000)))
        for domain in values.get("domains", ())
    }
    options = {"progress": False, **({"texts": texts} if texts else {})}
    whole = forget_times(module.train(tmp_path / "whole", settings, **options))
    if name in PICTURES:
        assert (tmp_path / "whole" / PICTURES[name]).stat().st_size > 1000
    real, calls = trainer.train_steps, []

    def cut(title, *args, **rest):
        def watch(done):
            if not calls and title.endswith(what) and done == step:
                calls.append(done)
                raise KeyboardInterrupt

        return real(title, *args, **{**rest, "every": step // 2, "watch": watch})

    for place in (module, language):
        monkeypatch.setattr(place, "train_steps", cut, raising=False)
    with pytest.raises(KeyboardInterrupt):
        module.train(tmp_path / "cut", settings, **options)
    assert list((tmp_path / "cut").rglob(f"{arm}.training.pt"))
    assert forget_times(module.train(tmp_path / "cut", settings, **options)) == whole
    for place in (module, language):  # Nothing is left to train, but for what takes no time.
        monkeypatch.setattr(place, "train_steps", None if name != "composition" else real)
    assert forget_times(module.train(tmp_path / "cut", settings, **options)) == whole
    other = dataclasses.replace(settings, steps=5)
    with pytest.raises(ValueError, match="of these settings, got others"):
        module.train(tmp_path / "cut", other, **options)


@pytest.mark.parametrize("name", train.LANGUAGE_MODELS)
def test_the_command_trains_language_models(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip("safetensors")
    command = ["train", name, "--folder", str(tmp_path), "--quiet", "--domains", "maths",
               "--steps", "2", "--batch-size", "2", "--length", "16", "--rows", "2"]  # fmt: skip
    assert main(command) == 0
    first = capsys.readouterr().out
    assert first.startswith(f"arms {name} ") and "loss" in first
    monkeypatch.setattr(language, "train_steps", None)  # Nothing is left to train.
    assert main(command) == 0
    assert capsys.readouterr().out == first


def test_the_command_does_a_seed_of_a_study(tmp_path, capsys):
    command = ["train", "recipes", "--folder", str(tmp_path), "--quiet", "--study",
               "recipes-curriculum", "--seed", "3"]  # fmt: skip
    assert main(command) == 0
    first = capsys.readouterr().out
    path = tmp_path / "recipes-curriculum" / "all-arms-of-a-seed-3.json"
    done = path.read_bytes()
    assert main(command) == 0
    assert capsys.readouterr().out == first and path.read_bytes() == done
    assert "P@1" in first
    with pytest.raises(SystemExit, match="study must be one of recipes-noise"):
        main(["train", "recipes", "--folder", str(tmp_path / "b"), "--study", "other"])
    with pytest.raises(SystemExit, match="runs must be one of all arms of a seed, got 'one'"):
        main([*command, "--runs", "one"])
    with pytest.raises(SystemExit, match="folder must hold runs of these settings"):
        main([*command[:-1], "4"])


@pytest.mark.parametrize("name", train.WITH_SETTINGS)
def test_the_command_trains(name, monkeypatch, capsys):
    module = importlib.import_module(f"bench.studies.{name}.training")

    def stub(folder, settings, *, progress):
        assert (folder, progress, settings.seed) == ("there", False, 7)
        return {"settings": {"seed": 7}, "arms": {"one": {"loss": 1.25, "curve": [1, 2]}}}

    monkeypatch.setattr(module, "train", stub)
    assert main(["train", name, "--folder", "there", "--quiet", "--seed", "7"]) == 0
    assert capsys.readouterr().out.split() == ["arms", "one", "loss", "1.25"]


def test_the_command_says_what_is_wrong(capsys):
    with pytest.raises(SystemExit, match=r"system must be one of coe, .*, got 'other'"):
        main(["train", "other", "--folder", "there"])
    with pytest.raises(SystemExit):
        main(["train", "gntmove"])
    assert "--folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("bam", {"arms": ("other",)}, "arms must be one of own K/V"),
        ("bam", {"domains": ("code",)}, "domains must be two or more, got code"),
        ("dynamicdino", {"arms": ("other",)}, "arms must be one of dense, experts"),
        ("factorllm", {"arms": ("other",)}, "arms must be one of prior, straight_through"),
        ("gntmove", {"arms": ("nerf",)}, "arm must be one of dense, wide, moe, move, got 'nerf'"),
        ("mofme", {"arms": ("conv",)}, "arm must be one of dense, ffn, film-plain, film"),
        ("mofme", {"weather": ("fog",)}, "weather must be one of rain, snow, haze, got 'fog'"),
        ("sentence", {"encoder": "large"}, "encoder must be one of bytes, minilm"),
        ("thor", {"arms": ("dropout",)}, "arms must be one of thor, random"),
        ("thor", {"tokens": "words"}, "tokens must be 'bytes' or a number, got 'words'"),
        ("widenet", {"arms": ("vit",)}, "arms must be one of widenet"),
    ],
)  # fmt: skip
def test_bad_settings(name, values, words):
    module = importlib.import_module(f"bench.studies.{name}.training")
    with pytest.raises(ValueError, match=words):
        module.Settings(**values)
