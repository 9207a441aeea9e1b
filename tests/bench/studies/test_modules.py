"""New experts that learn while the old ones stay; how often experts are used."""

from __future__ import annotations

import pytest
import torch
from bench.studies import modules
from tests.zoo.lm.common import tokens_of
from tests.zoo.moduleformer.common import build


def test_old_experts_stay_while_new_ones_learn():
    """Bitwise, with momentum, adaptive steps and weight decay."""
    model = build().float()
    tokens = tokens_of(model, 4, 24)
    frozen = modules.freeze_old(model, model.insert_experts(attention=1, mlp=2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.5)
    handle = modules.hold_frozen(frozen, optimizer)
    first = None
    for _ in range(12):
        optimizer.zero_grad()
        out = model.loss(tokens)
        (out.loss + 1e-3 * modules.new_rows_penalty(frozen)).backward()
        optimizer.step()
        first = out.cross_entropy.item() if first is None else first
    for name, p in model.named_parameters():
        if name in frozen:
            old = len(frozen[name].kept)
            assert torch.equal(p[:old], before[name][:old]), name
            assert not torch.equal(p[old:], before[name][old:]), name
        else:
            assert torch.equal(p, before[name]), name
    assert model.loss(tokens).cross_entropy.item() < first
    # The old model is still there: take the old experts and it is what it was.
    handle.remove()
    modules.unfreeze(model, frozen)
    assert all(p.requires_grad for p in model.parameters())


def test_frequencies_are_shares_of_tokens():
    model = build().train()
    batches = [tokens_of(model, 2, 9), tokens_of(model, 1, 30)]
    found = modules.expert_frequencies(model, batches)
    assert model.training and set(found) == {
        f"layers.{i}.{kind}" for i in (0, 1) for kind in ("attention", "mlp")
    }
    model.eval()
    for name, frequency in found.items():
        counts = torch.zeros(len(frequency))
        for tokens in batches:
            for r in model(tokens, return_routing=True).routing:
                if r.layer == name:
                    counts += torch.bincount(r.routing.topk_ids.flatten(), minlength=len(counts))
        torch.testing.assert_close(frequency, counts.double() / 48)
        assert float(frequency.sum()) == pytest.approx(2)
