"""The registry of the zoo, its commands, and the arithmetic of reports of experiments."""

from __future__ import annotations

import json
import math
import sys
import types
from dataclasses import dataclass
from typing import ClassVar

import pytest
from bench.studies.report import Claim, Report
from typer.testing import CliRunner

from moe_ops import zoo
from moe_ops.cli.app import app

runner = CliRunner()


@dataclass(frozen=True)
class ToyConfig:
    PRESETS: ClassVar[tuple[str, ...]] = ("tiny", "large")
    size: int = 1

    @classmethod
    def tiny(cls):
        return cls()

    @classmethod
    def large(cls):
        return cls(size=100)


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


def test_verdicts_are_computed():
    claim = Claim("lower", [-0.3, -0.1, -0.2], "nat")
    assert claim.mean == pytest.approx(-0.2)
    # Sample deviation 0.1 over sqrt(3); the quantile of two degrees of freedom is 4.3.
    assert claim.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert claim.verdict() == "not shown" and claim.said() == "not shown (3 seeds)"
    five = [-0.3, -0.1, -0.2, -0.25, -0.15]
    assert Claim("lower", five, "nat").said() == "shown"
    assert Claim("higher", five, "nat", below=False).said() == "contradicted"
    assert Claim("lower", [-5.0], "nat").said() == "not shown (1 seed)"
    three = [3.4, 3.6, 3.5, 3.45, 3.55]
    assert Claim("three times", three, "x", bound=3.0, below=False).verdict() == "shown"


def test_report_tables():
    report = Report("toy", {"Data": "bytes"}, ["loss", "MaxVio"])
    report.arms = {"dense": [[2.0, 0.0], [4.0, 0.0]], "sparse": [[1.0, 0.5], [2.0, 0.7]]}
    report.claims = [Claim("sparse is lower", [-1.0, -2.0], "nat")]
    text = report.markdown()
    assert "| arm | loss | MaxVio |" in text
    assert "| dense | 3 ± 1 | 0 ± 0 |" in text
    assert "| sparse is lower | -1.5 (-7.85 to 4.85) nat | 2 | < 0 | not shown (2 seeds) |" in text
