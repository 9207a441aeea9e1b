"""The bookkeeping of a lease, without a card: what is done before, time limits, failing steps, what
is written when; building with CMake is only asked for its commands."""

from __future__ import annotations

import json
import sys
import time
import zipfile
from dataclasses import replace

import pytest
import torch
from bench.gpu import cases, steps
from bench.gpu.cases import Case
from bench.gpu.lease import build, cached, child, decode, main, plan, result, stream, tiles
from bench.gpu.lease.build import Sources
from bench.gpu.lease.journal import NAME, Journal
from bench.gpu.lease.measure import SELECTIONS, options_of
from bench.gpu.lease.plan import Lease, Step
from bench.gpu.work import work_of
from bench.harness.files import ROOT


@pytest.fixture
def lease(tmp_path, monkeypatch):
    """With a package that counts as built, and logs apart from those of others."""
    monkeypatch.setattr(steps, "LOGS", tmp_path / "logs")
    package = tmp_path / "package" / "moe_ops"
    package.mkdir(parents=True)
    (package / "libmoe_ops.so").touch()
    return Lease(tmp_path / "out", Sources(package=package.parent), dry=True)


class Told:
    """Steps that only say that they ran."""

    def __init__(self):
        self.ran = []

    def step(self, name, status="passed", **more):
        def run(lease, limit_s, name):
            self.ran.append((name, limit_s))
            if status == "raises":
                raise OSError("no such device")
            return {"status": status, "seconds": 1.0, "text": "as told"}

        return Step(name, **{"limit_s": 60.0, "run": run, **more})


@pytest.fixture
def told():
    return Told()


def walk(lease, chosen, left_s=1000.0, again=()):
    return main.walk(lease, chosen, left_s, again, now=lambda: 0.0)


# ------------------------------------------------------------------------------ journal


def test_journal_is_read_back(tmp_path):
    journal = Journal(tmp_path / "deep" / "folder")
    assert journal.outcome("a") is None and list(journal.records()) == []
    journal.write("tile", "a", us=1.5)
    journal.write("outcome", "a", status="failed")
    journal.write("outcome", "a", status="passed")
    journal.write("outcome", "b", status="failed")
    assert [r["us"] for r in journal.records("tile")] == [1.5]
    assert journal.passed("a") and not journal.passed("b") and not journal.passed("c")
    assert len(list(journal.records(step="a"))) == 3


@pytest.mark.parametrize("cut", ['{"kind": "outcome", "st', "[1]\n", '{"kind": "tile"}\n', "\xff"])
def test_a_line_that_was_cut_off_is_left_out(tmp_path, cut):
    journal = Journal(tmp_path)
    journal.write("outcome", "a", status="passed")
    with (tmp_path / NAME).open("ab") as file:
        file.write(cut.encode("latin-1"))
    journal.write("outcome", "b", status="passed")
    assert [r["step"] for r in journal.records()] == ["a", "b"]


# ---------------------------------------------------------------------------- the walk


def test_a_step_that_is_done_is_not_repeated(lease, told):
    chosen = [told.step("a"), told.step("b", "failed"), told.step("c", "unfinished")]
    assert not walk(lease, chosen)
    assert not walk(lease, chosen)
    assert [name for name, _ in told.ran] == ["a", "b", "c", "b", "c"]
    told.ran.clear()
    walk(lease, chosen, again=["a"])
    assert [name for name, _ in told.ran] == ["a", "b", "c"]


def test_a_step_whose_result_is_gone_is_repeated(lease, told):
    step = told.step("build", stays=lambda lease: False)
    assert walk(lease, [step]) and walk(lease, [step])
    assert len(told.ran) == 2


def test_a_step_that_fails_is_recorded_and_the_next_goes_on(lease, told):
    assert not walk(lease, [told.step("a", "raises"), told.step("b"), told.step("c", "skipped")])
    assert lease.journal.outcome("a")["text"] == "OSError: no such device"
    assert [lease.journal.outcome(n)["status"] for n in "abc"] == ["failed", "passed", "skipped"]


