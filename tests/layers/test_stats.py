from __future__ import annotations

import math

import pytest
import torch

from moe_ops.layers import ExpertLoadStats, count_tokens_per_expert


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_count(dtype):
    ids = torch.tensor([[0, 2], [2, -1], [5, 2], [-7, 1]], dtype=dtype)
    counts = count_tokens_per_expert(ids, 4)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [1, 1, 3, 0]
    mask = torch.tensor([True, False, True, False])
    assert count_tokens_per_expert(ids, 4, token_mask=mask).tolist() == [1, 0, 2, 0]


def test_count_of_nothing():
    assert count_tokens_per_expert(torch.zeros(0, 2, dtype=torch.int32), 3).tolist() == [0, 0, 0]
    assert count_tokens_per_expert(torch.zeros(2, 0, dtype=torch.int32), 3).tolist() == [0, 0, 0]


def test_measures():
    stats = ExpertLoadStats()
    stats.update(torch.tensor([[0, 1], [0, 1]]), 4, layer="a")
    stats.update(torch.tensor([[0, 2]]), 4, layer="a")
    stats.update(torch.tensor([[[1]], [[0]]]), 2, layer="b")
    assert stats.layers == ["a", "b"] and len(stats) == 2
    assert stats.tokens_per_expert("a").tolist() == [3, 2, 1, 0]
    assert stats.max_violation("a") == pytest.approx(3 / 1.5 - 1)
    assert stats.load_cv("a") == pytest.approx(math.sqrt(1.25) / 1.5)
    share = [3 / 6, 2 / 6, 1 / 6]
    assert stats.load_entropy("a") == pytest.approx(-sum(s * math.log(s) for s in share))
    assert stats.dead_experts("a") == [3]
    read = stats.as_dict()
    assert read["a"]["num_slots"] == 6 and read["a"]["tokens_per_expert"] == [3, 2, 1, 0]
    assert read["b"]["max_violation"] == 0 and read["b"]["load_cv"] == 0
    assert read["b"]["load_entropy"] == pytest.approx(math.log(2))


def test_empty_layer_measures_zero():
    stats = ExpertLoadStats()
    stats.update(torch.zeros(0, 2, dtype=torch.int32), 3)
    read = stats.as_dict()[0]
    assert read["max_violation"] == read["load_cv"] == read["load_entropy"] == 0
    assert read["dead_experts"] == [0, 1, 2]


def test_merge_reset_and_shapes():
    first, second = ExpertLoadStats(), ExpertLoadStats()
    first.update(torch.tensor([[0]]), 2, layer=1)
    second.update(torch.tensor([[1], [1]]), 2, layer=1)
    second.update(torch.tensor([[1]]), 3, layer=2)
    assert first.merge(second) is first
    assert first.tokens_per_expert(1).tolist() == [1, 2]
    first.update(torch.tensor([[0]]), 3, layer=2)
    assert second.tokens_per_expert(2).tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match=r"2 experts as before, got 3"):
        first.update(torch.tensor([[0]]), 3, layer=1)
    first.reset()
    assert len(first) == 0


def test_all_reduce_without_distributed_changes_nothing():
    stats = ExpertLoadStats()
    stats.update(torch.tensor([[0], [1]]), 2)
    assert stats.all_reduce().tokens_per_expert().tolist() == [1, 1]


def test_all_reduce_in_a_group_of_one(tmp_path):
    import torch.distributed as dist

    from moe_ops.layers import update_expert_bias

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        stats = ExpertLoadStats()
        stats.update(torch.tensor([[0], [1], [1]]), 2)
        assert stats.all_reduce().tokens_per_expert().tolist() == [1, 2]
        bias = torch.zeros(2)
        update_expert_bias(bias, stats.tokens_per_expert(), rate=1.0)
        assert bias.tolist() == [1.0, -1.0]
        assert stats.tokens_per_expert().tolist() == [1, 2]
    finally:
        dist.destroy_process_group()
