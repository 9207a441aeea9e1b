"""The benchmark for cards, without a card: plan, arithmetic, steps, and a walk on the CPU."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
if not (ROOT / "bench" / "gpu").is_dir():
    pytest.skip("No source tree here.", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import page  # noqa: E402
from bench.gpu import block, card, cases, main, ops, planner, report, run, small, steps  # noqa: E402
from bench.gpu.cases import Case  # noqa: E402
from bench.gpu.clock import HostClock, in_turns  # noqa: E402
from bench.gpu.layer import Layer  # noqa: E402
from bench.gpu.limits import Limits  # noqa: E402
from bench.gpu.peers import PEERS, Peer  # noqa: E402
from bench.gpu.problem import relative  # noqa: E402
from bench.gpu.work import Work, work_of  # noqa: E402

from moe_ops import reference  # noqa: E402
from moe_ops.bench.shapes import Shape, flops  # noqa: E402

TINY = cases.TINY["tiny"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On layers this small, others only wait, and a walk takes one anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def a_case(part="forward", shape=TINY, T=16, routing="balanced"):
    return Case(part, shape, T, routing)


# ------------------------------------------------------------------------------- cases


def test_models_and_cases():
    assert len(cases.MODELS) == 15
    assert (min(cases.TOKENS), max(cases.TOKENS)) == (1, 32768)
    every = cases.all_cases()
    assert len(set(every)) == len(every)
    for shape in cases.MODELS.values():
        for part in cases.PARTS:
            assert any(c.part == part and c.shape == shape for c in every)
    for part in ("forward", "training", "grouped_gemm", "sort_slots"):
        assert {c.routing for c in every if c.part == part} == set(cases.ROUTINGS)
    # Cases of a layer are together, so that its weights are made once.
    groups = [c.group for c in every if c.dtype == "bf16"]
    assert len([1 for a, b in itertools.pairwise(groups) if a != b]) == 14


@pytest.mark.parametrize("shape", [*cases.MODELS.values(), *cases.TINY.values()], ids=str)
@pytest.mark.parametrize("routing", cases.ROUTINGS)
def test_ids_are_distinct_and_in_range(shape, routing):
    ids = cases.make_ids(shape, 257, routing)
    assert ids.shape == (257, shape.K) and ids.dtype == torch.int32
    assert ids.min() >= 0 and ids.max() < shape.E
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    counts = torch.bincount(ids.reshape(-1), minlength=shape.E)
    if routing == "balanced":
        assert counts.max() - counts.min() <= 1
    else:
        # The favourite has more than its share, or most tokens where E is small.
        assert counts[0] >= min(0.8 * 257, 1.5 * 257 * shape.K / shape.E)
        assert counts[0] > counts[-1]
    assert torch.equal(ids, cases.make_ids(shape, 257, routing))


def test_routing_that_does_not_exist():
    with pytest.raises(ValueError, match=r"balanced.*got 'even'"):
        cases.make_ids(TINY, 4, "even")


# -------------------------------------------------------------------------------- work

# H 4, I 3, E 5, K 2, T 6: N 12 rows; 4 experts have tokens. An expert has 24 + 12 weights.
HAND = Shape("hand", 4, 3, 5, 2)
HAND_WORK = {
    # 12 rows x 36 weights x 2; (4 x 36 weights + x 24 + y 24 + hidden 36 twice) x 2 + 12 x 8
    "forward": (864, 2 * (144 + 24 + 24 + 72) + 96),
    # Forward and the pre-activation 72; then weights 144, their gradients 5 x 36, x, dy and dx 24
    # each, pre 72, its gradient 72 twice, hidden 36 twice; routing, gradient of its weights.
    "training": (2592, 2 * (144 + 48 + 72 + 72 + 144 + 180 + 72 + 72 + 144 + 72) + 96 + 48),
    "grouped_gemm": (576, 2 * (4 * 24 + 48 + 72)),
    "grouped_gemm_down": (288, 2 * (4 * 12 + 36 + 48)),
    "grouped_gemm_wgrad": (576, 2 * (5 * 24 + 48 + 72)),
    "topk_router": (0, 4 * 30 + 8 * 12),
    "sort_slots": (0, 4 * (12 + 6 + 12 + 12)),
    "permute": (0, 2 * (24 + 48) + 4 * 12),
    "unpermute": (0, 2 * (48 + 24) + 8 * 12),
    "gated_act": (0, 2 * (72 + 36)),
}


@pytest.mark.parametrize("part", HAND_WORK)
def test_work_by_hand(part):
    assert work_of(a_case(part, HAND, 6), 4) == Work(*HAND_WORK[part])


def test_work_of_fp8_by_hand():
    shape = Shape("blocks", 256, 128, 4, 2)  # up: 256 x 256 weights, 4 blocks of 128 by 128
    work = work_of(Case("grouped_gemm_fp8", shape, 3, "balanced", "fp8"), 2)
    assert work.flops == 2 * 6 * 256 * 256
    assert work.bytes == 2 * 65536 + 6 * 256 + 2 * 6 * 256 + 4 * (2 * 4 + 6 * 2)


def test_work_counts_the_tensors_of_an_op():
    layer = Layer(
        a_case(T=6, shape=HAND),
        Layer.open(a_case(shape=HAND), torch.device("cpu")),
        torch.device("cpu"),
    )
    used = layer.tokens.experts_used

    def sizes(*tensors):
        return sum(t.nbytes for t in tensors)

    offsets, row_to_slot, slot_to_row = layer.sorted
    weights, up = layer.tokens.topk_weights, layer.bank.w_gate_up
    moved = {
        "permute": sizes(layer.tokens.x, layer.rows_h, row_to_slot),
        "unpermute": sizes(layer.rows_h, layer.tokens.x, slot_to_row, weights),
        "gated_act": sizes(layer.rows_2i, layer.rows_i),
        "sort_slots": sizes(layer.tokens.topk_ids, offsets, row_to_slot, slot_to_row),
        "topk_router": sizes(layer.logits, weights, layer.tokens.topk_ids),
        "grouped_gemm": sizes(layer.rows_h, up[:used], layer.rows_2i),
        "grouped_gemm_wgrad": sizes(layer.rows_h, up, layer.rows_2i),
    }
    for part, size in moved.items():
        assert work_of(a_case(part, HAND, 6), used).bytes == size, part


def test_work_of_a_published_layer():
    v3 = cases.MODELS["deepseek-v3"]
    one = work_of(a_case("forward", v3, 1), 8)
    # 8 experts of 3 x 7168 x 2048 weights in two bytes, a third of a millisecond at 2 TB/s.
    assert one.bytes == pytest.approx(704_643_072, rel=1e-3)
    for part, training in (("forward", False), ("training", True)):
        assert work_of(a_case(part, v3, 4096), 256).flops == flops(v3, 4096, training=training)


# ----------------------------------------------------------------------------- planner


@dataclass
class Ranked:
    """As much of a case as the planner looks at."""

    name: str
    rank: int = 0
    group: tuple[str, str] = ("a", "bf16")

    def __hash__(self):
        return hash(self.name)


def cost(setup_s=1.0, round_s=0.2, open_s=0.0):
    return planner.Cost(setup_s, round_s, open_s)


def test_split_shares_what_is_left():
    # Each needs 1 + 5 x 0.2 = 2 s; 25 rounds would be 6 s.
    two = [Ranked("a"), Ranked("b")]
    assert planner.split(two, [cost()] * 2, 4.0) == planner.Plan({0: 5, 1: 5}, pytest.approx(4.0))
    assert planner.split(two, [cost()] * 2, 8.0) == planner.Plan({0: 15, 1: 15}, pytest.approx(8.0))
    assert planner.split(two, [cost()] * 2, 99.0) == planner.Plan(
        {0: 25, 1: 25}, pytest.approx(12.0)
    )


def test_split_takes_by_rank_and_opens_a_group_once():
    some = [Ranked("late", 2), Ranked("first", 0), Ranked("next", 1), Ranked("other", 0, ("b", ""))]
    costs = [cost(open_s=3.0)] * 4
    # first 2 + 3, other 2 + 3, next 2, late 2.
    assert set(planner.split(some, costs, 14.0).rounds) == {0, 1, 2, 3}
    assert set(planner.split(some, costs, 13.9).rounds) == {1, 2, 3}
    assert set(planner.split(some, costs, 11.9).rounds) == {1, 3}
    assert set(planner.split(some, costs, 6.9).rounds) == {1}
    assert set(planner.split(some, costs, 9.0, opened=[("a", "bf16")]).rounds) == {1, 2, 3}
    assert planner.split(some, costs, 0.5) == planner.Plan({}, 0.0)


def test_split_goes_on_to_cheaper_cases():
    some = [Ranked("dear", 0), Ranked("cheap", 1)]
    assert set(planner.split(some, [cost(50.0), cost()], 3.0).rounds) == {1}


class Time:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def walk(some, costs, seconds, factor):
    """Runs cases that take `factor` times what was expected; what ran, and the time it took."""
    now = Time()
    pacer = planner.Pacer(some, costs, now, now.now + seconds)
    ran = []
    for case, rounds in pacer:
        ran.append(case.name)
        now.now += factor * costs[some.index(case)].of(rounds)
    return ran, now.now - 100.0, [c.name for c in pacer.left_out]


def test_pacer_keeps_the_time_when_cases_take_longer():
    some = [Ranked(f"c{i}", rank=i % 2) for i in range(40)]
    ran, took, left = walk(some, [cost()] * 40, 84.0, factor=3.0)
    assert took <= 84.0 + 3 * 2.0
    assert set(ran) | set(left) == {c.name for c in some} and not set(ran) & set(left)
    # It notices within a few cases, and then gives up those of the higher rank.
    assert sum(int(name[1:]) % 2 for name in ran) <= 3
    assert len(ran) >= 12


def test_pacer_takes_cases_up_again_when_there_is_time():
    some = [Ranked(f"c{i}", rank=i % 2) for i in range(40)]
    ran, took, left = walk(some, [cost()] * 40, 60.0, factor=0.4)
    assert not left and len(ran) == 40 and took <= 60.0


def test_pacer_stops():
    assert walk([Ranked("a")], [cost(50.0)], 10.0, 1.0) == ([], 0.0, ["a"])
    assert walk([], [], 10.0, 1.0) == ([], 0.0, [])


def test_costs_follow_the_limits():
    limits = Limits(bf16_flops=600e12, copy_bytes=3e12, launch_s=2e-6)
    v3 = cases.MODELS["deepseek-v3"]
    small_case, large = a_case("forward", v3, 1), a_case("forward", v3, 32768)
    little, much = run.costs_of([small_case, large], limits, 1e-4)
    # 23.1 TFLOP at 600 T/s is 38.5 ms; twice that for each of five contenders, and a flush.
    assert much.round_s == pytest.approx(5 * (2 * 0.0385 + 1e-4), rel=0.01)
    # 705 MB at 3 TB/s.
    assert little.round_s == pytest.approx(5 * (2 * 0.000235 + 1e-4), rel=0.01)
    assert much.open_s == little.open_s == pytest.approx(22.5e9 / 100e9, rel=0.01)


def test_everything_fits_into_ten_minutes_on_a_hopper():
    """The plan for 15 models, on a card with the rates of an H100, leaves out little."""
    limits = Limits(bf16_flops=650e12, copy_bytes=2.8e12, launch_s=2e-6)
    wanted = [c for c in cases.all_cases() if c.dtype == "bf16"]
    plan = planner.split(wanted, run.costs_of(wanted, limits, 1e-4), 400.0)
    assert len(plan.rounds) >= 0.95 * len(wanted)
    assert all(wanted[i].rank > 0 for i in set(range(len(wanted))) - set(plan.rounds))
    assert plan.seconds <= 400.0


# ------------------------------------------------------------------------------- clock


def test_order_turns():
    assert ["".join(in_turns(list("abc"), i)) for i in range(4)] == ["abc", "bca", "cab", "abc"]
    assert in_turns([], 2) == []


def test_host_clock():
    calls = []
    clock = HostClock()
    jobs = {n: clock.prepare(lambda n=n: calls.append(n)) for n in "ab"}
    calls.clear()
    samples = clock.rounds(jobs, 3)
    assert "".join(calls) == "abbaab"
    assert all(len(s.seconds) == 3 and s.clean for s in samples.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Captures CUDA graphs: needs a card.")
def test_cuda_clock():
    from bench.gpu.clock import CudaClock

    clock = CudaClock()
    a = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    graph = clock.prepare(lambda: a @ a)
    waits = clock.prepare(lambda: (a @ a).sum().item())
    assert graph.graph and not waits.graph and waits.note
    samples = clock.rounds({"graph": graph, "waits": waits}, 5)
    assert 0 < samples["graph"].median < samples["waits"].median
    clock.release()


# ---------------------------------------------------------------------------- contenders


@pytest.fixture
def layer():
    case = a_case(T=33)
    device = torch.device("cpu")
    return Layer(case, Layer.open(case, device), device)


@pytest.fixture
def session():
    options = run.Options(seconds=5.0, tiny=True)
    return run.Session(options, HostClock(), Limits(1e12, 1e11, 1e-6), lambda line: None)


@pytest.mark.parametrize("part", [p for p in cases.PARTS if p not in cases.FP8])
def test_contenders_agree_with_the_reference(part, layer, session):
    case = replace(layer.case, part=part)
    make = block.block_problem if part in cases.BLOCK else ops.op_problem
    problem = make(case, layer, *([session.compiled] if part in cases.BLOCK else []))
    assert next(iter(problem.jobs)) == block.OURS
    assert len(problem.jobs) >= 2
    for name, job in problem.jobs.items():
        result = job()
        assert problem.check(result) <= problem.tolerance, name
    # A wrong result is seen.
    broken = [t.clone() for t in (result if isinstance(result, tuple) else (result,))]
    broken[0].view(-1)[0] += 2 if not broken[0].is_floating_point() else 100
    assert problem.check(tuple(broken) if len(broken) > 1 else broken[0]) > problem.tolerance


def test_block_is_checked_against_the_reference(layer):
    tokens, bank = layer.tokens, layer.bank
    arguments = (tokens.x, bank.w_gate_up, bank.w_down, tokens.topk_weights)
    exact = reference.moe_ffn(*(t.double() for t in arguments), tokens.topk_ids)
    problem = block.block_problem(layer.case, layer, lambda f: f)
    for name, job in problem.jobs.items():
        assert relative(job(), exact) <= problem.tolerance, name
    assert problem.check(exact) < 1e-12
    assert problem.check(exact * 1.1) > problem.tolerance


def test_batched_mm_is_for_few_tokens(layer):
    many = replace(layer.case, T=512)
    jobs = block.block_problem(many, Layer(many, layer.bank, layer.device), lambda f: f).jobs
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
    cell = run.measure_case(session, layer.case, layer, 0.01)
    assert block.LOOP in cell["skipped"] and block.OURS in cell["contenders"]
    assert cell["contenders"][block.GROUPED]["rounds"] >= planner.MIN_ROUNDS


def test_slow_contenders_are_not_repeated():
    def took(seconds):
        return run.Prepared(lambda: None, seconds)

    prepared = {block.OURS: took(0.001), "slow": took(0.02), "near": took(0.009)}
    assert run._slow_ones(prepared, 0.05) == ["slow"]
    assert run._slow_ones(prepared, 0.11) == []
    assert run._slow_ones({}, 1.0) == []


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
    """What a baseline of a card holds."""
    assert RESULT_KEYS <= set(result)
    assert (result["kind"], result["format"]) == ("gpu", run.FORMAT)
    assert {"bf16_flops", "copy_bytes", "launch_s", "fp8_flops"} == set(result["limits"])
    assert {"python", "torch", "moe_ops", "kernels"} <= set(result["versions"])
    assert isinstance(result["card"]["name"], str)
    assert all(isinstance(why, str) for why in result["absent"].values())
    assert result["cells"]
    for cell in result["cells"]:
        assert set(cell) == CELL_KEYS
        assert cell["part"] in cases.PARTS and cell["routing"] in cases.ROUTINGS
        assert cell["floor_us"] > 0 and cell["bytes"] > 0
        for name, found in cell["contenders"].items():
            assert {"us", "rounds", "error", "of_limit"} <= set(found)
            assert found["us"] > 0 and found["rounds"] >= 1 and found["error"] >= 0
            assert found["of_limit"] == pytest.approx(cell["floor_us"] / found["us"], rel=2e-3)
            assert ("ours_faster" in found) == (name != block.OURS)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "walk.json"
    arguments = ["--device", "cpu", "--dry-run", "--quick", "--json", str(path), "--models", "tiny"]
    code = main.main([*arguments, "--tokens", "1", "16"])
    return code, json.loads(path.read_text())


def test_walk_writes_a_whole_result(walked):
    code, result = walked
    assert code == 0
    check_schema(result)
    assert result["dry_run"] and result["complete"] and not result["left_out"]
    assert {c["part"] for c in result["cells"]} == set(cases.PARTS) - set(result["absent"])
    assert {(c["T"], c["routing"]) for c in result["cells"] if c["part"] == "forward"} == {
        (T, routing) for T in (1, 16) for routing in cases.ROUTINGS
    }
    assert all(not c["skipped"] and block.OURS in c["contenders"] for c in result["cells"])
    assert result["steps"]["small"]["status"] == "passed"


def test_walk_is_a_command(tmp_path):
    """As a user calls it; one part, so that it takes a few seconds."""
    path = tmp_path / "walk.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bench.gpu", "--device", "cpu", "--dry-run", "--quick"),
            *("--parts", "permute", "--no-tests", "--json", str(path)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "would run: make build MOE_OPS_CUDA=on" in done.stderr
    assert "permute" in done.stdout and "its times mean nothing" in done.stdout
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
        assert title in report.TITLES.values()
        assert header[:6] == ["model", "T", "routing", "floor", "moe_ops", "of limit"]
        assert rows and all(len(row) == len(header) for row in rows)
    text = report.markdown(result)
    for title in ("Goals", "Expert block, forward", "grouped_gemm_wgrad", "sort_slots"):
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
    contenders = {"moe_ops": {"us": us, "rounds": 5, "error": 0.0, "of_limit": 0.5}}
    for name, ratio in ours_faster.items():
        contenders[name.replace("_", " ")] = {"us": ratio * us, "ours_faster": ratio}
    return {"part": part, "shape": "m", "T": T, "routing": routing, "flops": flops} | {
        "contenders": contenders
    }


def test_goals():
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


def test_page_of_cards(walked, monkeypatch, tmp_path):
    monkeypatch.setattr(page, "BASELINES", tmp_path)
    assert page.cuda_page() == ""
    (tmp_path / "a-card.json").write_text(json.dumps(walked[1]))
    assert "### Expert block, forward" in page.cuda_page()
    assert "Expert block" not in page.page()


def test_baselines_of_cards_are_whole():
    for path in sorted((ROOT / "bench" / "baselines").glob("*.json")):
        result = json.loads(path.read_text())
        if result.get("kind") == "gpu":
            check_schema(result)
            assert not result["dry_run"], path


# -------------------------------------------------------------------------------- card


def test_name_of_the_file_of_a_card():
    assert card.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_clocks():
    lines = ["1980, 350.1, 45, 0x0", "1200, 699.0, 71, 0x4", "1980, 80.0, 40, 0x1", "?, 1, 2, 0x0"]
    samples = [card.parse_sample(line.split(", ")) for line in lines]
    assert samples[3] is None
    summary = card.summarize(samples[:3])
    assert summary["samples"] == 2  # idle does not count
    assert summary["sm_mhz"] == {"min": 1200, "median": 1590, "max": 1980}
    assert summary["note"] == "SM clock 1200 to 1980 MHz; power cap in 1 of 2 samples"
    assert "not throttled" in card.summarize(samples[:1])["note"]
    assert card.summarize([])["samples"] == 0


def test_limits_keep_the_better():
    a = Limits(1.0, 5.0, 3.0)
    b = Limits(2.0, 4.0, 2.0, 7.0)
    assert a.best(b) == Limits(2.0, 5.0, 2.0, 7.0)
    assert a.flops("fp8") == 1.0 and b.flops("fp8") == 7.0 and b.flops("bf16") == 2.0


# ------------------------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "bench.gpu needs an NVIDIA GPU, and this machine shows none"),
        (["--no-build"], "bench.gpu needs a CUDA device, and torch"),
        (["--device", "cpu"], "--device cpu is for walking through the benchmark only"),
    ],
)
def test_without_a_gpu_there_is_one_sentence(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(main, "gpu_device_files", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(words) and err.count("\n") == 1


def test_a_build_without_kernels_is_refused(monkeypatch, capsys):
    from moe_ops import _C

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda": "off"})
    assert main.main(["--no-build"]) == 1
    assert "is built without: leave --no-build out" in capsys.readouterr().err


def test_unknown_names_are_refused():
    options = main.parse(["--models", "gpt-5"])
    with pytest.raises(ValueError, match=r"--models must be of mixtral-8x7b, .*, got gpt-5"):
        main.chosen(options, 1.0)


def test_steps_leave_time_to_measure():
    """Of 590 s, with a build that takes as long as it may, and of 590 s without one."""
    for build in (True, False):
        left = 590.0
        for name in ("build", "tests", "memcheck", "racecheck"):
            if name != "build" or build:
                left -= main.SHARES[name] * left
        assert left >= (100 if build else 350)


def test_build_hands_over_to_the_environment(monkeypatch):
    class Gone(Exception):
        pass

    said = []

    def execv(path, arguments):
        said.append((path, arguments))
        raise Gone

    monkeypatch.setattr(main, "gpu_device_files", lambda: True)
    monkeypatch.setattr(main.os, "execv", execv)
    monkeypatch.setattr(main.os, "chdir", lambda path: None)
    monkeypatch.setattr(
        steps, "build", lambda limit_s: {"status": "passed", "text": "built", "seconds": limit_s}
    )
    with pytest.raises(Gone):
        main.main(["--quick", "--minutes", "5"])
    ((path, arguments),) = said
    assert path == str(steps.VENV_PYTHON)
    options = main.parse(arguments[3:])
    assert options.no_build and options.quick and options.minutes == 5
    build = json.loads(options.built)["build"]
    assert build["seconds"] == pytest.approx(0.7 * (5 * 60 - 10), abs=1)


def test_build_that_fails_ends_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(steps, "LOGS", tmp_path)
    monkeypatch.setattr(main, "gpu_device_files", lambda: True)
    command = [sys.executable, "-c", "print('no nvcc'); raise SystemExit(2)"]
    monkeypatch.setattr(steps, "build_command", lambda: command)
    assert main.main([]) == 1
    assert "make build failed: no nvcc" in capsys.readouterr().err


def test_a_step_ends_with_its_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "LOGS", tmp_path)
    monkeypatch.setattr(steps, "_GRACE_S", 0.5)
    sleeper = "import time\nprint('begun', flush=True)\ntime.sleep(60)"
    stubborn = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + sleeper
    for text in (sleeper, stubborn):
        status, seconds, log = steps.run_logged("s", [sys.executable, "-c", text], 2.0)
        assert status is None and seconds < 20
        assert "begun" in log.read_text()


@pytest.mark.parametrize(
    ("log", "counts"),
    [
        ("..\n812 passed, 3 skipped in 4.2s", {"passed": 812, "skipped": 3}),
        ("F.\n1 failed, 2 passed, 1 error in 1s\n", {"failed": 1, "passed": 2, "error": 1}),
        ("!! KeyboardInterrupt !!\n41 passed in 9.00s (0:00:09)", {"passed": 41}),
        ("2 errors in 1s", {"error": 2}),
        ("", {}),
    ],
)
def test_counts_of_pytest(log, counts):
    assert steps.test_counts(log) == counts


@pytest.mark.parametrize(
    ("text", "code", "status"),
    [
        ("3 passed in 1s", 0, "passed"),
        ("1 failed, 3 passed in 1s", 1, "failed"),
        ("no tests ran in 1s", 5, "failed"),
    ],
)
def test_op_tests(monkeypatch, tmp_path, text, code, status):
    monkeypatch.setattr(steps, "LOGS", tmp_path)
    command = [sys.executable, "-c", f"print({text!r}); raise SystemExit({code})"]
    monkeypatch.setattr(steps, "op_test_command", lambda python: command)
    assert steps.op_tests(30.0)["status"] == status


def test_op_tests_run_on_the_card():
    command = steps.op_test_command("python")
    assert command[command.index("--backend") + 1] == "cuda" and "tests/ops" in command


@pytest.mark.parametrize(
    ("text", "code", "status"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "passed"),
        ("========= ERROR SUMMARY: 3 errors", 86, "failed"),
        ("could not attach", 0, "failed"),
    ],
)
def test_sanitizer(monkeypatch, tmp_path, text, code, status):
    monkeypatch.setattr(steps, "LOGS", tmp_path)
    monkeypatch.setattr(steps, "find_sanitizer", lambda: "compute-sanitizer")
    command = [sys.executable, "-c", f"print({text!r}); raise SystemExit({code})"]
    monkeypatch.setattr(steps, "sanitizer_command", lambda python, tool, where: command)
    outcome = steps.sanitize("memcheck", 30.0)
    assert outcome["status"] == status
    if "SUMMARY" in text:
        assert outcome["text"] == text.removeprefix("========= ")


def test_sanitizer_that_is_not_there(monkeypatch):
    monkeypatch.setattr(steps, "find_sanitizer", lambda: None)
    assert steps.sanitize("memcheck", 30.0)["status"] == "skipped"


def test_small_selection_sees_a_wrong_op(monkeypatch):
    assert small.run("cpu") == []
    right = small.ops.grouped_gemm
    monkeypatch.setattr(small.ops, "grouped_gemm", lambda *a, **k: right(*a, **k) * 1.1)
    assert any(line.startswith("grouped_gemm bf16: error 1.0e-01") for line in small.run("cpu"))
