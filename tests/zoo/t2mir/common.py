"""Models and inputs of the tests of T2MIR."""

from __future__ import annotations

import dataclasses

from torch import nn

from moe_ops.zoo.t2mir import T2MIR, T2MIRConfig

B, S, E = 4, 9, 6

TINY = T2MIRConfig.tiny()


def make(**changes) -> T2MIR:
    return drawn(T2MIR(dataclasses.replace(TINY, **changes)))


def drawn(model: T2MIR) -> T2MIR:
    for name, p in model.named_parameters():
        if p.dim() > 1 and "target" not in name:
            nn.init.normal_(p, std=0.25)
    return model
