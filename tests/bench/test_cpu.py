"""The benchmark of the source tree on a CPU: modes, targets, peers, recorded results."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench.cpu import kept, main, memory, parts, report, targets
from bench.cpu.quantized import MoeOpsQuantized
from bench.cpu.run import Plan, join, limits_of, run
from bench.harness import dump, machine
from bench.harness.files import RESULTS, dumps, rounded
from bench.peers import PEERS

import moe_ops
from moe_ops import _library
from moe_ops.bench import baselines
from moe_ops.bench.measure import FORMAT, relative_error
from moe_ops.bench.shapes import SHAPES, Shape, exact_output, make_bank, make_tokens

TINY = Shape("tiny", H=64, I=96, E=5, K=2, like="a toy")
PLAN = Plan(
    modes=("forward", "quantized", "training", "scaling", "parts"),
    shapes=("tiny",),
    quantized_shapes=("tiny",),
    formats=("fp32",),
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


# --- runs


def test_memory_of_a_step(monkeypatch):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs here")
    monkeypatch.setattr(memory, "BASELINES", ("moe_ops", "no such baseline"))
    root = str(Path(moe_ops.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", root)
    result = memory.measure_memory("d", "fp32", 512)
    # Rows of x, pre-activations and h of 1024 slots are 6 MiB; a whole copy of the weights 24.
    assert 0 < result["mib"]["moe_ops"] < 60
    assert "no such baseline" in result["skipped"]


@pytest.fixture(scope="module")
def result():
    SHAPES["tiny"] = TINY
    yield run(PLAN)
    del SHAPES["tiny"]


def test_every_part_is_measured(result):
    assert {cell["part"] for cell in result["parts"]} == set(parts.PARTS)
    assert json.loads(dumps(result)) == result
    assert {"cpu", "cores", "caches", "memory_gib", "system"} <= result["machine"].keys()
    assert {"python", "torch", "torch-moe-ops"} <= result["versions"].keys()
    assert {cell["weights"] for cell in result["quantized"]} == set(MoeOpsQuantized.formats)
    assert {cell["thp"] for cell in result["training"]} == {False}
    assert {cell["mode"] for cell in result["scaling"]} <= {"forward", "training"}


def test_numbers_are_rounded(result):
    assert rounded({"a": [1.23456789]}) == {"a": [1.235]}
    rate = result["limits"]["read_bytes"]
    assert rate == float(f"{rate:.4g}")
    assert limits_of(json.loads(json.dumps(result))).to_dict() == result["limits"]


def test_kept_gradients_agree_with_fresh_ones():
    bank, tokens = make_bank(TINY, torch.float32), make_tokens(TINY, torch.float32, 20)
    grad_y = torch.randn(20, TINY.H)
    fresh = kept.TIMED["moe_ops"](bank, tokens, grad_y)()
    for name, make in kept.MEASURED.items():
        if (
            name not in baselines.skipped_steps()
            and "HF grouped_mm" not in baselines.skipped_steps()
        ):
            found = make(bank, tokens, grad_y)()
            for key, value in fresh.items():
                assert relative_error(found[key], value) <= 1e-5, (name, key)


def test_report_shows_every_cell(result):
    text = report.render(result)
    for title in (
        "Targets",
        "Forward",
        "Forward, all times",
        "Forward and backward",
        "Two threads",
        "Router",
    ):
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


@pytest.mark.parametrize("weight_format", MoeOpsQuantized.formats)
def test_quantized_baseline_computes_the_layer(weight_format):
    bank, tokens = make_bank(TINY, torch.bfloat16), make_tokens(TINY, torch.bfloat16, 33)
    y = MoeOpsQuantized().prepare(bank, weight_format)(tokens)()
    error = relative_error(y, exact_output(bank, tokens, torch.arange(33)))
    assert error <= baselines.tolerance(weight_format)


# --- targets


def cell_of(T, ours_of_limit, **others):
    ours = {"moe_ops packed": {"ms": 1.0, "of_limit": ours_of_limit, "error": 1e-6}}
    peers = {name: {"ms": ratio, "ours_faster": ratio} for name, ratio in others.items()}
    cell = {"mode": "forward", "shape": "a32", "weights": "fp32", "T": T}
    return cell | {"ours": "moe_ops packed", "contenders": ours | peers, "skipped": {}}


def test_verdicts_name_the_worst_cell():
    cells = [cell_of(1, 0.95, quick=1.1, slow=3.0), cell_of(4, 0.85, quick=0.9, slow=2.0)]
    found = {(v.target, v.must): v for v in targets.verdicts({"forward": cells})}
    best = found["fp32 forward, T 1 to 4", "1.00x best peer"]
    assert (best.worst, best.where, best.met) == ("0.90x", "a32 fp32 T=4", False)
    limit = found["fp32 forward, T 1 to 4", "90% of the limit"]
    assert limit.worst == "85%" and limit.missing == ("a32 fp32 T=4 85%",)
    assert found["fp32 error", "at most 2.0e-06"].met
    assert found["fp32 forward, T 16 to 64", "1.20x best peer"].worst is None


def test_verdicts_say_what_the_limit_allows():
    def verdict(*cells):
        found = {(v.target, v.must): v for v in targets.verdicts({"forward": cells})}
        return found["fp32 forward, T 1 to 4", "1.40x HF grouped_mm"]

    near = cell_of(1, 0.96, **{targets.HF: 1.2})
    assert verdict(near).at_limit == "1.25x" and verdict(near).out_of_reach
    cached = cell_of(1, 1.5, **{targets.HF: 1.2})  # Above the limit: from a cache.
    assert verdict(cached).at_limit is None and not verdict(cached).out_of_reach
    far = cell_of(4, 0.80, **{targets.HF: 1.3})
    assert not verdict(near, far).out_of_reach and not verdict(near, far).met
    good = cell_of(2, 0.5, **{targets.HF: 1.4})
    assert verdict(good).met and not verdict(good).out_of_reach
    assert verdict(near, good).out_of_reach


def test_parts_are_judged_by_the_fastest_torch_form():
    cells = [{"part": "sort", "T": 1, "speedup": {"a": 12.0, "b": 400.0}}]
    found = {v.target: v for v in targets.verdicts({"parts": cells})}
    assert found["sort"].worst == "12.00x" and found["sort"].met


# --- command line


def test_options_change_the_plan():
    options = main.parse(["--all", "--shapes", "d", "--tokens", "8"])
    plan = main.plan_of(options)
    assert plan.shapes == plan.training_shapes == plan.memory_shapes == ("d",)
    assert plan.tokens == plan.training_tokens == plan.part_tokens == (8,)
    options = main.parse(["--weights", "bf16", "--threads", "2", "--modes", "parts"])
    plan = main.plan_of(options)
    assert plan.formats == ("bf16",) and plan.threads == 2 and plan.modes == ("parts",)
    assert main.plan_of(main.parse(["--all"])) == Plan()
    assert main.plan_of(main.parse(["--quick"])) == main.QUICK


def test_files_and_rendering_again(tmp_path, monkeypatch):
    monkeypatch.setattr(main, "QUICK", replace(PLAN, modes=("parts",)))
    files = tmp_path / "r.json", tmp_path / "r.md", tmp_path / "again.md"
    main.main(["--quick", "--json", str(files[0]), "--markdown", str(files[1])], baselines=())
    main.main(["--render", str(files[0]), "--markdown", str(files[2])])
    assert files[1].read_text() == files[2].read_text()
    assert "| router" in files[1].read_text()


def test_ranges(capsys):
    for arguments, word in (
        (["--threads", "100000000"], "from 1 to"),
        (["--threads", "x"], "from 1 to"),
        (["--tokens", "0"], "from 1 to"),
        (["--budget", "inf"], "above 0"),
        (["--budget", "nan"], "above 0"),
    ):
        with pytest.raises(SystemExit) as caught:
            main.parse(arguments)
        assert caught.value.code == 2
        assert word in capsys.readouterr().err


def test_results_that_cannot_be_rendered(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    (tmp_path / "b.json").write_text("[1]")
    for name, words in (
        ("a.json", "must be results of this benchmark"),
        ("b.json", "must hold a JSON object"),
        ("c.json", "must be a file, got no such file"),
    ):
        for option in ("--render", "--join"):
            with pytest.raises(SystemExit) as caught:
                main.main([option, str(tmp_path / name)])
            message = str(caught.value.code)
            assert message.startswith("bench.cpu: ") and words in message
            assert "\n" not in message


# --- peers and recorded results


def test_peers_say_why_they_are_absent():
    names = [peer.name for peer in PEERS]
    assert len(set(names)) == len(names)
    for peer in PEERS:
        why = peer.missing()
        assert why is None or peer.package.split("-")[0] in why or "torch" in why
        assert set(peer.formats) <= {"fp32", "bf16", *MoeOpsQuantized.formats}


def test_libraries_that_cannot_be_held_to_an_instruction_set_say_so(monkeypatch):
    class Lowered:
        cpu_isa, detected_isa = (lambda: "avx2"), (lambda: "avx512")

    assert machine.beyond_isa() is None or _library.cpu_isa() != _library.detected_isa()
    monkeypatch.setattr(machine, "_library", Lowered)
    assert machine.beyond_isa() == "cannot be held to avx2"


@pytest.fixture
def off_the_first_core():
    """Leaves the first core to the thread of kt-kernel."""
    if not hasattr(os, "sched_setaffinity") or len(cores := os.sched_getaffinity(0)) == 1:
        yield
        return
    os.sched_setaffinity(0, cores - {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


def test_installed_peers_compute_the_layer(off_the_first_core):
    """Only where somebody has installed them; ONNX Runtime's int4 needs whole groups of 128."""
    shape = Shape("peers", H=256, I=256, E=4, K=2)
    for peer in PEERS:
        if peer.missing() is not None:
            continue
        for weight_format in peer.formats:
            dtype = torch.float32 if weight_format == "fp32" else torch.bfloat16
            bank, tokens = make_bank(shape, dtype), make_tokens(shape, dtype, 24)
            y = peer.prepare(bank, weight_format)(tokens)()
            error = relative_error(y, exact_output(bank, tokens, torch.arange(24)))
            assert error <= baselines.tolerance(weight_format), peer.name


def test_dumps_are_what_the_results_say():
    paths = sorted(RESULTS.glob("*.json"))
    assert paths
    for path in paths:
        assert path.with_suffix(".md").read_text() == dump.dump(path)
        result = json.loads(path.read_text())
        assert result.get("kind") == "gpu" or result["format"] == FORMAT
