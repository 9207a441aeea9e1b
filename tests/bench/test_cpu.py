"""The benchmark: its clock, its arithmetic, its checks, what it writes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import moe_ops
from moe_ops import _C, reference
from moe_ops.bench import (
    contenders,
    forward,
    goals,
    main,
    memory,
    parts,
    report,
    session,
    timing,
    training,
)
from moe_ops.bench.limits import Limits, measure_limits
from moe_ops.bench.run import FORMAT, join, rounded, run
from moe_ops.bench.session import Plan, relative_error
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

ROOT = Path(__file__).parents[1]
TINY = Shape("tiny", H=64, I=96, E=5, K=2, like="a toy")
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
PLAN = Plan(
    modes=("forward", "training", "scaling", "parts"),
    shapes=("tiny",),
    quantized_shapes=("tiny",),
    training_shapes=("tiny",),
    tokens=(1, 16),
    training_tokens=(16,),
    part_tokens=(4,),
    thp=False,
    budget_s=0.01,
    limit_s=0.01,
)


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)


# ----------------------------------------------------------------------------------- timing


class Clock:
    """Time that passes only when a job says so; `waits` is what the kernel would count."""

    def __init__(self, monkeypatch):
        self.now = self.waits = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(timing, "waited_s", lambda: self.waits)

    def job(self, name, seconds):
        def call():
            self.calls.append(name)
            self.now += seconds

        return call


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_order_turns_with_the_rounds(clock):
    jobs = {name: clock.job(name, 0.1) for name in "abc"}
    timing.alternate(jobs, budget_s=0.0, min_rounds=3, max_rounds=3)
    assert "".join(clock.calls) == "aabbcc" + "abc" + "bca" + "cab"


def test_medians_and_ratios(clock):
    jobs = {"ours": clock.job("ours", 0.02), "other": clock.job("other", 0.05)}
    samples = timing.alternate(jobs, budget_s=1.0)
    assert samples["ours"].median == pytest.approx(0.02)
    assert timing.speedup(samples, "ours", "other") == pytest.approx(2.5)
    assert samples["ours"].to_dict().keys() == {"ms", "rounds"}


def test_ratio_is_of_samples_of_the_same_round():
    # The machine is twice as slow in rounds 1 and 2; `other` has no clean sample in round 0.
    ours = timing.Samples({0: 1.0, 1: 2.0, 2: 2.0, 3: 1.0})
    other = timing.Samples({1: 6.0, 2: 6.0, 3: 3.0})
    assert timing.speedup({"ours": ours, "other": other}, "ours", "other") == pytest.approx(3.0)


def test_a_sample_that_waited_is_repeated_and_then_left_out(clock):
    count = 0

    def job():
        nonlocal count
        count += 1
        clock.now += 0.2
        # Two warm-up calls, then rounds: round 1 waits once, round 3 twice.
        if count in (4, 7, 8):
            clock.now += 0.5
            clock.waits += 0.5

    samples = timing.alternate({"job": job}, budget_s=0.0, min_rounds=4, max_rounds=4)["job"]
    assert sorted(samples.seconds) == [0, 1, 2]
    assert sorted(samples.waited) == [3]
    assert samples.clean and samples.median == pytest.approx(0.2)


def test_without_three_clean_samples_all_count_and_the_cell_is_marked():
    samples = timing.Samples({0: 1.0}, {1: 3.0, 2: 5.0})
    assert not samples.clean
    assert samples.median == 3.0
    assert samples.to_dict() == {"ms": 3000.0, "rounds": 3, "waited": 2, "noisy": True}


def test_a_slow_job_runs_twice(clock):
    jobs = {"slow": clock.job("slow", 9.0), "fast": clock.job("fast", 0.1)}
    samples = timing.alternate(jobs, budget_s=0.5, slow_s=6.0)
    assert clock.calls.count("slow") == 2
    assert samples["slow"].median == 9.0 and samples["slow"].clean
    assert len(samples["fast"].seconds) >= 3


@pytest.mark.parametrize(("first", "warm_up"), [(0.1, 1), (1.0, 0), (7.0, 1)])
def test_a_known_first_call_may_save_the_second(clock, first, warm_up):
    jobs = {"job": clock.job("job", 1.0)}
    samples = timing.alternate(jobs, budget_s=0.0, max_rounds=3, first_s={"job": first})
    assert len(clock.calls) == warm_up + 3
    assert samples["job"].median == pytest.approx(1.0)


def test_fast_jobs_repeat_within_a_sample(clock):
    samples = timing.alternate({"job": clock.job("job", 1e-3)}, budget_s=0.0, max_rounds=3)
    assert len(clock.calls) == 2 + 3 * (1 + 10)
    assert samples["job"].median == pytest.approx(1e-3)


def test_a_short_job_does_not_pay_for_what_the_one_before_left_in_caches(clock):
    def job(name, seconds):
        def call():
            cold = clock.calls[-1:] != [name]
            clock.calls.append(name)
            clock.now += (3 if cold else 1) * seconds

        return call

    jobs = {"short": job("short", 0.006), "long": job("long", 0.1)}
    samples = timing.alternate(jobs, budget_s=0.0, max_rounds=3)
    assert samples["short"].median == pytest.approx(0.006)
    assert samples["long"].median == pytest.approx(0.3)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="no schedstat here")
def test_waiting_only_grows():
    before = timing.waited_s()
    assert 0 <= before <= timing.waited_s()


# ---------------------------------------------------------------------------------- limits


def test_limits_are_plausible():
    limits = measure_limits(seconds=0.02, buffer_bytes=8 << 20)
    assert limits.isa == _C.cpu_isa()
    assert 1e9 < limits.fp32_flops < 1e12
    assert 1e9 < limits.bf16_flops < 1e13
    assert 1e8 < limits.read_bytes < 1e13
    assert set(limits.cached_bytes) == {n << 19 for n in (1, 2, 3, 4, 6, 8)}
    assert all(1e8 < rate < 1e13 for rate in limits.cached_bytes.values())
    assert Limits.from_dict(json.loads(json.dumps(limits.to_dict()))) == limits


def test_an_fma_loop_beats_a_torch_product(set_threads):
    """A limit that a product exceeds would be none; 10 % for the clock's ups and downs. The best of
    many measurements, since another process can slow any one of them down."""
    if _C.cpu_isa() != _C.detected_isa():
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


# ----------------------------------------------------------------------- layers and contenders


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
def test_builtin_contenders_compute_the_layer(weight_format):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[weight_format]
    bank, tokens = make_bank(TINY, dtype), make_tokens(TINY, dtype, 33)
    truth = exact_output(bank, tokens, torch.arange(33))
    for contender in contenders.builtin_contenders():
        if weight_format in contender.formats and contender.missing() is None:
            with torch.no_grad():
                y = contender.prepare(bank, weight_format)(tokens)()
            error = relative_error(y, truth)
            assert error <= contenders.tolerance(weight_format), contender.name


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_within_half_a_step(bits):
    w = torch.randn(3, 8, 64)
    w[1, 2] = 0
    if bits == 8:
        q, scales = contenders.quantize_int8(w)
        values, step = q.float() * scales[..., None], scales[..., None].abs().expand(w.shape)
    else:
        q, scales = contenders.quantize_int4(w)
        codes = torch.stack([q & 15, q >> 4], -1).flatten(-2).float() - 8
        step = scales.abs().repeat_interleave(INT4_GROUP, -1)
        values = codes * scales.repeat_interleave(INT4_GROUP, -1)
    # The end of the int4 range away from the largest weight has one step less: 7 of 8.
    allowed = 0.5 if bits == 8 else 1.0
    assert ((values - w).abs() <= allowed * step * 1.0001).all()
    assert (values[1, 2] == 0).all()


def test_take_is_the_start_of_the_batch():
    tokens = make_tokens(TINY, torch.float32, 20)
    few = take(tokens, 3)
    assert few.count == 3 and torch.equal(few.topk_ids, tokens.topk_ids[:3])


# --------------------------------------------------------------------------------- training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_steps_agree_with_fp64(dtype):
    bank, tokens = make_bank(TINY, dtype), make_tokens(TINY, dtype, 20)
    grad_y = torch.randn(20, TINY.H).to(dtype)
    leaves = [t.double().requires_grad_() for t in (tokens.x, bank.w_gate_up, bank.w_down)]
    reference.moe_ffn(*leaves, tokens.topk_weights, tokens.topk_ids).backward(grad_y.double())
    exact = dict(zip(("x", "w_gate_up", "w_down"), [leaf.grad for leaf in leaves], strict=True))
    torch.testing.assert_close(
        training.exact_grad_x(bank, tokens, grad_y), exact["x"], rtol=1e-10, atol=1e-10
    )
    bound = 1e-5 if dtype == torch.float32 else 0.03
    for name, step in training.steps(bank, tokens, grad_y).items():
        gradients = {key: value.clone() for key, value in step().items()}
        step()  # A second step must not disturb what the first returned.
        for key, value in exact.items():
            assert relative_error(gradients[key], value) <= bound, (name, key)


def test_memory_of_a_step(monkeypatch):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs here")
    monkeypatch.setattr(memory, "CONTENDERS", ("moe_ops", "no such contender"))
    root = str(Path(moe_ops.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", root)
    result = memory.measure_memory("d", "fp32", 512)
    # Rows of x, pre-activations and h of 1024 slots are 6 MiB; a whole copy of the weights 24.
    assert 0 < result["mib"]["moe_ops"] < 60
    assert "no such contender" in result["skipped"]


# ------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def result():
    SHAPES["tiny"] = TINY
    yield run(PLAN)
    del SHAPES["tiny"]


def test_result_has_the_documented_fields(result):
    assert result["format"] == FORMAT
    assert {"cpu", "cores", "caches", "memory_gib", "system"} <= result["machine"].keys()
    assert {"python", "torch", "torch-moe-ops"} <= result["versions"].keys()
    assert result["isa"] == result["limits"]["isa"] == _C.cpu_isa()
    assert len(result["forward"]) == 4  # Two formats, two numbers of tokens.
    for mode in ("forward", "training"):
        for cell in result[mode]:
            ours = cell["contenders"][cell["ours"]]
            assert ours["ms"] > 0 and "ours_faster" not in ours
            assert ours["of_limit"] == pytest.approx(cell["floor_ms"] / ours["ms"], rel=0.01)
            for name, contender in cell["contenders"].items():
                assert contender["error"] <= 2 * contenders.tolerance(cell["weights"])
                assert name == cell["ours"] or contender["ours_faster"] > 0
    if HAS_TRANSFORMERS:
        assert "HF grouped_mm" in result["forward"][0]["contenders"]
    assert {cell["part"] for cell in result["parts"]} == set(parts.PARTS)
    assert json.loads(main.dumps(result)) == result


def test_numbers_are_rounded(result):
    assert rounded({"a": [1.23456789]}) == {"a": [1.235]}
    rate = result["limits"]["read_bytes"]
    assert rate == float(f"{rate:.4g}")


def test_report_shows_every_cell(result):
    text = report.render(result)
    for title in ("Goals", "Forward", "Forward and backward", "Two threads", "Router"):
        assert f"### {title}" in text
    forward_rows = [line for line in text.splitlines() if line.startswith("| tiny ")]
    assert len(forward_rows) >= 4 + 2
    # Every line of a table has as many cells as its head.
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_runs_of_parts_join_to_the_whole(result):
    limits = {**result["limits"], "read_bytes": 1e13, "fp32_flops": 1e15}
    faster = {**result, "limits": limits}
    half = {k: v for k, v in faster.items() if k not in ("training", "scaling", "parts")}
    other = {k: v for k, v in result.items() if k != "forward"}
    joined = join([half, other])
    assert {m: len(joined[m]) for m in ("forward", "training", "scaling", "parts")} == {
        m: len(result[m]) for m in ("forward", "training", "scaling", "parts")
    }
    assert joined["limits"]["read_bytes"] == 1e13
    # The larger limits count for every cell: shares shrink.
    for before, after in zip(result["forward"], joined["forward"], strict=True):
        assert after["floor_ms"] < before["floor_ms"]
    with pytest.raises(ValueError, match="isa must be the same"):
        join([half, {**other, "isa": "another"}])


class Wrong(contenders.MoeOps):
    name = "wrong"

    def prepare(self, bank, weight_format):
        bind = super().prepare(bank, weight_format)
        return lambda tokens: lambda: bind(tokens)() * 1.1


class Broken(contenders.MoeOps):
    name = "broken"

    def prepare(self, bank, weight_format):
        raise RuntimeError("no kernel\nand a long story")


class Absent(contenders.MoeOps):
    name = "absent"

    def missing(self):
        return "absent is not installed"


def test_wrong_broken_and_absent_contenders_are_reported():
    plan = replace(PLAN, modes=("forward",), formats=("fp32",), tokens=(16,))
    result = run(plan, contenders=[Wrong(), Broken(), Absent()])
    (cell,) = result["forward"]
    assert cell["skipped"]["wrong"].startswith("wrong: relative error 1.0e-01")
    assert cell["skipped"]["broken"] == "RuntimeError: no kernel"
    assert not {"wrong", "broken", "absent"} & cell["contenders"].keys()
    assert result["absent"]["absent"] == "absent is not installed"
    text = report.render(result)
    assert "- broken: RuntimeError: no kernel (tiny fp32 T=16)." in text
    assert "- absent: absent is not installed." in text


def test_what_would_take_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(forward, "TOO_SLOW_S", 0.0)
    monkeypatch.setattr(session, "STEADY_S", 0.0)
    plan = replace(PLAN, modes=("forward",), formats=("fp32",), only=("per-expert mm",))
    first, second = run(plan)["forward"]
    assert "per-expert mm" in first["contenders"]
    assert "would take about" in second["skipped"]["per-expert mm"]


def test_checked_rows_are_inside():
    for T in (1, 2, 15, 16, 17, 512):
        rows = forward.checked_rows(T)
        assert rows[0] == 0 and rows[-1] == T - 1 and len(set(rows)) == len(rows)


# ------------------------------------------------------------------------------------- goals


def cell_of(T, ours_of_limit, **others):
    ours = {"moe_ops packed": {"ms": 1.0, "of_limit": ours_of_limit, "error": 1e-6}}
    peers = {name: {"ms": ratio, "ours_faster": ratio} for name, ratio in others.items()}
    cell = {"mode": "forward", "shape": "a32", "weights": "fp32", "T": T}
    return cell | {"ours": "moe_ops packed", "contenders": ours | peers, "skipped": {}}


def test_verdicts_name_the_worst_cell():
    cells = [cell_of(1, 0.95, quick=1.1, slow=3.0), cell_of(4, 0.85, quick=0.9, slow=2.0)]
    found = {(v.goal, v.must): v for v in goals.verdicts({"forward": cells})}
    best = found["fp32 forward, T 1 to 4", "1.00x best peer"]
    assert (best.worst, best.where, best.met) == ("0.90x", "a32 fp32 T=4", False)
    limit = found["fp32 forward, T 1 to 4", "90% of the limit"]
    assert limit.worst == "85%" and limit.missing == ("a32 fp32 T=4 85%",)
    assert found["fp32 error", "at most 2.0e-06"].met
    assert found["fp32 forward, T 16 to 64", "1.20x best peer"].worst is None


def test_verdicts_say_what_the_limit_allows():
    def verdict(*cells):
        found = {(v.goal, v.must): v for v in goals.verdicts({"forward": cells})}
        return found["fp32 forward, T 1 to 4", "1.40x HF grouped_mm"]

    near = cell_of(1, 0.96, **{goals.HF: 1.2})
    assert verdict(near).at_limit == "1.25x" and verdict(near).out_of_reach
    cached = cell_of(1, 1.5, **{goals.HF: 1.2})  # Above the limit: from a cache.
    assert verdict(cached).at_limit is None and not verdict(cached).out_of_reach
    far = cell_of(4, 0.80, **{goals.HF: 1.3})
    assert not verdict(near, far).out_of_reach and not verdict(near, far).met
    good = cell_of(2, 0.5, **{goals.HF: 1.4})
    assert verdict(good).met and not verdict(good).out_of_reach
    assert verdict(near, good).out_of_reach


def test_parts_are_judged_by_the_fastest_torch_form():
    cells = [{"part": "sort", "T": 1, "speedup": {"a": 12.0, "b": 400.0}}]
    found = {v.goal: v for v in goals.verdicts({"parts": cells})}
    assert found["sort"].worst == "12.00x" and found["sort"].met


# ------------------------------------------------------------------------------- command line


def test_cli_quick(monkeypatch):
    monkeypatch.setattr(main, "QUICK", replace(PLAN, modes=("forward", "parts")))
    outcome = CliRunner().invoke(app, ["bench", "--quick"])
    assert outcome.exit_code == 0, outcome.output
    assert "### Forward" in outcome.output and "tiny" in outcome.output


def test_cli_json(monkeypatch):
    monkeypatch.setattr(main, "QUICK", replace(PLAN, modes=("parts",)))
    outcome = CliRunner().invoke(app, ["bench", "--quick", "--json"])
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout)["parts"]


def test_options_change_the_plan():
    options = main.parse(
        ["--all", "--shapes", "d", "--tokens", "8", "--weights", "bf16", "--threads", "2"]
    )
    plan = main.plan_of(options)
    assert plan.shapes == plan.training_shapes == ("d",)
    assert plan.tokens == plan.training_tokens == (8,)
    assert plan.formats == ("bf16",) and plan.threads == 2
    assert main.plan_of(main.parse(["--all"])) == Plan()


def test_files_and_rendering_again(tmp_path):
    files = tmp_path / "r.json", tmp_path / "r.md", tmp_path / "again.md"
    arguments = ["--quick", "--shapes", "tiny", "--modes", "forward", "--tokens", "2"]
    # argparse has the names of the shapes that were there when it was asked.
    main.main(
        [*arguments, "--budget", "0.01", "--json", str(files[0]), "--markdown", str(files[1])]
    )
    main.main(["--render", str(files[0]), "--markdown", str(files[2])])
    assert files[1].read_text() == files[2].read_text()
    assert "tiny" in files[1].read_text()


@pytest.mark.skipif("avx2" not in _C.supported_isas(), reason="no AVX2 here")
def test_isa_restarts_the_command(monkeypatch):
    """The kernels, torch and oneDNN read these when they are loaded, so a new process is needed."""
    monkeypatch.setenv("PYTHONPATH", str(Path(moe_ops.__file__).parents[1]))
    monkeypatch.delenv("MOE_OPS_CPU_ISA", raising=False)
    command = "--quick --modes parts --tokens 1 --budget 0.01 --isa avx2 --json -".split()
    child = subprocess.run(
        [sys.executable, "-m", "moe_ops.bench", *command], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout)["isa"] == "avx2"


# ------------------------------------------------------------------- the tree's own peers


@pytest.fixture
def peers(monkeypatch):
    if not (ROOT / "bench" / "peers").is_dir():
        pytest.skip("No source tree here.")
    monkeypatch.syspath_prepend(str(ROOT))
    for name in [name for name in sys.modules if name == "bench" or name.startswith("bench.")]:
        monkeypatch.delitem(sys.modules, name)
    from bench.peers import PEERS

    return PEERS


def test_peers_say_why_they_are_absent(peers):
    names = [peer.name for peer in peers]
    assert len(set(names)) == len(names)
    for peer in peers:
        why = peer.missing()
        assert why is None or peer.package.split("-")[0] in why or "torch" in why
        assert set(peer.formats) <= {"fp32", "bf16", "int8", "int4"}


def test_installed_peers_compute_the_layer(peers):
    """Only where somebody has installed them; ONNX Runtime's int4 needs whole groups of 128."""
    shape = Shape("peers", H=256, I=256, E=4, K=2)
    for peer in peers:
        if peer.missing() is not None:
            continue
        for weight_format in peer.formats:
            dtype = torch.float32 if weight_format == "fp32" else torch.bfloat16
            bank, tokens = make_bank(shape, dtype), make_tokens(shape, dtype, 24)
            y = peer.prepare(bank, weight_format)(tokens)()
            error = relative_error(y, exact_output(bank, tokens, torch.arange(24)))
            assert error <= contenders.tolerance(weight_format), peer.name


def test_performance_page_is_what_the_baselines_say():
    page, baselines = ROOT / "docs" / "performance.md", ROOT / "bench" / "baselines"
    if not page.exists():
        pytest.skip("No page yet.")
    results = [json.loads(path.read_text()) for path in sorted(baselines.glob("*.json"))]
    results = [result for result in results if result.get("kind") != "gpu"]
    assert results
    text = page.read_text()
    for result in results:
        assert result["format"] == FORMAT
        assert report.render(result) in text
