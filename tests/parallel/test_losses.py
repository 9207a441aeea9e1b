"""Losses, balancing and statistics of routing over ranks: those of one process with all tokens."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tests.helpers.moe import build_moe, build_router

from moe_ops import zoo
from moe_ops.layers import (
    ExpertLoadStats,
    TopKRouter,
    concentration_loss,
    device_balance_loss,
    load_balancing_loss,
    mutual_information_loss,
    router_entropy_loss,
    router_z_loss,
    sequence_balance_loss,
    update_expert_bias,
)
from moe_ops.layers.layer_losses import total_load_balancing_loss, total_router_z_loss

pytestmark = pytest.mark.cpu_only

TOKENS = (5, 0, 9, 3)  # of the ranks
EXPERTS = 6


def of_logits(loss):
    return lambda logits, ids, mask, group: loss(logits[0], token_mask=mask, group=group)


LOSSES = {
    "load_balancing": lambda logits, ids, mask, group: load_balancing_loss(
        logits[0], ids[0], token_mask=mask, group=group
    ),
    "sigmoid": lambda logits, ids, mask, group: load_balancing_loss(
        logits[0], ids[0], score_func="sigmoid", token_mask=mask, group=group
    ),
    "device_balance": lambda logits, ids, mask, group: device_balance_loss(
        logits[0], ids[0], 3, token_mask=mask, group=group
    ),
    "sequence": lambda logits, ids, mask, group: sequence_balance_loss(
        logits[0], ids[0], num_sequences=1, token_mask=mask, group=group
    ),
    "z": of_logits(router_z_loss),
    "entropy": of_logits(router_entropy_loss),
    "mutual_information": of_logits(mutual_information_loss),
    "concentration": of_logits(concentration_loss),
    "layers": lambda logits, ids, mask, group: total_load_balancing_loss(
        list(logits), list(ids), token_mask=mask, group=group
    ),
    "layers_z": lambda logits, ids, mask, group: total_router_z_loss(
        list(logits), token_mask=mask, group=group
    ),
}


def make_batch(masked):
    """Returns, for two layers, logits [2, T, E], ids [2, T, K] with empty slots, and a mask."""
    generator = torch.Generator().manual_seed(3)
    num = sum(TOKENS)
    logits = torch.randn(2, num, EXPERTS, generator=generator, dtype=torch.float64)
    logits[..., 0] += 1.0
    ids = logits.topk(2).indices
    ids[0, 2, 1] = -1
    mask = torch.rand(num, generator=generator) > 0.3 if masked else None
    if mask is not None:
        logits[:, ~mask] = torch.nan
    return logits, ids, mask


def part(rank, tensor, dim):
    return None if tensor is None else tensor.split(TOKENS, dim)[rank]


def losses_of_a_rank(rank, masked):
    logits, ids, mask = make_batch(masked)
    found = {}
    for name, loss in LOSSES.items():
        own = part(rank, logits, 1).clone().requires_grad_()
        value = loss(own, part(rank, ids, 1), part(rank, mask, 0), dist.group.WORLD)
        value.backward()
        found[name] = value.detach(), own.grad
    return found


@pytest.mark.parametrize("masked", [False, True])
def test_losses_and_gradients_are_those_of_the_whole_batch(processes, masked):
    logits, ids, mask = make_batch(masked)
    parts = processes.run(losses_of_a_rank, masked)
    for name, loss in LOSSES.items():
        whole = logits.clone().requires_grad_()
        value = loss(whole, ids, mask, None)
        value.backward()
        for found in parts:
            torch.testing.assert_close(found[name][0], value.detach(), rtol=1e-12, atol=0)
        # The mean over ranks that data parallelism takes.
        got = torch.cat([found[name][1] for found in parts], 1) / len(parts)
        want = whole.grad
        if name not in ("layers", "layers_z"):
            got, want = got[0], want[0]
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15, msg=name)


def no_tokens(rank):
    empty, ids = torch.zeros(0, EXPERTS), torch.zeros(0, 2).long()
    return [float(loss(empty[None], ids[None], None, dist.group.WORLD)) for loss in LOSSES.values()]


def test_no_tokens_anywhere(processes):
    for values in processes.run(no_tokens, world=2):
        assert values == [0.0] * len(LOSSES)


def test_hf_compat_has_no_group(bad_input):
    with bad_input("load_balancing_loss", "group", "a group"):
        load_balancing_loss(torch.zeros(2, 4), top_k=1, hf_compat=True, group="a group")


# ----------------------------------------------------------------------------- layers, models


def losses_of_layers(rank):
    torch.manual_seed(0)
    layer = build_moe(8, 8, 4, 2, aux_losses=("load_balancing", "router_z"))
    layer.loss_group = dist.group.WORLD
    x = torch.randn(sum(TOKENS), 8, generator=torch.Generator().manual_seed(1))
    aux = layer(part(rank, x, 0), return_routing=True).aux_losses
    torch.manual_seed(0)
    model = zoo.create_model("deepseek", "tiny")
    text = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(2))
    named = {"load_balancing": 1.0, "device_balance": 1.0, "sequence_balance": 1.0}
    loss = model.loss(text[rank : rank + 1], coefficients=named, group=dist.group.WORLD)
    return [float(v) for v in aux.values()], {n: float(v) for n, v in loss.aux_losses.items()}


def test_layers_and_models_pass_the_group_on(processes):
    torch.manual_seed(0)
    layer = build_moe(8, 8, 4, 2, aux_losses=("load_balancing", "router_z"))
    x = torch.randn(sum(TOKENS), 8, generator=torch.Generator().manual_seed(1))
    want = [float(v) for v in layer(x, return_routing=True).aux_losses.values()]
    torch.manual_seed(0)
    model = zoo.create_model("deepseek", "tiny")
    text = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(2))
    named = {"load_balancing": 1.0, "device_balance": 1.0, "sequence_balance": 1.0}
    losses = model.loss(text, coefficients=named).aux_losses
    parts = processes.run(losses_of_layers)
    for aux, of_model in parts:
        torch.testing.assert_close(aux, want)
        for name in ("load_balancing", "device_balance"):
            torch.testing.assert_close(of_model[name], float(losses[name]))
    mean = sum(of_model["sequence_balance"] for _, of_model in parts) / len(parts)
    torch.testing.assert_close(mean, float(losses["sequence_balance"]))


# --------------------------------------------------------------------------- bias, statistics


def routers():
    torch.manual_seed(0)
    return torch.nn.ModuleList(TopKRouter(8, e, 2, expert_bias=True) for e in (6, 4, 6)).train()


def bias_and_stats(rank):
    calls = []
    true_reduce = dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return true_reduce(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        layers, stats = routers(), ExpertLoadStats()
        x = torch.randn(sum(TOKENS), 8, generator=torch.Generator().manual_seed(1))
        for i, layer in enumerate(layers):
            ids = layer(part(rank, x, 0)).topk_ids
            stats.update(ids, layer.num_experts, layer=i)
        update_expert_bias(layers, rate=0.5)
        stats.all_reduce()
        pair = dist.new_group([0, 1])
        alone = ExpertLoadStats()
        alone.update(torch.tensor([[rank]]), 4)
        if rank < 2:
            alone.all_reduce(pair)
    finally:
        dist.all_reduce = true_reduce
    return (
        calls,
        [layer.expert_bias for layer in layers],
        [stats.tokens_per_expert(i) for i in range(3)],
        [stats.max_rank_violation(2, i) for i in range(3)],
        alone.tokens_per_expert().tolist(),
    )


def test_bias_and_statistics_take_one_all_reduce(processes):
    layers, stats = routers(), ExpertLoadStats()
    x = torch.randn(sum(TOKENS), 8, generator=torch.Generator().manual_seed(1))
    for i, layer in enumerate(layers):
        stats.update(layer(x).topk_ids, layer.num_experts, layer=i)
    update_expert_bias(layers, rate=0.5)
    want = [
        [layer.expert_bias for layer in layers],
        [stats.tokens_per_expert(i) for i in range(3)],
    ]
    for rank, (calls, *got, violations, pair) in enumerate(processes.run(bias_and_stats)):
        assert calls == [16, 16] + [4] * (rank < 2)
        for ours, theirs in zip(got, want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        for i, violation in enumerate(violations):
            counts = stats.tokens_per_expert(i)
            loads = [float(half.sum()) for half in counts.chunk(2)]
            assert violation == pytest.approx(max(loads) * 2 / sum(loads) - 1)
        assert pair == {0: [1, 1, 0, 0], 1: [1, 1, 0, 0], 2: [0, 0, 1, 0], 3: [0, 0, 0, 1]}[rank]


def quantile_biases(rank):
    options = {"score_func": "sigmoid", "expert_bias": True, "bias_bins": 200}
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(build_router(8, e, 2, **options) for e in (EXPERTS, 4))
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):  # The second range of bins follows from the first bias.
        x = torch.randn(sum(TOKENS), 8, generator=generator)
        for layer in layers:
            layer(x if rank is None else part(rank, x, 0))
        update_expert_bias(layers, rule="quantile")
    return [layer.expert_bias for layer in layers]


def test_quantile_balancing_is_of_the_tokens_of_all_ranks(processes):
    first, *others = processes.run(quantile_biases)
    for got in others:
        assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True))
    # The product of fewer rows may round otherwise, and put a token into the next bin.
    torch.testing.assert_close(first, quantile_biases(None), rtol=0, atol=2 / 200)


def test_rank_load():
    stats = ExpertLoadStats()
    assert stats.update(torch.tensor([[0], [1], [1], [2]]), 4) is None
    assert stats.max_rank_violation(2) == 0.5
    assert stats.max_rank_violation(4) == stats.max_violation() == 1.0
    assert stats.max_rank_violation(1) == 0.0
    with pytest.raises(ValueError, match="ExpertLoadStats: num_ranks must divide the 4 experts"):
        stats.max_rank_violation(3)
    stats.reset()
    stats.update(torch.zeros(0, 1).long(), 4)
    assert stats.max_rank_violation(2) == 0.0
