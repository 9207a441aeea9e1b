"""The registry of the zoo, its commands, and the arithmetic of reports of experiments."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass

import pytest
import torch
from typer.testing import CliRunner

from moe_ops import zoo
from moe_ops.cli.app import app

runner = CliRunner()


@dataclass(frozen=True)
class ToyConfig:
    size: int = 1

    large = zoo._presets.preset("Large.", size=100)
    tiny = zoo._presets.preset("Small.")


class Toy:
    def __init__(self, config):
        self.config = config


@pytest.fixture
def toy(monkeypatch):
    module = types.ModuleType("toy_system")
    module.ToyConfig, module.Toy = ToyConfig, Toy
    monkeypatch.setitem(sys.modules, "toy_system", module)
    monkeypatch.setattr(zoo, "_SYSTEMS", {})
    return zoo.register(zoo.System("toy", "toy_system", "ToyConfig", "Toy", "A toy [not real]."))


def test_create(toy):
    assert zoo.list_models() == ("toy",)
    assert zoo.create_model("toy").config == ToyConfig()
    assert zoo.create_model("toy", preset="large").config.size == 100
    assert zoo.create_model("toy", preset="large", size=3).config.size == 3
    assert toy.presets() == ("tiny", "large")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: zoo.create_model("other"), "name must be one of toy, got 'other'"),
        (lambda: zoo.create_model("toy", preset="huge"), "one of tiny, large, got 'huge'"),
        (
            lambda: zoo.create_model("toy", depth=2),
            "ToyConfig: fields must be among size, got 'depth'",
        ),
        (lambda: zoo.register(zoo.get("toy")), "new one, got 'toy'"),
    ],
)
def test_bad_calls(toy, call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_missing_package_names_its_extra(toy):
    system = zoo.register(zoo.System("far", "not_there_at_all", "C", "M", "Far.", needs="zoo"))
    with pytest.raises(ImportError, match=r"far needs not_there_at_all.*torch-moe-ops\[zoo\]"):
        system.load()
    result = runner.invoke(app, ["zoo", "list", "--json"])
    assert result.exit_code == 0, result.output
    listed = {entry["name"]: entry for entry in json.loads(result.output)}
    assert listed["far"]["presets"] is None and listed["toy"]["presets"] == ["tiny", "large"]
    assert "needs [zoo]" in runner.invoke(app, ["zoo", "list"]).output


def test_list_command(toy):
    result = runner.invoke(app, ["zoo", "list"])
    assert result.exit_code == 0, result.output
    for word in ("toy", "A toy [not real].", "tiny, large"):
        assert word in result.output


@pytest.mark.parametrize("name", zoo.list_models())
def test_save_and_load(name, tmp_path):
    try:
        model = zoo.create_model(name)
    except ImportError:
        pytest.skip("An extra is not installed here.")
    path = tmp_path / "model.pt"
    if name == "driftmoe":
        with pytest.raises(ValueError, match="experts of DriftMoE must be torch modules"):
            zoo.save_model(model, path)
        return
    zoo.save_model(model, path)
    again = zoo.load_model(name, path)
    assert type(again) is type(model) and again.config == model.config
    states = model.state_dict(), again.state_dict()
    assert list(states[0]) == list(states[1])
    for key, value in states[0].items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, states[1][key]), key


def test_trees_are_not_dropped(tmp_path):
    from moe_ops.zoo.driftmoe import DriftMoE, DriftMoEConfig

    model = DriftMoE(DriftMoEConfig(num_features=1, num_classes=2), lambda i: object())
    with pytest.raises(ValueError, match="experts of DriftMoE must be torch modules"):
        zoo.save_model(model, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="must be a torch module with a config of the zoo"):
        zoo.save_model(torch.nn.Linear(1, 1), tmp_path / "model.pt")


def test_load_rejects_other_systems(tmp_path):
    path = tmp_path / "model.pt"
    zoo.save_model(zoo.create_model("home"), path)
    with pytest.raises(ValueError, match=r"load_model: .* a JetMoEConfig and its weights"):
        zoo.load_model("jetmoe", path)
    with pytest.raises(FileNotFoundError):
        zoo.load_model("home", tmp_path / "none.pt")


def test_methods_have_functions():
    methods = zoo.list_methods()
    assert [m.name for m in methods] == ["premoe", "uncurl", "super_experts", "scmoe", "expertflow"]
    for method in methods:
        assert all(map(callable, method.load().values())), method.name
        assert method.summary.endswith(".") and len(method.summary) < 90, method.name
    result = runner.invoke(app, ["zoo", "list"])
    assert all(method.name in result.output for method in methods)


def test_every_system_is_whole():
    for name in zoo.list_models():
        system = zoo.get(name)
        try:
            assert system.presets()[0] == "tiny", name
        except ImportError as error:
            # An extra that is not installed here.
            assert system.needs and f"torch-moe-ops[{system.needs}]" in str(error)
            continue
        for preset in system.presets():
            system.make_config(preset)
        assert system.summary.endswith(".") and len(system.summary) < 90, name
