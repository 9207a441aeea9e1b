"""The benchmark for cards, without a card: cases, arithmetic, planner, clocks, steps."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from bench.gpu import card, cases, main, planner, run, small, steps
from bench.gpu.cases import Case
from bench.gpu.layer import Layer, Weights
from bench.gpu.limits import Limits
from bench.gpu.work import Work, work_of

from moe_ops.bench.shapes import Shape, flops

CPU = torch.device("cpu")
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
    for part in ("forward", "training", "grouped_gemm", "sort_by_expert"):
        assert {c.routing for c in every if c.part == part} == set(cases.USUAL_ROUTINGS)
    # Cases of a layer are together, so that its weights are made once.
    groups = [c.group for c in every]
    assert len([1 for a, b in itertools.pairwise(groups) if a != b]) == 2 * 15 - 1


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
    elif routing == "random":
        assert counts.max() > counts.min()
        assert counts.max() < 257 * shape.K / shape.E + 6 * (257 * shape.K / shape.E) ** 0.5
    else:
        # The favorite has more than its share, or most tokens where E is small.
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
    "sort_by_expert": (0, 4 * (12 + 6 + 12 + 12)),
    "permute": (0, 2 * (24 + 48) + 4 * 12),
    "unpermute": (0, 2 * (48 + 24) + 8 * 12),
    "gated_act": (0, 2 * (72 + 36)),
}
# H 256, I 128, E 4, K 2, T 3: N 6; 2 experts have tokens. Blocks of 128 by 128 of an expert: 4 in
# the up projection, 2 in the down projection.
BLOCKS = Shape("blocks", 256, 128, 4, 2)
FP8_WORK = {
    "forward_fp8": (
        2 * 6 * 3 * 256 * 128,
        2 * 98304 + 2 * 2 * 3 * 256 + 2 * 6 * 128 + 8 * 6 + 4 * (2 * 6 + 2 * 6),
    ),
    "grouped_gemm_fp8": (
        2 * 6 * 256 * 256,
        2 * 65536 + 6 * 256 + 2 * 6 * 256 + 4 * (2 * 4 + 6 * 2),
    ),
    "quantize_fp8": (0, 3 * 256 * 3 + 4 * 3 * 2),
}


@pytest.mark.parametrize("part", HAND_WORK)
def test_work_by_hand(part):
    assert work_of(a_case(part, HAND, 6), 4) == Work(*HAND_WORK[part])


@pytest.mark.parametrize("part", FP8_WORK)
def test_work_of_fp8_by_hand(part):
    assert set(FP8_WORK) == set(cases.FP8)
    assert work_of(Case(part, BLOCKS, 3, "balanced", "fp8"), 2) == Work(*FP8_WORK[part])


def test_work_counts_the_tensors_of_an_op():
    layer = Layer(a_case(T=6, shape=HAND), Weights(HAND, CPU), CPU)
    used = layer.tokens.experts_used

    def sizes(*tensors):
        return sum(t.nbytes for t in tensors)

    offsets, row_to_slot, slot_to_row = layer.sorted
    weights, up = layer.tokens.topk_weights, layer.bank.w_gate_up
    moved = {
        "permute": sizes(layer.tokens.x, layer.rows_h, row_to_slot),
        "unpermute": sizes(layer.rows_h, layer.tokens.x, slot_to_row, weights),
        "gated_act": sizes(layer.rows_2i, layer.rows_i),
        "sort_by_expert": sizes(layer.tokens.topk_ids, offsets, row_to_slot, slot_to_row),
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
    """The part of a case that the planner looks at."""

    name: str
    rank: int = 0
    group: tuple[str, str] = ("a", "bf16")

    def __hash__(self):
        return hash(self.name)


def cost(setup_s=0.1, round_s=0.02, open_s=0.0):
    return planner.Cost(setup_s, round_s, open_s)


def test_split_shares_what_is_left():
    # Each needs 0.1 + 5 x 0.02 = 0.2 s; 25 rounds would be 0.6 s.
    two = [Ranked("a"), Ranked("b")]

    def plan(rounds, seconds):
        return planner.Plan({0: rounds, 1: rounds}, pytest.approx(seconds))

    assert planner.split(two, [cost()] * 2, 0.401) == plan(5, 0.4)
    assert planner.split(two, [cost()] * 2, 0.801) == plan(15, 0.8)
    assert planner.split(two, [cost()] * 2, 9.9) == plan(25, 1.2)


def test_split_takes_by_rank_and_opens_a_group_once():
    some = [Ranked("late", 2), Ranked("first", 0), Ranked("next", 1), Ranked("other", 0, ("b", ""))]
    costs = [cost(open_s=0.3)] * 4
    # first 0.2 + 0.3, other 0.2 + 0.3, next 0.2, late 0.2.
    assert set(planner.split(some, costs, 1.41).rounds) == {0, 1, 2, 3}
    assert set(planner.split(some, costs, 1.39).rounds) == {1, 2, 3}
    assert set(planner.split(some, costs, 1.19).rounds) == {1, 3}
    assert set(planner.split(some, costs, 0.69).rounds) == {1}
    assert set(planner.split(some, costs, 0.91, opened=[("a", "bf16")]).rounds) == {1, 2, 3}
    assert planner.split(some, costs, 0.05) == planner.Plan({}, 0.0)


def test_split_takes_layers_in_turn():
    """Six cases of two layers, room for two: one of each."""
    some = [Ranked(f"{group}{i}", 0, (group, "bf16")) for group in "ab" for i in range(3)]
    assert set(planner.split(some, [cost()] * 6, 0.45).rounds) == {0, 3}


def test_split_repeats_long_rounds_less():
    assert planner.split([Ranked("a")], [cost(1.0, 0.2)], 1.7).rounds == {0: 3}  # 1 + 3 x 0.2
    assert planner.split([Ranked("a")], [cost(1.0, 0.09)], 1.4).rounds == {}  # 1 + 5 x 0.09
    two = planner.split([Ranked("a"), Ranked("b")], [cost(1.0, 0.2), cost()], 99.0)
    assert two.rounds == {0: 25, 1: 25}


def test_split_goes_on_to_cheaper_cases():
    some = [Ranked("dear", 0), Ranked("cheap", 1)]
    assert set(planner.split(some, [cost(5.0), cost()], 0.3).rounds) == {1}


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
    costs = [cost(1.0, 0.05)] * 40  # 1.25 to 2.25 s
    ran, took, left = walk(some, costs, 60.0, factor=3.0)
    assert took <= 60.0 + 3 * 2.25
    assert set(ran) | set(left) == {c.name for c in some} and not set(ran) & set(left)
    # It notices within a few cases, and then gives up those of the higher rank.
    assert sum(int(name[1:]) % 2 for name in ran) <= 3
    assert len(ran) >= 12


def test_pacer_takes_cases_up_again_when_there_is_time():
    some = [Ranked(f"c{i}", rank=i % 2) for i in range(40)]
    ran, took, left = walk(some, [cost(1.0, 0.05)] * 40, 35.0, factor=0.4)
    assert not left and len(ran) == 40 and took <= 35.0


def test_pacer_stops():
    assert walk([Ranked("a")], [cost(50.0)], 10.0, 1.0) == ([], 0.0, ["a"])
    assert walk([], [], 10.0, 1.0) == ([], 0.0, [])


def test_costs_follow_the_limits():
    limits = Limits(bf16_flops=600e12, copy_bytes=3e12, launch_s=2e-6)
    v3 = cases.MODELS["deepseek-v3"]
    small_case, large = a_case("forward", v3, 1), a_case("forward", v3, 32768)
    little, much = run.costs_of([small_case, large], limits, 1e-4)
    # 23.1 TFLOP at 600 T/s is 38.5 ms; twice that for each of five baselines, and a flush.
    assert much.round_s == pytest.approx(5 * (2 * 0.0385 + 1e-4), rel=0.01)
    # 705 MB at 3 TB/s.
    assert little.round_s == pytest.approx(5 * (2 * 0.000235 + 1e-4), rel=0.01)
    assert much.open_s == little.open_s == pytest.approx(22.5e9 / 100e9, rel=0.01)


def test_everything_fits_into_ten_minutes_on_a_hopper():
    """The plan for 15 models, on a card with the rates of an H100, leaves out little."""
    limits = Limits(bf16_flops=650e12, copy_bytes=2.8e12, launch_s=2e-6)
    wanted = cases.all_cases()
    plan = planner.split(wanted, run.costs_of(wanted, limits, 1e-4), 400.0)
    assert len(plan.rounds) >= 0.95 * len(wanted)
    assert all(wanted[i].rank > 0 for i in set(range(len(wanted))) - set(plan.rounds))
    assert plan.seconds <= 400.0


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
    from moe_ops import _library

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_library, "build_info", lambda: {"cuda": "off"})
    assert main.main(["--no-build"]) == 1
    assert "is built without: leave --no-build out" in capsys.readouterr().err


def test_unknown_names_are_refused():
    options = main.parse(["--models", "gpt-5"])
    with pytest.raises(ValueError, match=r"--models must be of mixtral-8x7b, .*, got gpt-5"):
        main.chosen(options, 1.0)


def test_steps_leave_time_to_measure():
    """The steps leave time to measure of 590 s, with a build that takes as long as it may, and
    without one."""
    for build in (True, False):
        left = 590.0
        for name in ("build", "tests", "memcheck", "racecheck"):
            if name != "build" or build:
                left -= main.SHARES[name] * left
        assert left >= (90 if build else 310)


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
    wait = subprocess.Popen.wait

    def wait_for_the_first_line(process, timeout=None):
        """The limit counts from there: when a process begins depends on what the machine does."""
        log = tmp_path / "s.log"
        while timeout == 2.0 and log.stat().st_size == 0 and process.poll() is None:
            time.sleep(0.01)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_the_first_line)
    sleeper = "import time\nprint('begun', flush=True)\ntime.sleep(3600)"
    stubborn = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + sleeper
    for text in (sleeper, stubborn):
        status, seconds, log = steps.run_logged("s", [sys.executable, "-c", text], 2.0)
        assert status is None and seconds < 3600
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
    wrong = small.run("cpu")
    for name in ("grouped_gemm", "grouped_gemm, odd sizes"):
        assert any(line.startswith(f"{name} bf16: error 1.0e-01") for line in wrong)
