"""Checkpoints that are damaged or malicious: right tensors or one sentence, never anything else."""

from __future__ import annotations

import dataclasses
import json
import random
import resource
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_ops import zoo
from moe_ops.layers.rotary import Yarn
from moe_ops.zoo.lm.model import CausalLM

from .mutations import mutate

SYSTEMS = ("jetmoe", "deepseek", "moduleformer", "coe", "topp", "kolibri", "thor", "widenet")
# Far above what a tiny model takes, far below what a mutated size would ask for.
MOST_MEMORY_KIB = 2**19


def small(name: str) -> CausalLM:
    sizes: dict[str, Any] = {"vocab_size": 32, "num_layers": 2}
    if name == "deepseek":
        sizes["yarn"] = Yarn(4.0, 16)
    return zoo.create_model(name, **sizes)


@pytest.fixture(scope="module", params=SYSTEMS)
def saved(request, tmp_path_factory) -> tuple[type[CausalLM], Path]:
    """A model class, and a folder with a checkpoint in one file and one in several."""
    folder = tmp_path_factory.mktemp(request.param)
    model = small(request.param)
    model.save_pretrained(folder / "one")
    size = sum(t.nbytes for t in model.state_dict().values())
    model.save_pretrained(folder / "many", max_shard_bytes=size // 3)
    return type(model), folder


def check_mutations(kind: type[CausalLM], source: Path, work: Path, seeds: range) -> dict[str, int]:
    """Returns how many of the mutated checkpoints were loaded and how many refused."""
    counts = {"loaded": 0, "refused": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        rng = random.Random(seed)
        shutil.rmtree(work, ignore_errors=True)
        folder = work / "checkpoint"
        shutil.copytree(source / rng.choice(("one", "many")), folder)
        first = sorted(source.glob("one/*.safetensors"))[0]
        shutil.copyfile(first, work / "outside.safetensors")
        said = mutate(folder, rng)
        strict = rng.random() < 0.8
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = kind.from_pretrained(folder, strict=strict)
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
            assert type(error) in (ValueError, FileNotFoundError), (seed, said, error)
            assert "from_pretrained" in message and "\n" not in message, (seed, said, message)
            counts["refused"] += 1
            continue
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {said}: {type(error).__name__}") from error
        check_right(model, folder, f"seed {seed}: {said}")
        counts["loaded"] += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MOST_MEMORY_KIB, f"{grown} KiB more than before"
    return counts


def check_right(model: CausalLM, folder: Path, said: str) -> None:
    """Checks that the loaded model is what the files hold, read by safetensors alone."""
    paths = list(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        assert path.resolve().is_relative_to(folder.resolve()), said
        tensors |= load_file(path)
    if index.exists():
        tensors = {key: tensors[key] for key in json.loads(index.read_text())["weight_map"]}
    state = model.state_dict()
    missing = set(model.load_report.missing)
    for entry in model.entries():
        if not missing & set(entry.keys):
            wanted = entry.join([tensors[key] for key in entry.keys]).to(state[entry.name].dtype)
            torch.testing.assert_close(
                state[entry.name], wanted, rtol=0, atol=0, equal_nan=True, msg=said
            )


def test_mutated_checkpoints(saved, tmp_path):
    kind, folder = saved
    counts = check_mutations(kind, folder, tmp_path / "work", range(60))
    assert min(counts.values()) > 0, counts


@pytest.mark.full
def test_many_mutated_checkpoints(saved, tmp_path):
    kind, folder = saved
    counts = check_mutations(kind, folder, tmp_path / "work", range(1000, 1500))
    print(f"\n{kind.__name__}: {counts}")


# --- one by one, with their sentences


@pytest.fixture
def jetmoe(tmp_path) -> Path:
    small("jetmoe").save_pretrained(tmp_path / "it", max_shard_bytes=20_000)
    assert (tmp_path / "it" / "model.safetensors.index.json").exists()
    return tmp_path / "it"


def refused(folder: Path, *words: str, error: type[Exception] = ValueError, **options: Any) -> None:
    with pytest.raises(error) as caught:
        zoo.get("jetmoe").load().JetMoE.from_pretrained(folder, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_index(folder: Path, name: Any) -> str:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    key = sorted(index["weight_map"])[0]
    index["weight_map"][key] = name
    path.write_text(json.dumps(index))
    return key


@pytest.mark.parametrize("absolute", [False, True])
def test_index_must_not_lead_outside(jetmoe, absolute):
    outside = jetmoe.parent / "outside" / "x.safetensors"
    outside.parent.mkdir()
    first = sorted(jetmoe.glob("*.safetensors"))[0]
    shutil.copyfile(first, outside)
    change_index(jetmoe, str(outside) if absolute else "../outside/x.safetensors")
    refused(jetmoe, "inside itself", "x.safetensors", "which leads to")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "shard"])
def test_links_must_not_lead_outside(jetmoe, name):
    path = sorted(jetmoe.glob("*.safetensors"))[0] if name == "shard" else jetmoe / name
    shutil.move(path, jetmoe.parent / path.name)
    path.symlink_to(jetmoe.parent / path.name)
    refused(jetmoe, path.name, "which leads to")


def test_folders_of_a_hugging_face_cache_load(jetmoe):
    """Their files are links to blobs beside the snapshots."""
    cache = jetmoe.parent / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(jetmoe.iterdir())):
        shutil.move(path, cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    model = zoo.get("jetmoe").load().JetMoE.from_pretrained(snapshot)
    assert model.load_report.missing == []
    (jetmoe.parent / "secret").write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../secret")
    refused(snapshot, "which leads to")


@pytest.mark.parametrize("size", [10**12, 10**6])
@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("hidden_size", "hidden_size"),
        ("num_hidden_layers", "num_layers"),
        ("num_local_experts", "num_experts"),
    ],
)
def test_sizes_are_checked_before_anything_is_made(jetmoe, key, field, size):
    change_config(jetmoe, **{key: size})
    refused(jetmoe, key if size > 2**31 else field, f"got {size}", "config.json")


