"""generate_batch of transformers, with caches of pages, under optimize."""

from __future__ import annotations

import pytest
import torch
from tests.hf import models
from transformers import ContinuousBatchingConfig, GenerationConfig

import moe_ops
import moe_ops.hf

pytest.importorskip("psutil")  # transformers measures the memory with it.

# Prompts beyond one forward, so that it reads some of them in parts, and more than one page.
LENGTHS = (5, 30, 17, 1, 64, 8)


@pytest.mark.parametrize("config", [None, moe_ops.Int8WeightConfig()], ids=["float", "int8"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_tokens_are_those_of_generate(name, config):
    model = models.build(name).eval()
    model.set_attn_implementation("sdpa")
    moe_ops.hf.optimize(model, quantization=config)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, models.VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
    settings = GenerationConfig(max_new_tokens=10, do_sample=False)
    alone = [
        model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :]
        for prompt in prompts
    ]
    with moe_ops.hf.assert_used(model) as calls:
        together = model.generate_batch(
            prompts,
            generation_config=settings,
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=48),
        )
    found = [output.generated_tokens for output in together.values()]
    assert found == [ids.tolist() for ids in alone]
    # Forwards of several requests: far fewer than one for each token.
    assert max(calls.values()) < 30
    reason = moe_ops.hf.report(model).left["model.layers.0"]
    # Attention alone is not fused: it takes the arguments of caches of pages.
    assert "its last call: it was called with " in reason and ";" not in reason