def test_an_outcome_is_written_before_the_next_step_begins(lease, told):
    seen = []
    first = told.step("a")
    second = replace(told.step("b"), run=lambda *_: seen.append(lease.journal.passed("a")) or {})
    with pytest.raises(KeyError):  # an outcome that says nothing
        walk(lease, [first, second])
    assert seen == [True]


def test_a_step_gets_its_limit_or_what_is_left(lease, told):
    long, short = told.step("long", limit_s=300.0), told.step("short", limit_s=20.0)
    walk(lease, [long, short], left_s=100.0)
    assert told.ran == [("long", 100.0), ("short", 20.0)]


def test_too_little_time_begins_no_step(lease, told):
    said = []
    chosen = [told.step("a", least_s=40.0), told.step("b", least_s=5.0)]
    good = main.walk(lease, chosen, 30.0, log=said.append, now=lambda: 0.0)
    assert not good and [name for name, _ in told.ran] == ["b"]
    assert said[0] == "a: not begun, 30 s are left"
    assert lease.journal.outcome("a") is None


def test_without_a_build_only_what_needs_none(lease, told):
    (lease.sources.package / "moe_ops" / "libmoe_ops.so").unlink()
    said = []
    chosen = [told.step("machine", needs_build=False), told.step("smoke")]
    assert not main.walk(lease, chosen, 99.0, log=said.append, now=lambda: 0.0)
    assert [name for name, _ in told.ran] == ["machine"]
    assert said[-1] == "smoke: not begun, there is no build"


# ------------------------------------------------------------------------- real processes


def command_that(monkeypatch, text):
    monkeypatch.setattr(plan, "child_command", lambda *_: [sys.executable, "-c", text])


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("print('all good')", "passed"),
        ("import sys; print('all good'); sys.exit(3)", "unfinished"),
        ("import sys; print('all good'); sys.exit(1)", "failed"),
        ("import os; print('all good', flush=True); os.kill(os.getpid(), 9)", "failed"),
    ],
)
def test_a_child_ends_with_a_status_and_a_sentence(lease, monkeypatch, text, status):
    command_that(monkeypatch, text)
    outcome = plan.child("smoke")(lease, 30.0, "smoke")
    assert (outcome["status"], outcome["text"]) == (status, "all good")


def test_a_child_is_stopped_at_its_limit(lease, monkeypatch):
    command_that(monkeypatch, "import time; print('began', flush=True); time.sleep(99)")
    monkeypatch.setattr(steps, "_GRACE_S", 1.0)
    started = time.perf_counter()
    step = Step("tiles", 1.0, plan.child("tiles"))
    assert not main.walk(lease, [step], time.time() + 50)
    assert time.perf_counter() - started < 20
    outcome = lease.journal.outcome("tiles")
    assert outcome["status"] == "unfinished" and outcome["text"].startswith("stopped after")
    assert "===== tiles\nbegan" in (lease.out / "log.txt").read_text()


def test_a_step_on_the_cpu(lease, monkeypatch, capsys):
    """The whole command with a step that needs no build of CUDA kernels."""
    arguments = ["--dry", "--out", str(lease.out), "--steps", "smoke", "--minutes", "5"]
    monkeypatch.setenv("PYTHONPATH", "")
    import moe_ops

    package = str(next(iter(moe_ops.__path__))).removesuffix("/moe_ops")
    assert main.main([*arguments, "--package", package]) == 0
    assert lease.journal.passed("smoke")
    assert {r["name"] for r in lease.journal.records("check")} >= {"import", "one op"}
    assert main.main([*arguments, "--package", package]) == 0
    assert "smoke: done before" in capsys.readouterr().err


# ------------------------------------------------------------------------------- steps