def test_sizes_of_missing_tensors_must_fit_into_the_memory(jetmoe):
    index = jetmoe / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    kept = {key: name for key, name in where.items() if "embed" in key}
    index.write_text(json.dumps({"weight_map": kept}))
    change_config(jetmoe, intermediate_size=2**18, num_local_experts=2**18)
    refused(jetmoe, "must fit into the memory", strict=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": "64"}, ["hidden_size must be a whole number", "got '64'"]),
        ({"hidden_size": True}, ["hidden_size must be a whole number", "got True"]),
        ({"hidden_size": None}, ["must have hidden_size, got none"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps must be a finite number", "got nan"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings must be true or false, got 1"]),
        ({"rope_parameters": []}, ["rope_parameters must hold an object, got a list of 0"]),
        ({"moe_ops": 3}, ["moe_ops must be an object, got 3"]),
        ({"moe_ops": {"published": 3}}, ["fields must be among", "got 'published'"]),
        ({"moe_ops": {"num_layers": "2"}}, ["num_layers must be whole number, got '2'"]),
    ],
)
def test_config_of_wrong_types(jetmoe, change, words):
    change_config(jetmoe, **change)
    refused(jetmoe, str(jetmoe / "config.json"), *words)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_files_that_are_no_json_objects(jetmoe, name, text):
    (jetmoe / name).write_text(text, encoding="latin-1")
    refused(jetmoe, str(jetmoe / name), "JSON")


def test_index_of_wrong_types(jetmoe):
    key = change_index(jetmoe, 5)
    refused(jetmoe, "must name safetensors files, got 5", key)
    change_index(jetmoe, "none.safetensors")
    refused(jetmoe, "must hold none.safetensors, got no such file", error=FileNotFoundError)
    other = sorted(jetmoe.glob("*.safetensors"))[-1].name
    key = change_index(jetmoe, other)
    refused(jetmoe, other, f"must hold {key}", "no such tensor")
    (jetmoe / "model.safetensors.index.json").write_text('{"weight_map": []}')
    refused(jetmoe, "weight_map", "must be an object, got a list of 0")


def test_damaged_tensors(jetmoe):
    path = sorted(jetmoe.glob("*.safetensors"))[0]
    content = path.read_bytes()
    for damaged in (content[:-4], content[:20], b"", (2**62).to_bytes(8, "little") + content[8:]):
        path.write_bytes(damaged)
        refused(jetmoe, str(path), "whole safetensors file")
    path.write_bytes(content.replace(b'"F32"', b'"I32"'))
    refused(jetmoe, path.name, "must be one of F64, F32, BF16, F16, got I32")


def test_fp8_scales_must_fit(tmp_path):
    from safetensors.torch import save_file

    model = small("deepseek")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.0.mlp.down_proj.weight"
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    for scale in (torch.ones(2, 2), torch.ones(1), torch.ones(1, 1, dtype=torch.int32)):
        save_file(tensors | {f"{key}_scale_inv": scale}, path)
        with pytest.raises(ValueError, match=f"{key}_scale_inv must be"):
            type(model).from_pretrained(tmp_path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"{key} must be one of F64"):
        type(model).from_pretrained(tmp_path)


def test_checkpoint_that_is_replaced_while_it_is_read(jetmoe, monkeypatch):
    from moe_ops.zoo.lm import checkpoint

    opened = checkpoint.Reader.__init__

    def replaced(self, folder):
        small("jetmoe").save_pretrained(jetmoe, max_shard_bytes=20_000)
        opened(self, folder)

    monkeypatch.setattr(checkpoint.Reader, "__init__", replaced)
    refused(jetmoe, "must stay as it is while it is read")


def test_fields_of_every_config_have_types_that_are_checked():
    from moe_ops._fields import check_types

    for name in SYSTEMS:
        config = zoo.get(name).make_config()
        check_types(config, name)
        for field in dataclasses.fields(config):
            with pytest.raises(ValueError, match=rf"\w+: {field.name} must be"):
                check_types(dataclasses.replace(config, **{field.name: object()}), name)
