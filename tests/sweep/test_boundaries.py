"""Every op on both sides of the sizes at which its kernels change what they do: the short part of
tests/sweep. `make fuzz` runs the rest."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
from tests.helpers.dev import moe_ops_dev
from tests.helpers.isas import ISAS, run_python_at
from tests.sweep import __main__ as runner
from tests.sweep import cases
from tests.sweep.cases import Case

# Entries about several dimensions together (cases._special).
TOGETHER = {"depth_a_row", "weights", "result_bytes"}


@pytest.mark.parametrize("isa", ISAS)
def test_short_sweep(isa, request):
    arguments = ["-m", "tests.sweep", "--worker", "--short", "--isa", isa]
    if not request.config.getoption("--full"):
        arguments.append("--own")
    run = run_python_at(isa, *arguments)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, f"ended at {lines[-1:]}\n{run.stderr[-2000:]}"
    cases = [line["case"] for line in lines if "case" in line]
    faults = [line["fault"] for line in lines if "fault" in line]
    assert len(cases) == len(faults) > 150 and lines[-1] == {"done": True}
    found = [f"{case}\n    {fault}" for case, fault in zip(cases, faults, strict=True) if fault]
    assert not found, "\n".join(found)[-6000:]


def test_every_size_brings_cases():
    """An entry of the table that no op asks for would be a constant that nobody tests."""
    table = moe_ops_dev.block_sizes()
    asked = {
        entry for op in cases.OPS.values() for dim in op.dims.values() for entry in dim.entries
    }
    missing = {(f, a) for f, a, _, _ in table if a not in TOGETHER} - asked
    assert not missing, f"csrc/cpu/gemm/blocking.cpp has {missing}, which no op of tests/sweep has"
    unknown = asked - {(f, a) for f, a, _, _ in table}
    assert not unknown, f"tests/sweep asks for {unknown}, which csrc/cpu/gemm/blocking.cpp lacks"


def test_sizes_lie_on_both_sides():
    table = [("gemm", "rows", "kRowBlock", 128)]
    rows = cases.sizes_of(cases.OPS["grouped_gemm"].dims["rows"], table)
    assert rows == [127, 128, 129, 255, 256, 257]


def test_text_of_a_case_makes_it_again():
    for case in cases.short(moe_ops_dev.block_sizes())[::40]:
        assert Case.of(str(case)).values == case.values
    with pytest.raises(ValueError, match="name=value"):
        Case.of("op=moe_ffn rows")


def test_sweep_is_the_same_every_time():
    table = moe_ops_dev.block_sizes()
    first = [str(case) for case in cases.sweep(table, ["topp_router"])]
    assert first == [str(case) for case in cases.sweep(table, ["topp_router"])]
    assert len(set(first)) == len(first)


def test_smallest_failing_case():
    def fault(case):
        return "wrong" if case["rows"] > 100 and case["layout"] == "nn" else ""

    case = Case.of(
        "op=grouped_gemm dtype=bf16 rows=390 k=193 n=8 layout=nn bias=1 experts=4 grad_view=offset"
    )
    smallest, _ = runner.shrink(case, "wrong", fault)
    assert str(smallest) == (
        "op=grouped_gemm dtype=bf16 rows=101 k=1 n=1 layout=nn bias=0 experts=1 "
        "grad_view=contiguous"
    )


def test_a_crash_is_told_and_passed_over(monkeypatch, tmp_path):
    """The process dies at its second case: the next one starts with the third."""

    def spawn(isa, *arguments):
        log = Path(arguments[arguments.index("--log") + 1])
        lines = [
            {"at": 7, "case": "op=sort_by_expert dtype=fp32 tokens=1"},
            {"at": 7, "fault": ""},
            {"at": 8, "case": "op=sort_by_expert dtype=fp32 tokens=2"},
        ]
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return types.SimpleNamespace(returncode=-11, stderr="")

    monkeypatch.setattr(runner, "spawn", spawn)
    state = runner.State(tmp_path, 3, [])
    args = types.SimpleNamespace(seed=3, ops=[])
    runner.run_slice("avx2", state, 1.0, args)
    again = runner.State(tmp_path, 3, []).of("avx2")
    assert again["next"] == 9 and again["cases"] == {"sort_by_expert fp32": 2}
    (failure,) = again["failed"]
    assert failure["case"] == "op=sort_by_expert dtype=fp32 tokens=2" and "-11" in failure["fault"]