def test_steps_come_in_order_and_fit_into_a_lease():
    names = [step.name for step in plan.steps_of_a_lease()]
    assert len(set(names)) == len(names)
    assert names[:3] == ["machine", "build", "smoke"] and names[-2:] == ["memcheck", "synccheck"]
    assert set(plan.MEASURED) == set(SELECTIONS) < set(names)
    assert all(step.limit_s <= 600 for step in plan.steps_of_a_lease())


def test_every_test_of_an_op_is_in_one_part():
    found = [file for name in plan.TESTS for file in plan.test_files(name)]
    assert len(set(found)) == len(found)
    files = [f"tests/ops/{path.name}" for path in (ROOT / "tests" / "ops").glob("test_*.py")]
    assert sorted(found) == sorted([*files, "tests/cuda_torch"])
    assert "tests/ops/test_topk_router.py" in plan.test_files("tests_routers")


def test_missing_packages_are_told(lease, monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    command, left_out = plan.test_command(replace(lease, dry=False), "tests_ffn")
    assert "-n" not in command and command[command.index("-k") + 1] == "not opcheck"
    assert "expecttest is not installed" in left_out[0] and "xdist" in left_out[1]
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: object())
    command, left_out = plan.test_command(replace(lease, dry=False), "tests_ffn")
    assert command[command.index("-n") + 1] == "8" and "-k" not in command and not left_out


def test_cases_that_were_measured_are_not_measured_again(tmp_path):
    journal = Journal(tmp_path)
    done = {"contenders": {"moe_ops": {"us": 1.0}}}
    journal.write("cell", "block", case="forward mixtral", cell=done)
    journal.write("cell", "block", case="failed", cell={"contenders": {}})
    journal.write("cell", "half", case="of another step", cell=done)
    task = child.Task("block", journal, tmp_path, 10.0, False)
    assert options_of(task).done == {"forward mixtral"}


@pytest.mark.parametrize("part", cases.LEASE_PARTS)
def test_work_of_the_parts_of_a_lease(part):
    (dtype,) = cases.dtypes_of(part, ("bf16",))
    small = work_of(Case(part, cases.SMALL, 64, "balanced", dtype), 8)
    large = work_of(Case(part, cases.SMALL, 128, "balanced", dtype), 8)
    assert 0 < small.bytes < large.bytes
    assert small.flops == 0 if part in cases.MOVES_TRAINING else 0 < small.flops < large.flops
    base = part.removesuffix("_training")
    if part != base and base in cases.LEASE_PARTS:
        assert work_of(Case(base, cases.SMALL, 64, "balanced", dtype), 8).flops < small.flops


def test_narrow_weights_are_read_in_fewer_bytes():
    sizes = [
        work_of(Case(part, cases.MODELS["mixtral-8x7b"], 1, "balanced", dtype), 2).bytes
        for part, dtype in (("forward", "bf16"), ("forward_int8", "int8"), ("forward_int4", "int4"))
    ]
    assert sizes[0] / sizes[1] == pytest.approx(2, rel=0.01)
    assert sizes[0] / sizes[2] == pytest.approx(2 / (0.5 + 4 / 64), rel=0.01)


def test_a_tile_is_forced_whenever_the_call_is_made(monkeypatch):
    import os

    monkeypatch.delenv(tiles.GEMM, raising=False)
    seen = []
    call = lambda: seen.append(os.environ.get(tiles.GEMM)) or torch.zeros(1)  # noqa: E731
    product = tiles.Product("up", tiles.GEMM, 1, 0, 1, 1, 1.0, call)
    for tile in ("128x256", tiles.CHOSEN, "64x64"):
        tiles.forced(product, tile)()
    assert seen == ["128x256", None, "64x64"] and tiles.GEMM not in os.environ


# ------------------------------------------------------------------------------- build


