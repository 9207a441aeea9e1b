"""The benchmark that ships: limits, layers, baselines, what it measures and writes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import moe_ops
from moe_ops import _library, reference
from moe_ops.bench import baselines, measure, report, timing
from moe_ops.bench.limits import Limits, measure_limits
from moe_ops.bench.measure import FORMAT, Plan, relative_error, run
from moe_ops.bench.shapes import (
    INT4_GROUP,
    SHAPES,
    Shape,
    exact_output,
    flops,
    make_bank,
    make_tokens,
    take,
)
from moe_ops.cli.app import app

TINY = Shape("tiny", H=64, I=96, E=5, K=2, like="a toy")
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
PLAN = Plan(
    shapes=("tiny",),
    training_shapes=("tiny",),
    tokens=(1, 16),
    training_tokens=(16,),
    budget_s=0.01,
    limit_s=0.01,
)


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)


# --- limits


def test_limits_are_plausible():
    limits = measure_limits(seconds=0.02, buffer_bytes=8 << 20)
    assert limits.isa == _library.cpu_isa()
    assert 1e9 < limits.fp32_flops < 1e12
    assert 1e9 < limits.bf16_flops < 1e13
    assert 1e8 < limits.read_bytes < 1e13
    assert set(limits.cached_bytes) == {n << 19 for n in (1, 2, 3, 4, 6, 8)}
    assert all(1e8 < rate < 1e13 for rate in limits.cached_bytes.values())


def test_an_fma_loop_beats_a_torch_product(set_threads):
    """A limit that a product exceeds would be none; 10 % for the clock's ups and downs. The best of
    many measurements, since another process can slow any one of them down."""
    if _library.cpu_isa() != _library.detected_isa():
        pytest.skip("torch's product takes wider vectors than the limit.")
    set_threads(1)
    a = torch.randn(512, 512)
    best = min(timing._timed(lambda: a @ a, 1) for _ in range(20))
    assert any(2 * 512**3 / best < 1.1 * measure_limits(seconds=0.2).fp32_flops for _ in range(60))


def test_floor_is_the_larger_of_the_two():
    limits = Limits("avx2", 1, fp32_flops=100e9, bf16_flops=200e9, read_bytes=20e9)
    assert limits.floor_s(100e9, 1.0, "fp32") == 1.0
    assert limits.floor_s(100e9, 1.0, "bf16") == limits.floor_s(100e9, 1.0, "int4") == 0.5
    assert limits.floor_s(1.0, 40e9, "bf16") == 2.0


def test_floor_of_weights_in_a_cache():
    cached = {1 << 20: 100e9, 4 << 20: 50e9, 8 << 20: 60e9}
    limits = Limits("avx2", 1, 1e15, 1e15, read_bytes=20e9, cached_bytes=cached)
    rates = {1e5: 100e9, 2e6: 100e9, 5e6: 50e9, 12e6: 50e9, 20e6: 20e9}
    for size, rate in rates.items():
        assert limits.floor_s(1.0, size, "fp32") == size / rate
    assert limits.floor_s(1.0, 2e6, "fp32", working_set=5e6) == 2e6 / 50e9
    other = Limits("avx2", 1, 1e14, 2e15, read_bytes=30e9, cached_bytes={4 << 20: 70e9})
    best = limits.best(other)
    assert best.cached_bytes == {**cached, 4 << 20: 70e9} and best.read_bytes == 30e9
    assert (best.fp32_flops, best.bf16_flops) == (1e15, 2e15)


# --- layers and baselines


def test_work_of_a_layer():
    assert flops(TINY, 3) == 3 * 2 * (2 * 64 * 192 + 2 * 96 * 64)
    assert flops(TINY, 3, training=True) == 3 * flops(TINY, 3)
    tokens = make_tokens(TINY, torch.float32, 40)
    assert tokens.experts_used == 5
    weights = 3 * 64 * 96
    assert tokens.weight_bytes(TINY, "bf16") == 5 * 2 * weights
    assert tokens.weight_bytes(TINY, "int8") == 5 * (weights + 4 * (192 + 64))
    assert tokens.weight_bytes(TINY, "int4") == 5 * (weights / 2 + 4 * weights / INT4_GROUP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_output(dtype):
    bank, tokens = make_bank(TINY, dtype), make_tokens(TINY, dtype, 20)
    assert torch.equal(tokens.topk_weights, tokens.topk_weights.to(dtype).float())
    weights = (bank.w_gate_up.double(), bank.w_down.double())
    truth = reference.moe_ffn(tokens.x.double(), *weights, tokens.topk_weights, tokens.topk_ids)
    rows = torch.tensor([0, 7, 19])
    torch.testing.assert_close(
        exact_output(bank, tokens, rows), truth[rows], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("weight_format", ["fp32", "bf16"])
def test_builtin_baselines_compute_the_layer(weight_format):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[weight_format]
    bank, tokens = make_bank(TINY, dtype), make_tokens(TINY, dtype, 33)
    truth = exact_output(bank, tokens, torch.arange(33))
    for baseline in baselines.builtin_baselines():
        if weight_format in baseline.formats and baseline.missing() is None:
            with torch.no_grad():
                y = baseline.prepare(bank, weight_format)(tokens)()
            error = relative_error(y, truth)
            assert error <= baselines.tolerance(weight_format), baseline.name


def test_take_is_the_start_of_the_batch():
    tokens = make_tokens(TINY, torch.float32, 20)
    few = take(tokens, 3)
    assert few.count == 3 and torch.equal(few.topk_ids, tokens.topk_ids[:3])


# --- training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_steps_agree_with_fp64(dtype):
    bank, tokens = make_bank(TINY, dtype), make_tokens(TINY, dtype, 20)
    grad_y = torch.randn(20, TINY.H).to(dtype)
    leaves = [t.double().requires_grad_() for t in (tokens.x, bank.w_gate_up, bank.w_down)]
    reference.moe_ffn(*leaves, tokens.topk_weights, tokens.topk_ids).backward(grad_y.double())
    exact = dict(zip(("x", "w_gate_up", "w_down"), [leaf.grad for leaf in leaves], strict=True))
    torch.testing.assert_close(
        baselines.exact_grad_x(bank, tokens, grad_y), exact["x"], rtol=1e-10, atol=1e-10
    )
    bound = 1e-5 if dtype == torch.float32 else 0.03
    for name, make in baselines.STEPS.items():
        if name in baselines.skipped_steps():
            continue
        step = make(bank, tokens, grad_y)
        gradients = {key: value.clone() for key, value in step().items()}
        step()  # A second step must not disturb what the first returned.
        for key, value in exact.items():
            assert relative_error(gradients[key], value) <= bound, (name, key)


# --- runs


@pytest.fixture(scope="module")
def result():
    SHAPES["tiny"] = TINY
    yield run(PLAN)
    del SHAPES["tiny"]


def test_result_has_the_documented_fields(result):
    assert result["format"] == FORMAT
    assert {"cpu", "detected_isa"} <= result["machine"].keys()
    assert {"torch", "torch-moe-ops"} <= result["versions"].keys()
    assert result["isa"] == result["limits"]["isa"] == _library.cpu_isa()
    assert len(result["forward"]) == 4  # Two formats, two numbers of tokens.
    for mode in ("forward", "training"):
        for cell in result[mode]:
            ours = cell["contenders"][cell["ours"]]
            assert ours["ms"] > 0 and "ours_faster" not in ours
            assert ours["of_limit"] == pytest.approx(cell["floor_ms"] / ours["ms"], rel=0.01)
            for name, baseline in cell["contenders"].items():
                assert baseline["error"] <= 2 * baselines.tolerance(cell["weights"])
                assert name == cell["ours"] or baseline["ours_faster"] > 0
    if HAS_TRANSFORMERS:
        assert "HF grouped_mm" in result["forward"][0]["contenders"]
    assert json.loads(json.dumps(result)) == result


def test_report_shows_every_cell(result):
    text = report.render(result)
    for title in ("Forward", "Forward and backward"):
        assert f"### {title}" in text
    forward_rows = [line for line in text.splitlines() if line.startswith("| tiny ")]
    assert len(forward_rows) == 4 + 2
    # Every line of a table has as many cells as its head.
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block


class Wrong(baselines.MoeOps):
    name = "wrong"

    def prepare(self, bank, weight_format):
        bind = super().prepare(bank, weight_format)
        return lambda tokens: lambda: bind(tokens)() * 1.1


class Broken(baselines.MoeOps):
    name = "broken"

    def prepare(self, bank, weight_format):
        raise RuntimeError("no kernel\nand a long story")


class Absent(baselines.MoeOps):
    name = "absent"

    def missing(self):
        return "absent is not installed"


def test_wrong_broken_and_absent_baselines_are_reported():
    plan = replace(PLAN, modes=("forward",), formats=("fp32",), tokens=(16,))
    everyone = [*baselines.builtin_baselines(), Wrong(), Broken(), Absent()]
    result = run(plan, baselines=everyone)
    (cell,) = result["forward"]
    assert cell["skipped"]["wrong"].startswith("wrong: relative error 1.0e-01")
    assert cell["skipped"]["broken"] == "RuntimeError: no kernel"
    assert not {"wrong", "broken", "absent"} & cell["contenders"].keys()
    assert result["absent"]["absent"] == "absent is not installed"
    text = report.render(result)
    assert "- broken: RuntimeError: no kernel (tiny fp32 T=16)." in text
    assert "- absent: absent is not installed." in text


def test_what_is_slow_is_left_out_with_more_tokens(monkeypatch):
    monkeypatch.setattr(measure, "SLOW_S", 0.0)
    plan = replace(PLAN, modes=("forward",), formats=("fp32",))
    first, second = run(plan)["forward"]
    assert "per-expert mm" in first["contenders"]
    assert "with fewer tokens" in second["skipped"]["per-expert mm"]


def test_checked_rows_are_inside():
    for T in (1, 2, 15, 16, 17, 512):
        rows = measure.checked_rows(T)
        assert rows[0] == 0 and rows[-1] == T - 1 and len(set(rows)) == len(rows)


# --- command line


def test_cli_quick(monkeypatch):
    monkeypatch.setattr(measure, "QUICK", replace(PLAN, modes=("forward",)))
    outcome = CliRunner().invoke(app, ["bench", "--quick"])
    assert outcome.exit_code == 0, outcome.output
    assert "### Forward" in outcome.output and "tiny" in outcome.output


def test_cli_json(monkeypatch):
    monkeypatch.setattr(measure, "QUICK", replace(PLAN, modes=("training",)))
    outcome = CliRunner().invoke(app, ["bench", "--quick", "--json"])
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout)["training"]


@pytest.mark.skipif("avx2" not in _library.supported_isas(), reason="no AVX2 here")
def test_isa_restarts_the_command(monkeypatch):
    """The kernels, torch and oneDNN read these when they are loaded, so a new process is needed."""
    monkeypatch.setenv("PYTHONPATH", str(Path(moe_ops.__file__).parents[1]))
    monkeypatch.delenv("MOE_OPS_CPU_ISA", raising=False)
    code = (
        "import sys; from moe_ops.bench import measure; from moe_ops.cli import main; "
        "measure.QUICK = measure.Plan(modes=(), limit_s=0.01); main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "bench", "--quick", "--json", "--isa", "avx2"]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout)["isa"] == "avx2"
