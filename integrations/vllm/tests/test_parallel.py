"""Two processes of the engine against transformers: tensor parallelism and expert parallelism."""

from __future__ import annotations

import os

import pytest
import torch
from integrations.vllm.tests.test_models import check, checkpoints, generate, write
from integrations.vllm.tests.test_routed_experts import CLASSES

import moe_ops

pytest.importorskip("vllm")

pytestmark = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="two processes of vLLM need two cores"
)


@pytest.mark.parametrize(
    ("method", "experts"), [(None, False), ("gptq", True), ("compressed-tensors", False)]
)
def test_two_processes(monkeypatch, tmp_path, method, experts):
    folder = tmp_path / "model"
    if method is None:
        model = checkpoints.build("qwen3_moe")
        model.save_pretrained(folder)
    else:
        model = write(monkeypatch, folder, "qwen3_moe", method, False)
    prompts = torch.randint(3, 60, (4, 12))
    result, log = generate(
        folder,
        prompts,
        "eager",
        tmp_path,
        engine={
            "tensor_parallel_size": 2,
            "enable_expert_parallel": experts,
            "enable_prefix_caching": True,
            **CLASSES,
        },
        env={"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )
    assert f"Experts run on moe_ops {moe_ops.__version__}" in log
    check(result, model, prompts)
    for (completion,) in result["batches"][0]:
        assert len(completion["experts"]["rows"]) == 13
