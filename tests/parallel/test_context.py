"""Context parallelism: ranks with parts of each sequence balance and train as one process does."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from tests.helpers.moe import build_moe
from torch import nn
from torch.distributed.fsdp import fully_shard

from moe_ops.layers import (
    ExpertLoadStats,
    load_balancing_loss,
    sequence_balance_loss,
    update_expert_bias,
)
from moe_ops.parallel import fully_shard_moe, init_moe_meshes, shard_experts

from .common import assert_same, gradients, mean_over_ranks

pytestmark = pytest.mark.cpu_only

SEQUENCES, LENGTH, HIDDEN, EXPERTS = 3, 16, 16, 8


class Attention(nn.Module):
    """Causal attention of one head to the keys and values of all ranks."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)

    def forward(self, x, positions, group):
        q, k, v = self.qkv(x).chunk(3, -1)
        keys = positions
        if group is not None:
            k, v = (funcol.all_gather_tensor_autograd(t.contiguous(), 1, group) for t in (k, v))
            keys = funcol.all_gather_tensor(positions, 0, group)
        mask = positions[:, None] >= keys[None]
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.ModuleList(Attention() for _ in range(2))
        self.moe = nn.ModuleList(
            build_moe(HIDDEN, 8, EXPERTS, 2, score_func="sigmoid", expert_bias=True)
            for _ in range(2)
        )

    def forward(self, x, target, positions, group=None):
        """The losses of this rank's part, [B, S / n, H], and statistics; those of balance are of
        whole sequences and of the whole batch."""
        balance, stats = 0.0, ExpertLoadStats()
        for i, (attention, moe) in enumerate(zip(self.attention, self.moe, strict=True)):
            x = x + attention(x, positions, group)
            out = moe(x, return_routing=True)
            x = x + out.y
            logits, ids = (t.view(*x.shape[:2], -1) for t in (out.router_logits, out.topk_ids))
            balance = balance + sequence_balance_loss(logits, ids, group=group)
            balance = balance + load_balancing_loss(logits, ids, score_func="sigmoid", group=group)
            stats.update(out.topk_ids, EXPERTS, layer=i)
        return (x - target).square().mean(), balance, stats


def batch():
    generator = torch.Generator().manual_seed(5)
    x, target = torch.randn(2, SEQUENCES, LENGTH, HIDDEN, generator=generator)
    return x, target, torch.arange(LENGTH)


def step(model, part, group=None):
    """Returns the results of a step on the tokens at the positions `part` of each sequence."""
    x, target, positions = batch()
    loss, balance, stats = model(x[:, part], target[:, part], positions[part], group)
    (loss + balance).backward()
    update_expert_bias(model, rate=0.5)
    stats.all_reduce()
    biases = [moe.router.expert_bias.clone() for moe in model.moe]
    return float(balance.detach()), gradients(model), biases, stats.as_dict(), loss


def step_of_a_rank(rank, ep):
    # Causal attention has more to do for later tokens: a rank takes one run from each end.
    runs = torch.arange(LENGTH).chunk(4)
    part = torch.cat([runs[rank], runs[3 - rank]])
    meshes = init_moe_meshes(ep)
    model = shard_experts(Model(), meshes.ep)
    for moe in model.moe:
        fully_shard_moe(moe, meshes.dp, meshes.efsdp)
    fully_shard(model, mesh=meshes.dp)
    *found, loss = step(model, part, dist.group.WORLD)
    return *found, mean_over_ranks(loss)


@pytest.mark.parametrize("ep", [1, 2])
def test_parts_of_sequences(processes, ep):
    balance, grads, biases, stats, loss = step(Model(), slice(None))
    for found in processes.run(step_of_a_rank, ep, world=2):
        assert found[0] == pytest.approx(balance, rel=1e-6)
        assert_same(found[1], grads)
        for got, want in zip(found[2], biases, strict=True):
            assert torch.equal(got, want)
        assert found[3] == stats
        assert found[4] == pytest.approx(float(loss.detach()), rel=1e-6)