def test_commands_of_a_build(tmp_path, monkeypatch):
    whole = Sources(defines=("MOE_OPS_CUDART=shared",))
    assert build.configure(whole)[-1] == "-DMOE_OPS_CUDART=shared"
    monkeypatch.setattr(build, "said", lambda command: ["8.9", "9.0"])
    assert "-DMOE_OPS_CUDA_SASS=89" in build.configure(whole)
    assert "--build" in build.compile_()


def test_a_library_that_is_carried_is_not_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(build, "_refusal", lambda package, limit_s: "")
    monkeypatch.setattr(steps, "run_logged", lambda *args: pytest.fail("nothing to run"))
    library = tmp_path / "of_another_name.so"
    library.write_bytes(b"code")
    outcome = build.build(Sources(library=library), 30.0)
    assert outcome["status"] == "passed" and str(library) in outcome["text"]
    assert (tmp_path / "package" / "moe_ops" / "libmoe_ops.so").read_bytes() == b"code"
    assert build.is_built(Sources(library=library))


@pytest.mark.parametrize("form", ["wheel", "folder", "headers"])
def test_cutlass_in_three_forms(tmp_path, monkeypatch, form):
    monkeypatch.setattr(build, "_CUTLASS", tmp_path / "unpacked")
    headers = tmp_path / "carried" / "cutlass_library" / "source" / "include"
    (headers / "cute").mkdir(parents=True)
    (headers / "cute" / "tensor.hpp").write_text("// cute")
    given = {"folder": tmp_path / "carried", "headers": headers}.get(form, tmp_path / "c.whl")
    if form == "wheel":
        with zipfile.ZipFile(given, "w") as wheel:
            name = "cutlass_library/source/include/cute/tensor.hpp"
            wheel.write(headers / "cute" / "tensor.hpp", name)
    folder = build._cutlass_folder(given)
    assert (folder / "cutlass_library" / "source" / "include" / "cute" / "tensor.hpp").exists()
    assert build._python_path(Sources(cutlass=given)).startswith(str(folder))


def test_what_is_no_cutlass_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_CUTLASS", tmp_path / "unpacked")
    with pytest.raises(FileNotFoundError, match="--cutlass must be the nvidia-cutlass wheel"):
        build._cutlass_folder(tmp_path)


def test_a_build_that_fails_tells_the_first_error(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "LOGS", tmp_path)
    script = "print('-- ok'); print('nvcc: fatal error: no such file'); raise SystemExit(1)"
    monkeypatch.setattr(build, "configure", lambda sources: [sys.executable, "-c", script])
    outcome = build.build(Sources(), 30.0)
    assert outcome["status"] == "failed"
    assert outcome["text"].startswith("configure: nvcc: fatal error: no such file (")


