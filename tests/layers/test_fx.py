"""torch.fx.symbolic_trace of a model of layers: each is one node, as those of torch.nn are."""

from __future__ import annotations

import pytest
import torch
from tests.contract.test_layer_transforms import MODULES, input_of, module_of, run
from tests.helpers.moe import build_moe
from torch import Tensor, fx, nn


@pytest.mark.parametrize("name", [n for n in MODULES if not n.startswith("Experts.outputs")])
def test_layer_is_a_leaf(name):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = module_of(name)

        def forward(self, x: Tensor) -> Tensor:
            if "Router" in name:
                return self.layer(x * 2).topk_weights
            return run(name, self.layer, x * 2)

    model, x = Model(), input_of(name)
    traced = fx.symbolic_trace(model)
    assert "layer" in {n.target for n in traced.graph.nodes if n.op == "call_module"}
    torch.testing.assert_close(traced(x), model(x))


def test_what_a_layer_returns_can_be_taken_apart():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = build_moe(8, 6, 4, 2, aux_losses=["load_balancing"])

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out = self.moe(x, return_routing=True)
            return x + out.y, out.aux_losses["load_balancing"]

    model = Model()
    x = torch.randn(5, 8)
    torch.testing.assert_close(fx.symbolic_trace(model)(x), model(x))
