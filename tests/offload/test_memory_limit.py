"""A model of transformers that is loaded with little memory beside its checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

needs_limits = pytest.mark.skipif(sys.platform != "linux", reason="Limits and /proc are Linux's.")


def run_limited(script: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """Returns what a script of this folder says when it is run as a process of its own."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MOE_OPS_CACHE_MB": "0", **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(result)
    return result


def build(num_layers: int, size: int) -> Any:
    import transformers

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


@needs_limits
def test_a_model_of_transformers_is_loaded_a_layer_at_a_time(tmp_path):
    """Four layers of 24 MB of experts each, with memory for one and a half beside the mapped file;
    of that no more than a layer's pages are in memory either."""
    pytest.importorskip("transformers")
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


@needs_limits
def test_a_model_is_quantized_into_its_place(tmp_path):
    """Six layers of 25 MB of experts: the peak is the int4 model, a layer of float experts, and
    the pages of the file that these were read from."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = build(6, 256)
    layer = sum(p.nbytes for n, p in model.named_parameters() if ".layers.0.mlp.experts" in n)
    model.save_pretrained(tmp_path)
    build(1, 64).save_pretrained(tmp_path / "small")
    # Freed blocks of these small tensors would otherwise stay with the process.
    result = run_limited("placed_transformers.py", str(tmp_path), MALLOC_MMAP_THRESHOLD_="1000000")
    assert result["peak"] <= 1.2 * (result["bytes"] + 2 * layer) < 4 * layer
