"""A model whose experts are four times the memory that they may take."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_ops.offload import record_expert_trace
from moe_ops.zoo.deepseek import DeepSeek, DeepSeekConfig

NUM_TOKENS = 12
needs_limits = pytest.mark.skipif(sys.platform != "linux", reason="Limits and /proc are Linux's.")


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
    with record_expert_trace(model) as recorder:
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


def run_limited(script: str, *arguments: str) -> dict[str, Any]:
    """What a script of this folder says that is run as a process of its own."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MOE_OPS_CACHE_MB": "0"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(result)
    return result


@needs_limits
@pytest.mark.parametrize("policy", ["lru", "belady"])
def test_generates_the_same_tokens_in_a_quarter_of_the_memory(checkpoint, policy):
    task = torch.load(checkpoint / "task.pt", weights_only=True)
    result = run_limited("limited.py", str(checkpoint), "32", policy)
    assert result["tokens"] == task["wanted"].tolist()
    assert not result["others_fit"]
    assert result["peak"] <= 1.1 * result["budget"], result


@needs_limits
def test_a_model_of_transformers_is_loaded_a_layer_at_a_time(tmp_path):
    """Four layers of 24 MB of experts each, with memory for one and a half beside the mapped file;
    of that no more than a layer's pages are in memory either."""
    transformers = pytest.importorskip("transformers")

    def build(num_layers: int, size: int) -> Any:
        config = transformers.MixtralConfig(
            vocab_size=256,
            hidden_size=size,
            intermediate_size=2 * size,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=16,
            pad_token_id=0,
        )
        return transformers.MixtralForCausalLM(config).eval()

    torch.manual_seed(0)
    model, prompt = build(4, 256), torch.randint(256, (1, 6))
    wanted = model.generate(prompt, max_new_tokens=4, do_sample=False)
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    dense = sum(p.nbytes for p in model.parameters()) - experts
    task = {"prompt": prompt, "num_tokens": 4, "dense_bytes": dense, "layer_bytes": experts // 4}
    torch.save(task, tmp_path / "task.pt")
    model.save_pretrained(tmp_path)
    build(1, 32).save_pretrained(tmp_path / "small")
    result = run_limited("limited_transformers.py", str(tmp_path), "8")
    assert result["tokens"] == wanted.tolist()
    assert result["peak"] <= 1.2 * (dense + 2 * experts // 4), result
