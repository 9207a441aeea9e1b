from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import moe_ops
from moe_ops import _library, doctor, ops, self_test
from moe_ops.cli.app import app

runner = CliRunner()

# pack_experts makes operands of moe_ffn_packed and has no values of its own.
OPS = set(ops.__all__) - {"pack_experts"}
INFERENCE_ONLY = (
    "sort_by_expert",
    "dispatch_layout",
    "moe_ffn_packed",
    "moe_ffn_quantized",
    "grouped_gemm_quantized",
    "quantize_fp8",
    "quantize_fp8_columns",
    "grouped_gemm_fp8",
    "grouped_gemm_fp8_wgrad",
    "moe_ffn_fp8",
    "attention_decode",
    "mla_decode",
    "gated_mlp_decode",
)


@pytest.fixture(scope="module")
def report() -> doctor.Report:
    return doctor.examine()


def test_self_test_covers_and_passes_every_op(report):
    assert {test.op for test in report.self_tests} == OPS
    failures = [test for test in report.self_tests if not test.passed]
    assert not failures
    for test in report.self_tests:
        assert (test.backward_error is None) == (test.op in INFERENCE_ONLY)


def test_every_problem_comes_with_advice(report):
    for finding in report.findings:
        assert finding.level in ("ok", "info", "warning", "fail")
        if finding.level in ("warning", "fail"):
            assert finding.advice, finding


def test_json():
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    loaded = json.loads(result.stdout)
    assert loaded["failed"] is False
    assert loaded["versions"]["torch"] == torch.__version__
    assert {test["op"] for test in loaded["self_tests"]} == OPS


