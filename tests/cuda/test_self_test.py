"""The doctor's self-test and the selection for compute-sanitizer, on the CUDA kernels."""

from __future__ import annotations

from moe_ops import doctor


def test_doctor_passes_on_cuda_kernels():
    tests = doctor.self_test()
    assert {test.op for test in tests} >= {"sort_by_expert", "permute", "grouped_gemm", "moe_ffn"}
    assert not [test for test in tests if not test.passed]


def test_selection_for_the_sanitizer_passes(simulator):
    """Long sums and sizes that no tile divides; no race, nothing read that nobody wrote."""
    from bench.gpu import small

    simulator.warnings()
    with simulator.options(race=1, check_uninit=1):
        assert small.run("cpu") == []
    assert simulator.warnings() == ""
