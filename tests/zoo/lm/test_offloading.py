"""from_pretrained(offload=...): experts are read from the checkpoint when they are used."""

from __future__ import annotations

import pytest
import torch

from moe_ops import zoo

from .common import change_file, sharpen, tokens_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("system", ["deepseek", "jetmoe", "moduleformer", "coe", "topp"])
def test_generates_the_same(system, dtype, tmp_path):
    """Keys of each expert (deepseek) and of all together (jetmoe), in several files; slots of
    another type than the file's."""
    torch.manual_seed(0)
    model = sharpen(zoo.create_model(system))
    model.save_pretrained(tmp_path, max_shard_bytes=100_000)
    model = type(model).from_pretrained(tmp_path, dtype=dtype)
    prompt = tokens_of(model, 2, 5)
    again = type(model).from_pretrained(tmp_path, dtype=dtype, offload={"num_slots": 7})
    with again.expert_cache as cache:
        assert torch.equal(again.generate(prompt, 8), model.generate(prompt, 8))
        assert cache.stats.misses and cache.slots["w_down"].dtype == dtype
    held = sum(p.numel() for p in again.parameters())
    experts = cache.store.num_banks * cache.store.num_experts * cache.store.expert_bytes
    assert held == sum(p.numel() for p in model.parameters()) - experts // dtype.itemsize


def test_bad_calls(tmp_path):
    torch.manual_seed(0)
    model = zoo.create_model("deepseek")
    model.save_pretrained(tmp_path)
    load = type(model).from_pretrained
    with pytest.raises(ValueError, match="a model with experts"):
        load(tmp_path, offload={"num_slots": 2, "skip": "*"})
    with pytest.raises(ValueError, match="num_slots must be at least 1"):
        load(tmp_path, offload={"num_slots": 0})
    with pytest.raises(NotImplementedError, match="would lack the experts"):
        load(tmp_path, offload={"num_slots": 2}).save_pretrained(tmp_path)
    change_file(tmp_path, lambda tensors: tensors.popitem())
    with pytest.raises(ValueError, match="1 keys missing"):
        load(tmp_path, offload={"num_slots": 2}, strict=False)
