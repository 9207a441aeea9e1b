"""The benchmark for cards on the CPU: baselines, a walk through all of it, the report."""

from __future__ import annotations

import itertools
import json
import runpy
import sys
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from bench.gpu import block, cases, clock, main, planner, report, run
from bench.gpu.cases import Case
from bench.gpu.clock import HostClock
from bench.gpu.layer import Layer, Weights
from bench.gpu.limits import Limits
from bench.gpu.peers import PEERS, Peer
from bench.gpu.problem import relative
from bench.harness import dump
from bench.harness.files import RESULTS

from moe_ops import doctor, reference

CPU = torch.device("cpu")
TINY = cases.TINY["tiny"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On layers this small, others only wait, and a walk takes one anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def steady_clock():
    """A microsecond from one reading to the next, so that what a walk leaves out for want of time
    does not depend on what else the machine does."""
    readings = itertools.count()

    def read():
        return 1e-6 * next(readings)

    with pytest.MonkeyPatch.context() as patch:
        for module in (clock, main, run):
            patch.setattr(module, "time", SimpleNamespace(perf_counter=read, time=read))
        yield


def a_case(part="forward", shape=TINY, T=16, routing="balanced"):
    return Case(part, shape, T, routing)


# ---------------------------------------------------------------------------- baselines


@pytest.fixture
def layer():
    return Layer(a_case(T=33), Weights(TINY, CPU), CPU)


@pytest.fixture
def session():
    options = run.Options(seconds=5.0, tiny=True)
    return run.Session(options, HostClock(), Limits(1e12, 1e11, 1e-6), lambda line: None)


@pytest.mark.parametrize("part", (*cases.PARTS, *cases.LEASE_PARTS))
def test_baselines_agree_with_the_truth(part, layer, session):
    op = run.op_of(part)
    if not doctor.has_kernel(op, "cpu"):
        pytest.skip(f"This build has no {op}.")
    (dtype, *_) = cases.dtypes_of(part, cases.USUAL_DTYPES)
    case = replace(layer.case, part=part, dtype=dtype)
    if part in cases.LEASE_PARTS:
        case = replace(case, shape=cases.SMALL)
        layer = Layer(case, Weights(cases.SMALL, CPU), CPU)
    problem = run.problem_of(session, case, layer)
    assert next(iter(problem.jobs)) == block.OURS
    assert len(problem.jobs) >= 2
    for name, job in problem.jobs.items():
        result = job()
        assert problem.check(result) <= problem.tolerance, name
    # A wrong result is seen.
    broken = [t.contiguous().clone() for t in (result if isinstance(result, tuple) else (result,))]
    first = broken[0].view(-1)
    first[0] = first[0] + 100 if first.dtype.itemsize > 1 else 448
    assert (
        problem.check(tuple(broken) if isinstance(result, tuple) else broken[0]) > problem.tolerance
    )


def test_block_is_checked_against_the_reference(layer):
    tokens, bank = layer.tokens, layer.bank
    arguments = (tokens.x, bank.w_gate_up, bank.w_down, tokens.topk_weights)
    exact = reference.moe_ffn(*(t.double() for t in arguments), tokens.topk_ids)
    problem = block.block_problem(layer.case, layer, lambda f: f)
    for name, job in problem.jobs.items():
        assert relative(job(), exact) <= problem.tolerance, name
    assert problem.check(exact) < 1e-12
    assert problem.check(exact * 1.1) > problem.tolerance


def test_a_gradient_that_is_nan_is_seen(layer):
    problem = block.block_problem(replace(layer.case, part="training"), layer, lambda f: f)
    result = [t.clone() for t in problem.jobs[block.OURS]()]
    assert problem.check(result) <= problem.tolerance
    result[2][0, 0, 0] = float("nan")
    assert not problem.check(result) <= problem.tolerance


def test_batched_mm_is_for_few_tokens(layer):
    many = replace(layer.case, T=512)
    jobs = block.block_problem(many, Layer(many, layer.weights, layer.device), lambda f: f).jobs
    assert block.BATCHED not in jobs
    assert block.BATCHED in block.block_problem(layer.case, layer, lambda f: f).jobs


def test_missing_peers_say_so(layer):
    problem = block.block_problem(layer.case, layer, lambda f: f)
    assert set(problem.absent) == {peer.name for peer in PEERS}
    for peer in PEERS:
        why = problem.absent[peer.name]
        assert why in (f"{peer.package} is not installed", "needs a CUDA device")
        assert peer.name not in problem.jobs


@dataclass(frozen=True)
class Fake(Peer):
    name: str = "fake"
    module: str = "torch"
    package: str = "torch"
    trains: bool = False
    factor: float = 1.0

    def missing(self, device):
        return None

    def block(self, x, w_gate_up, w_down, weights, ids):
        if self.factor == 0:
            raise RuntimeError("no kernel image\nfor this card")
        return self.factor * block.torch_grouped_mm(x, w_gate_up, w_down, weights, ids)


@pytest.mark.parametrize(
    ("factor", "reason"),
    [(1.0, None), (1.2, "wrong: relative error 2.0e-01"), (0.0, "RuntimeError: no kernel image")],
)
def test_a_peer_that_is_wrong_or_fails_is_skipped(monkeypatch, layer, session, factor, reason):
    monkeypatch.setattr(block, "PEERS", (Fake(factor=factor),))
    cell = run.measure_case(session, layer.case, layer, 0.01)
    if reason is None:
        assert cell["contenders"]["fake"]["ours_faster"] > 0 and not cell["skipped"]
    else:
        assert cell["skipped"] == {"fake": reason}
        assert "fake" not in cell["contenders"]
    assert block.OURS in cell["contenders"]
    training = replace(layer.case, part="training")
    assert "fake" not in run.measure_case(session, training, layer, 0.01)["contenders"]


def test_first_calls_have_a_share(layer, session):
    session.first_calls_s = {block.LOOP: 0.41, block.OURS: 9.0}
    cell = run.measure_case(session, layer.case, layer, 1.0)
    assert block.LOOP in cell["skipped"] and block.OURS in cell["contenders"]
    assert cell["contenders"][block.GROUPED]["rounds"] >= planner.MIN_ROUNDS


def test_slow_baselines_are_not_repeated():
    def took(seconds):
        return run.Prepared(lambda: None, seconds)

    prepared = {block.OURS: took(0.001), "slow": took(0.02), "near": took(0.009)}
    assert run._slow_ones(prepared, 0.05, 5) == ["slow"]
    assert run._slow_ones(prepared, 0.11, 5) == []
    assert run._slow_ones({}, 1.0, 5) == []


# ---------------------------------------------------------------------------- the walk

CELL_KEYS = {
    "part",
    "shape",
    "T",
    "routing",
    "dtype",
    "used",
    "flops",
    "bytes",
    "floor_us",
    "contenders",
    "skipped",
}
RESULT_KEYS = {
    "kind",
    "format",
    "complete",
    "dry_run",
    "date",
    "card",
    "versions",
    "limits",
    "absent",
    "cells",
    "left_out",
    "clocks",
    "seconds",
}


def check_schema(result):
    """Checks what a baseline of a card holds."""
    assert RESULT_KEYS <= set(result)
    assert (result["kind"], result["format"]) == ("gpu", run.FORMAT)
    assert {"bf16_flops", "copy_bytes", "launch_s", "fp8_flops"} == set(result["limits"])
    assert {"python", "torch", "moe_ops", "kernels"} <= set(result["versions"])
    assert isinstance(result["card"]["name"], str)
    assert all(isinstance(why, str) for why in result["absent"].values())
    assert result["cells"]
    for cell in result["cells"]:
        assert set(cell) == CELL_KEYS
        assert (
            cell["part"] in (*cases.PARTS, *cases.LEASE_PARTS) and cell["routing"] in cases.ROUTINGS
        )
        assert cell["floor_us"] > 0 and cell["bytes"] > 0
        for name, found in cell["contenders"].items():
            assert {"us", "rounds", "error", "of_limit"} <= set(found)
            assert found["us"] > 0 and found["rounds"] >= 1 and found["error"] >= 0
            assert found["of_limit"] == pytest.approx(cell["floor_us"] / found["us"], rel=2e-3)
            assert ("ours_faster" in found) == (name != block.OURS)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """All parts. Compiling is left to the test of baselines, which compiles all that is."""
    path = tmp_path_factory.mktemp("gpu") / "walk.json"
    arguments = ["--device", "cpu", "--dry-run", "--quick", "--json", str(path), "--models", "tiny"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Session, "compiled", lambda self, function: function)
        code = main.main([*arguments, "--tokens", "1", "16"])
    return code, json.loads(path.read_text())


def test_walk_writes_a_whole_result(walked):
    code, result = walked
    assert code == 0
    check_schema(result)
    assert result["dry_run"] and result["complete"] and not result["left_out"]
    assert {c["part"] for c in result["cells"]} == set(cases.PARTS) - set(result["absent"])
    assert {(c["T"], c["routing"]) for c in result["cells"] if c["part"] == "forward"} == {
        (1, "balanced"),
        (16, "balanced"),
        (16, "skewed"),
    }
    assert all(not c["skipped"] and block.OURS in c["contenders"] for c in result["cells"])
    assert result["steps"]["small"]["status"] == "passed"


def test_walk_is_a_command(tmp_path, monkeypatch, capsys):
    """`python -m bench.gpu` with the real clock: one part, and an hour for it, so that all of it is
    done on a busy machine too. In this process, as another one takes seconds to begin."""
    path = tmp_path / "walk.json"
    for module in (clock, main, run):
        monkeypatch.setattr(module, "time", time)
    arguments = ["--device", "cpu", "--dry-run", "--quick", "--parts", "permute", "--no-tests"]
    more = ["--minutes", "60", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["bench.gpu", *arguments, *more])
    with pytest.raises(SystemExit) as done:
        runpy.run_module("bench.gpu", run_name="__main__")
    said = capsys.readouterr()
    assert done.value.code == 0, said.err
    assert "would run: make build MOE_OPS_CUDA=on" in said.err
    assert "permute" in said.out and "its times mean nothing" in said.out
    check_schema(json.loads(path.read_text()))


def test_result_is_saved_after_every_layer(monkeypatch):
    saved = []
    shapes = tuple(cases.TINY.values())
    options = run.Options(5.0, parts=("permute",), shapes=shapes, tokens=(4,), tiny=True)
    result = run.measure(options, device="cpu", save=saved.append)
    assert [len(s["cells"]) for s in saved] == [1]
    assert not saved[0]["complete"] and result["complete"]
    assert len(result["cells"]) == 2


def test_an_op_without_a_kernel_is_absent(monkeypatch):
    monkeypatch.setattr(run.doctor, "has_kernel", lambda op, device: op == "permute")
    options = run.Options(5.0, parts=("permute", "forward"), shapes=(TINY,), tokens=(4,), tiny=True)
    result = run.measure(options, device="cpu")
    assert result["absent"]["forward"] == "this build has no CPU kernel of it"
    assert {c["part"] for c in result["cells"]} == {"permute"}


def test_no_time_leaves_everything_out():
    options = run.Options(0.0, parts=("permute",), shapes=(TINY,), tokens=(4,), tiny=True)
    result = run.measure(options, device="cpu")
    assert result["cells"] == []
    assert result["left_out"] == ["permute tiny T=4 balanced bf16"]
    assert "1 cases did not fit into the time" in "\n".join(report.missing(result))


# ------------------------------------------------------------------------------ report


def test_tables_say_who_is_faster(walked):
    result = walked[1]
    for title, header, rows in report.tables(result):
        assert title.removesuffix(" in fp16") in report.TITLES.values()
        assert header[:6] == ["model", "T", "routing", "floor", "moe_ops", "of limit"]
        assert rows and all(len(row) == len(header) for row in rows)
    text = report.markdown(result)
    for title in ("Targets", "Expert block, forward", "grouped_gemm_wgrad", "sort_by_expert"):
        assert f"### {title}" in text
    for peer in PEERS:
        assert f"{peer.name}: " in text


def test_report_without_rich(walked, monkeypatch, capsys):
    report.print_result(walked[1])
    assert "Expert block, forward" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    report.print_result(walked[1])
    assert "### Expert block, forward" in capsys.readouterr().out


def test_render_prints_a_file(walked, tmp_path, capsys):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(walked[1]))
    assert main.main(["--render", str(path)]) == 0
    assert "grouped_gemm" in capsys.readouterr().out


