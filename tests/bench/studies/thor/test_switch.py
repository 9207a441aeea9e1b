"""The Switch Transformer that THOR is compared with: its equations, balance and checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bench.studies.thor.switch import Switch, SwitchConfig
from tests.zoo.lm.common import sharpen
from tests.zoo.thor.test_model import SMALL, check_checkpoint, check_equations, check_steps, rows

from moe_ops.zoo.thor.model import PAD


def build() -> Switch:
    torch.manual_seed(0)
    model = Switch(SwitchConfig(**SMALL))
    sharpen(model)
    return model.double()


def test_equals_its_equations():
    check_equations(build().eval(), None, "best")


def test_balances_tokens_that_are_no_padding():
    model = build().train()
    source, target = rows(5, 3), rows(4, 6, seed=1)
    out = model.loss(target, source)
    longer = [F.pad(t, (0, 3), value=PAD) for t in (target, source)]
    assert out.balance > 0
    torch.testing.assert_close(out.balance, model.loss(*longer).balance)
    out.loss.backward()
    assert model.decoder_layers[2].ffn.router.weight.grad.abs().sum() > 0


def test_steps_with_a_cache_equal_the_whole():
    check_steps(build().eval(), None)


def test_checkpoints(tmp_path):
    check_checkpoint(build().float().eval(), tmp_path)
