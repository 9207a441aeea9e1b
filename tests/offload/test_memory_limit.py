"""A model whose experts are four times the memory that they may take."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_ops.offload import record_trace
from moe_ops.zoo.deepseek import DeepSeek, DeepSeekConfig

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """300 MB of experts, 128 of them, and what the whole model makes of a prompt."""
    folder = tmp_path_factory.mktemp("model")
    config = DeepSeekConfig(
        vocab_size=256,
        hidden_size=256,
        num_layers=4,
        num_dense_layers=0,
        num_heads=4,
        head_size=64,
        latent=False,
        num_experts=32,
        top_k=4,
        num_shared_experts=0,
        intermediate_size=768,
        dense_intermediate_size=256,
        init_std=0.06,
    )
    torch.manual_seed(0)
    model = DeepSeek(config).eval()
    prompt = torch.randint(256, (1, 6))
    with record_trace(model) as recorder:
        tokens = model.generate(prompt, NUM_TOKENS)
    recorder.trace().save(folder / "trace.npz")
    experts = [block.mlp.experts for block in model.layers]
    all_bytes = sum(p.nbytes for e in experts for p in e.parameters())
    rest = sum(p.nbytes for p in model.parameters()) - all_bytes
    model.save_pretrained(folder)
    small = dataclasses.replace(config, hidden_size=64, num_layers=1, intermediate_size=32)
    DeepSeek(small).save_pretrained(folder / "small")
    task = {
        "prompt": prompt,
        "num_tokens": NUM_TOKENS,
        "rest_bytes": rest,
        "all_bytes": all_bytes,
        "expert_bytes": all_bytes // (4 * 32),
        "wanted": tokens,
    }
    torch.save(task, folder / "task.pt")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="Limits and /proc are Linux's.")
@pytest.mark.parametrize("policy", ["lru", "belady"])
def test_generates_the_same_tokens_in_a_quarter_of_the_memory(checkpoint, policy):
    task = torch.load(checkpoint / "task.pt", weights_only=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MOE_OPS_CACHE_MB": "0"}
    script = Path(__file__).with_name("limited.py")
    done = subprocess.run(
        [sys.executable, str(script), str(checkpoint), "32", policy],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tokens"] == task["wanted"].tolist()
    assert not result["others_fit"]
    print(result)
    assert result["peak"] <= 1.1 * result["budget"], result