def test_table_names_every_op(report):
    result = runner.invoke(app, ["doctor"], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    for op in OPS:
        assert op in result.output


def test_a_wrong_op_fails(monkeypatch):
    right = ops.gated_act
    monkeypatch.setattr(ops, "gated_act", lambda *a, **k: right(*a, **k) * 1.001)
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    failed = [t["op"] for t in json.loads(result.stdout)["self_tests"] if not t["passed"]]
    assert failed == ["gated_act"]


def test_an_op_that_raises_fails_with_its_message(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(ops, "permute", broken)
    (test,) = [t for t in doctor.self_test() if not t.passed]
    assert test.op == "permute"
    assert "no kernel image" in test.message


def test_name_clash_warns(monkeypatch, tmp_path):
    finding = doctor._name_clash()
    assert finding.level == "ok"
    info = tmp_path / "moe_ops-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moe-ops\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor._name_clash()
    assert finding.level == "warning"
    assert "9.9" in finding.text
    assert "pip uninstall moe-ops" in finding.advice


def test_old_transformers_warns(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: "5.6.2")
    (finding,) = doctor._hugging_face()
    assert finding.level == "warning"
    assert "needs transformers 5.7 or newer, found 5.6.2" in finding.text
    assert '"transformers>=5.7"' in finding.advice


@pytest.mark.parametrize(
    ("policy", "max_bytes", "level", "text"),
    [
        ("auto", 5 << 20, "ok", "at most 5 MiB"),
        ("auto", 0, "info", "none by itself"),
        ("off", None, "ok", "only by pack_weights"),
        ("always", None, "ok", "first call"),
    ],
)
def test_packed_weights(policy, max_bytes, level, text):
    with moe_ops.set_packing_policy(policy, max_bytes=max_bytes):
        finding = doctor._packed_weights()
    assert finding.level == level
    assert text in finding.text
    assert f"MOE_OPS_PACKING={policy}" in finding.text


class Card:
    """The answers of torch and the library about a GPU that is not there."""

    # Name, error, compute capability of the code and of its PTX, registers, spilled bytes.
    KERNELS = [
        ("permute_kernel", None, 90, 80, 24, 0),
        ("permute_kernel", None, 90, 80, 27, 16),
        ("sm90_grouped_gemm_kernel", None, 90, 90, 168, 0),
    ]

    def __init__(self, monkeypatch):
        self._patch = monkeypatch
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        # A build for the CPU has none of these.
        for name, answer in {
            "stream_source": ("/torch/lib/libtorch_cuda.so", True),
            "sm_margin": 0,
            "bind_device": None,
            "cuda_kernels": self.KERNELS,
        }.items():
            self.answer(name, answer)
        self.set()

    def answer(self, name, value):
        self._patch.setattr(_library, name, lambda *args: value, raising=False)

    def set(self, capability=(9, 0), build="13.0 (static runtime)", driver=(13, 0)):
        self._patch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        self._patch.setattr(doctor, "_cuda_build", lambda: build)
        self._patch.setattr(doctor, "_driver_version", lambda: driver)


@pytest.fixture
def card(monkeypatch):
    return Card(monkeypatch)


def test_gpu_without_kernels_warns(card):
    card.set(build="")
    (finding,) = doctor._cuda()
    assert finding.level == "warning" and "MOE_OPS_CUDA" in finding.advice


def test_gpu_with_kernels(card):
    finding, stream, device, generic, hopper, *rest = doctor._cuda()
    assert finding.level == "ok"
    assert "capability 9.0" in finding.text and "CUDA 13.0 (static runtime)" in finding.text
    assert stream.name == "cuda stream" and stream.level == "ok"
    assert "/torch/lib/libtorch_cuda.so" in stream.text
    assert device.name == "cuda device" and device.level == "ok"
    assert device.text.startswith("0 of 2")
    assert generic.name == hopper.name == "cuda kernels" and generic.level == hopper.level == "ok"
    made = "code for 9.0 that the driver made of PTX for 8.0"
    assert generic.text == f"{made}: permute (2, 1 spill)"
    assert hopper.text == "code for 9.0: sm90_grouped_gemm (1)"
    for other in rest:
        assert other.name == "cuda ops" and other.level == "info"


@pytest.mark.parametrize(
    ("found", "words"),
    [(None, "no libtorch_cuda.so"), (("/torch/lib/libtorch_cuda.so", False), "has none")],
)
def test_a_torch_without_the_current_stream_fails(card, found, words):
    card.answer("stream_source", found)
    finding = doctor._cuda_stream()
    assert finding.level == "fail" and words in finding.text and finding.advice


def test_a_margin_is_told(card):
    card.answer("sm_margin", 8)
    assert "leave 8 SMs to others" in doctor._cuda_stream().text


def test_a_device_that_cannot_be_used_fails(card):
    card.answer("bind_device", "CUDA driver version is insufficient for CUDA runtime version")
    finding = doctor._cuda_device()
    assert finding.level == "fail" and "driver version" in finding.text and finding.advice


def test_kernels_without_code_for_the_card(card):
    nothing = "no kernel image is available for execution on the device"
    permute, _, product = card.KERNELS
    card.answer("cuda_kernels", [permute, (product[0], nothing, 0, 0, 0, 0)])
    assert [f.level for f in doctor._cuda_kernels()] == ["ok", "fail"]
    card.set(capability=(8, 0))
    assert [f.level for f in doctor._cuda_kernels()] == ["ok", "info"]
    card.answer("cuda_kernels", [(permute[0], nothing, 0, 0, 0, 0), product])
    findings = list(doctor._cuda_kernels())
    assert [f.level for f in findings] == ["ok", "fail"]
    assert nothing in findings[1].text and findings[1].advice


@pytest.mark.parametrize(
    ("facts", "level", "words"),
    [
        ({"capability": (7, 5)}, "warning", "need compute capability 8.0"),
        ({"capability": (8, 0)}, "info", "the fast ones need 9.0"),
        ({"capability": (10, 0)}, "info", "the fast ones need 9.0"),
        ({"driver": (12, 4)}, "fail", "the driver supports CUDA 12.4 only"),
        ({"driver": (12, 4), "build": "12.8 (static runtime)"}, "ok", "CUDA 12.8"),
        ({"driver": None}, "ok", "H100"),
    ],
)
def test_gpu_that_does_not_fit(card, facts, level, words):
    card.set(**facts)
    finding = next(doctor._cuda())
    assert finding.level == level and words in finding.text
    if level in ("warning", "fail"):
        assert finding.advice


@pytest.mark.parametrize(
    ("build", "words"),
    [
        ("", "built without CUDA kernels"),
        ("13.0 (shared runtime)", "with CUDA kernels, CUDA 13.0 (shared runtime)"),
    ],
)
def test_no_gpu(monkeypatch, build, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_cuda_build", lambda: build)
    (finding,) = doctor._cuda()
    assert finding.level == "info" and words in finding.text


def test_cuda_self_tests_run_where_they_can(card, monkeypatch):
    asked = []
    result = doctor.SelfTest("permute", "cuda", "float32", True, 0.0, 0.0, 1e-5, 0.0)
    monkeypatch.setattr(doctor, "self_test", lambda device="cpu": asked.append(device) or [result])
    doctor.examine()
    assert asked == ["cpu", "cuda"]
    card.set(driver=(12, 4))
    doctor.examine()
    assert asked == ["cpu", "cuda", "cpu"]


def test_ops_without_a_cuda_kernel_are_left_out(monkeypatch):
    asked = []

    def run(case, device, dtype):
        asked.append((case.op, device, dtype))

    monkeypatch.setattr(self_test, "_run_case", run)
    monkeypatch.setattr(
        self_test,
        "has_kernel",
        lambda op, device: device == "cuda" and op in ("permute", "moe_ffn"),
    )
    doctor.self_test("cuda")
    assert asked == [
        ("permute", "cuda", torch.float32),
        ("moe_ffn", "cuda", torch.float32),
        ("moe_ffn", "cuda", torch.bfloat16),
    ]


def test_has_kernel_reads_the_registry():
    from moe_ops import _library

    assert all(doctor.has_kernel(op, "cpu") for op in OPS)
    for op in ("all_experts_ffn", "rotary", "pack_experts"):  # in Python
        assert doctor.has_kernel(op, "cuda")
    assert doctor.has_kernel("moe_ffn_quantized", "cuda") == (
        _library.build_info()["cuda"] != "off"
    )
    assert not doctor.has_kernel("no_such_op", "cpu")


def test_a_failing_kernel_is_told(monkeypatch):
    from moe_ops import _library

    monkeypatch.setattr(_library, "failing_kernel", lambda target: "packed tile")
    finding = next(doctor._cpu())
    assert finding.level == "fail" and "self-test (packed tile)" in finding.text


def test_lowered_isa_warns(monkeypatch):
    from moe_ops import _library

    monkeypatch.setattr(_library, "cpu_isa", lambda: "portable")
    monkeypatch.setattr(_library, "detected_isa", lambda: "avx2")
    monkeypatch.setenv("MOE_OPS_CPU_ISA", "portable")
    finding = next(doctor._cpu())
    assert finding.level == "warning" and "MOE_OPS_CPU_ISA" in finding.advice


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs sched_getaffinity")
def test_bound_threads_do_not_hide_cores():
    """OMP_PROC_BIND binds the main thread to one core when torch is imported."""
    cores = len(os.sched_getaffinity(0))
    code = "from moe_ops import doctor; print(doctor._usable_cores())"
    for number in ("1", str(cores)):
        environment = {**os.environ, "OMP_PROC_BIND": "true", "OMP_NUM_THREADS": number}
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert run.stdout.strip() == str(cores), run.stderr
