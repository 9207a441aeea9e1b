"""A whole layer on the CUDA kernels equals the same layer on the CPU's."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.moe import build_moe
from tests.helpers.simulator import run_script

from moe_ops.testing import eps, short


@pytest.mark.parametrize(
    ("dtype", "router"),
    [
        (torch.float32, "mixtral"),
        (torch.bfloat16, "qwen3_moe"),
        (torch.float32, "deepseek_v3"),
        pytest.param(torch.bfloat16, "mixtral", marks=pytest.mark.full),
        pytest.param(torch.float32, "qwen3_moe", marks=pytest.mark.full),
        pytest.param(torch.bfloat16, "deepseek_v3", marks=pytest.mark.full),
    ],
    ids=lambda value: value if isinstance(value, str) else short(value),
)
def test_moe_layer_equals_the_cpu_backend(tmp_path, dtype, router):
    build = {
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_experts": 16,
        "top_k": 2,
        "num_shared_experts": 1,
        "router": router,
    }
    call = {
        "build": build,
        "state": {k: v.to(dtype) for k, v in build_moe(**build).state_dict().items()},
        "x": torch.randn(2, 19, 24).to(dtype),
        "grad": torch.randn(2, 19, 24).to(dtype),
    }
    torch.save(call, tmp_path / "call.pt")
    results = {}
    for backend in ("cpu", "sim"):
        result = tmp_path / f"{backend}.pt"
        run_script("moe_layer", backend, str(tmp_path / "call.pt"), str(result))
        results[backend] = torch.load(result)
    want, got = results["cpu"], results["sim"]

    assert got.keys() == want.keys()
    assert torch.equal(got.pop("topk_ids"), want.pop("topk_ids"))
    for name, expected in want.items():
        error = (got[name].double() - expected.double()).norm()
        # Both round; they differ in what a half type rounds between two products.
        assert error <= 8 * eps(dtype) * expected.double().norm(), name
