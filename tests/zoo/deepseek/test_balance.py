"""Losses that balance the load, and the bias that does."""

from __future__ import annotations

import torch

from moe_ops import zoo
from moe_ops.layers import ExpertLoadStats, update_expert_bias
from moe_ops.zoo.deepseek import DeepSeekConfig

from ..lm.common import sharpen, tokens_of
from .common import SMALL, build


def test_losses_are_what_they_say():
    """Expert, device and sequence balance of arXiv 2401.06066 eq. 12-17 and 2412.19437 eq. 17-20,
    with loops over devices and sequences."""
    model = build("v1")
    tokens, e, k, d = tokens_of(model, 3, 9), 8, 3, 4
    names = ("load_balancing", "device_balance", "sequence_balance")
    out = model.loss(tokens, coefficients=dict.fromkeys(names, 0.5))
    (routed,) = out.routing  # One of the two layers is dense.
    s = routed.routing.router_logits.double().softmax(-1)
    ids = routed.routing.topk_ids
    t = len(s)
    f = torch.tensor([e / (k * t) * int((ids == i).sum()) for i in range(e)])
    mean = s.mean(0)
    expert = sum(f[i] * mean[i] for i in range(e))
    device = 0.0
    for group in range(d):
        members = range(group * e // d, (group + 1) * e // d)
        device += sum(f[i] for i in members) / len(members) * sum(mean[i] for i in members)
    sequence = 0.0
    for b in range(3):
        part = slice(b * 8, (b + 1) * 8)
        for i in range(e):
            sequence += e / (k * 8) * int((ids[part] == i).sum()) * s[part, i].mean() / 3
    for name, expected in zip(names, (expert, device, sequence), strict=True):
        torch.testing.assert_close(
            out.aux_losses[name].double(), expected.double(), rtol=1e-5, atol=1e-6
        )
    total = out.cross_entropy + 0.5 * sum(out.aux_losses.values())
    torch.testing.assert_close(out.loss, total)


def test_default_losses():
    assert set(DeepSeekConfig.tiny_v1().aux_coefficients()) == {"load_balancing", "device_balance"}
    assert set(DeepSeekConfig.v3().aux_coefficients()) == {"sequence_balance"}


def balance_after(model, optimizer, group=None):
    def hook(*_):
        update_expert_bias(model, rate=model.config.bias_update_rate, group=group)

    return optimizer.register_step_post_hook(hook)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.0)


def test_bias_follows_the_load_of_all_micro_batches():
    model = build("v3").train()
    router = model.layers[1].mlp.router
    before = router.expert_bias.clone()
    optimizer = sgd(model)
    handle = balance_after(model, optimizer)
    batches = [tokens_of(model, 2, 17) for _ in range(3)]
    counts = torch.zeros(8, dtype=torch.int64)
    for batch in batches:
        out = model.loss(batch)
        out.loss.backward()
        counts += torch.bincount(out.routing[0].routing.topk_ids.flatten(), minlength=8)
    assert torch.equal(router.tokens_per_expert, counts)
    optimizer.step()
    step = model.config.bias_update_rate * torch.sign(counts.double().mean() - counts)
    torch.testing.assert_close(router.expert_bias, before + step.float())
    assert int(router.tokens_per_expert.sum()) == 0

    held = router.expert_bias.clone()
    handle.remove()
    model.loss(batches[0]).loss.backward()
    optimizer.step()
    assert torch.equal(router.expert_bias, held)
    model.eval()
    with torch.no_grad():
        counted = router.tokens_per_expert.clone()
        model(batches[0])
    assert torch.equal(router.tokens_per_expert, counted)


def test_bias_sums_over_ranks(monkeypatch):
    """The counts that are reduced are those of the whole step, and the sum decides."""
    model = build("v3").train()
    router = model.layers[1].mlp.router
    others = torch.tensor([900, 0, 0, 0, 0, 0, 0, 0])
    groups = []

    def all_reduce(counts, group=None):
        groups.append(group)
        counts += others

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    optimizer = sgd(model)
    balance_after(model, optimizer, group="a group")
    before = router.expert_bias.clone()
    model.loss(tokens_of(model, 2, 17)).loss.backward()
    optimizer.step()
    assert groups == ["a group"]
    moved = (router.expert_bias - before) / model.config.bias_update_rate
    torch.testing.assert_close(moved, torch.tensor([-1.0] + 7 * [1.0]), rtol=1e-3, atol=1e-3)


def test_bias_is_no_parameter():
    model = build("v3")
    assert "layers.1.mlp.router.expert_bias" not in dict(model.named_parameters())


def test_bias_balances():
    """From a skewed start, steps of the bias alone even out the load."""
    model = zoo.create_model(
        "deepseek", **SMALL, num_groups=1, num_topk_groups=1, group_score="max"
    )
    sharpen(model).train()
    router = model.layers[1].mlp.router
    router.expert_bias.copy_(torch.linspace(-0.3, 0.3, 8))
    optimizer = sgd(model)
    balance_after(model, optimizer)
    tokens = tokens_of(model, 8, 33)

    def max_violation():
        stats = ExpertLoadStats()
        with torch.no_grad():
            routing = model.loss(tokens).routing[0].routing
        stats.update(routing.topk_ids, 8)
        return stats.max_violation()

    start = max_violation()
    router.tokens_per_expert.zero_()
    for _ in range(150):
        with torch.no_grad():
            model(tokens)
        optimizer.step()
    end = max_violation()
    assert start > 0.5 and end < start / 3, (start, end)