def cell(part, T=32768, routing="balanced", us=100.0, flops=1.0, **ours_faster):
    baselines = {"moe_ops": {"us": us, "rounds": 5, "error": 0.0, "of_limit": 0.5}}
    for name, ratio in ours_faster.items():
        baselines[name.replace("_", " ")] = {"us": ratio * us, "ours_faster": ratio}
    return {"part": part, "shape": "m", "T": T, "routing": routing, "flops": flops} | {
        "contenders": baselines
    }


def test_targets():
    products = [
        # 100 us at 600 TFLOP/s are 60 GFLOP: 48 G is 0.8, 30 G is 0.5.
        cell("grouped_gemm", flops=48e9) | {"shape": "fast"},
        cell("grouped_gemm_wgrad", flops=30e9),
        cell("grouped_gemm", routing="skewed", flops=1e9),
        cell("grouped_gemm_down", T=64, flops=1e9),
    ]
    products[0]["contenders"][block.GROUPED] = {"us": 1, "ours_faster": 1.1}
    products[1]["contenders"][block.GROUPED] = {"us": 1, "ours_faster": 0.9}
    forward = cell("forward", T=64)
    forward["contenders"][block.UNFUSED] = {"us": 1, "ours_faster": 1.3}
    found = report.verdicts(
        {"cells": [*products, forward], "limits": {"bf16_flops": 600e12, "copy_bytes": 1.0}}
    )
    grouped, rate, fused, decode, sonic = found
    assert (grouped.worst, grouped.met) == ("0.90", False)
    assert grouped.missing == ("grouped_gemm_wgrad m T=32768 balanced 0.90",)
    assert (rate.worst, rate.met) == ("0.50", False)
    assert (fused.worst, fused.met) == ("1.30", True)
    assert decode.worst is None and sonic.worst is None


def test_dump_of_a_card(walked, tmp_path):
    (tmp_path / "a-card.json").write_text(json.dumps(walked[1]))
    assert "### Expert block, forward" in dump.dump(tmp_path / "a-card.json")


def test_recorded_results_of_cards_are_whole():
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        if result.get("kind") == "gpu":
            check_schema(result)
            assert not result["dry_run"], path