def test_a_package_of_another_source_or_setting_is_built_again(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    (tmp_path / "moe_ops").mkdir()
    (tmp_path / "moe_ops" / "libmoe_ops.so").touch()
    made = Sources(defines=("MOE_OPS_CUDART=shared",))
    assert not build.is_built(made)
    (tmp_path / "stamp").write_text(build._stamp_of(made))
    assert build.is_built(made)
    assert not build.is_built(Sources()) and not build.is_built(Sources(library=tmp_path / "l.so"))
    monkeypatch.setattr(build, "fingerprint", lambda: "another")
    assert not build.is_built(made)


def test_a_package_that_does_not_load_is_refused(lease, monkeypatch):
    (lease.sources.package / "moe_ops" / "__init__.py").write_text("raise ImportError('no symbol')")
    outcome = build.build(lease.sources, 30.0)
    assert outcome["status"] == "failed"
    assert outcome["text"].endswith("does not load: ImportError: no symbol")
    (lease.sources.package / "moe_ops" / "__init__.py").write_text("")
    assert build.build(lease.sources, 30.0)["status"] == "passed"


# ------------------------------------------------------------------------------ result


def test_result_of_a_journal(lease):
    journal = lease.journal
    assert result.assemble(journal, dry=True) is None
    cell = {"part": "forward", "shape": "m", "T": 1, "routing": "random", "dtype": "bf16"}
    cell |= {"used": 1, "flops": 1e9, "bytes": 1e6, "skipped": {}}
    limits = {"bf16_flops": 1e12, "copy_bytes": 1e9, "launch_s": 1e-6, "fp8_flops": 0.0}
    for rate, us in ((1e12, 3000.0), (2e12, 2000.0)):
        own = {"moe_ops": {"us": us, "rounds": 5, "error": 0.0}}
        journal.write("cell", "block", case="forward m", cell={**cell, "contenders": own})
        about = {"card": {"name": "A card"}, "versions": {"torch": "2"}, "absent": {"P": "gone"}}
        about |= {"clocks": {"note": "steady"}, "date": "today", "seconds": 3}
        journal.write("measured", "block", limits={**limits, "bf16_flops": rate}, **about)
    journal.write("outcome", "block", status="passed", seconds=3.0, text="1 case", tree="abc")
    found = result.assemble(journal, dry=False)
    # The later measurement of a case, the better of the limits: 1 MB at 1 GB/s.
    (only,) = found["cells"]
    assert only["contenders"]["moe_ops"]["us"] == 2000.0 and only["floor_us"] == 1000.0
    assert only["contenders"]["moe_ops"]["of_limit"] == 0.5
    assert not found["complete"] and found["trees"] == ["abc"]
    assert found["steps"] == {"block": {"status": "passed", "seconds": 3.0, "text": "1 case"}}
    assert json.loads(json.dumps(found)) == found
    said = main.outcomes(journal).splitlines()
    assert any(line.split()[:4] == ["block", "passed", "3", "s"] for line in said)
    assert "machine         –" in said


def test_tables_of_tiles_and_decoding():
    tile = {"product": "up", "model": "m", "T": 64, "flops": 2e9}
    _, header, rows = tiles.table([{**tile, "us": {"chosen": 11.0, "64x64": 10.0}}])
    assert header[3:5] == ["chosen", "64x64"]
    assert rows == [["up", "m", "64", "11", "10", "200", "10.0%"]]
    ways = {"moe_ops": {"step_us": 5.0, "tokens_per_s": 7.0, "eager": "no graph"}}
    record = {"batch": 1, "ways": ways, "skipped": {"eager": "wrong"}}
    rows = decode.table([record])[2]
    assert rows == [["1", "moe_ops", "5*", "7"], ["1", "eager", "–", "– (wrong)"]]


def test_step_stream(tmp_path):
    """A dry run on the CPU measures both ways, with equal logits, and a second one nothing."""
    task = child.Task("stream", Journal(tmp_path), tmp_path, 60.0, True)
    assert stream.run(task) == (0, "stream: measured")
    records = list(task.journal.records("stream"))
    assert [r["format"] for r in records] == ["bfloat16", "int4 g64"]
    rows = stream.table(records)[2]
    assert [row[:2] for row in rows] == [["bfloat16", "16"], ["int4 g64", "16"]]
    assert stream.run(task) == (0, "stream: measured")
    assert list(task.journal.records("stream")) == records


def test_step_cached(tmp_path):
    """A dry run on the CPU finds cached experts and equal logits, and a second one does nothing."""
    task = child.Task("cached", Journal(tmp_path), tmp_path, 60.0, True)
    assert cached.run(task) == (0, "cached: measured")
    records = list(task.journal.records("cached"))
    ways = [(r["format"], r["slots"]) for r in records]
    assert ways == [("bfloat16", 0), ("bfloat16", 4), ("int4 g64", 0), ("int4 g64", 4)]
    for record in records:
        assert (record["hit_rate"] > 0) is (record["slots"] > 0) and record["error"] < 0.05
    assert [row[:2] for row in cached.table(records)[2]] == [[f, str(n)] for f, n in ways]
    assert cached.run(task) == (0, "cached: measured")
    assert list(task.journal.records("cached")) == records
