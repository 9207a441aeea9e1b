"""The controller of top-p routing."""

from __future__ import annotations

import pytest
import torch
from bench.studies.topp_controller import TopPController, experts_per_token
from tests.zoo.lm.common import tokens_of
from tests.zoo.test_topp import build

from moe_ops.layers import MoE


@pytest.mark.parametrize(("start", "target"), [(0.2, 3.0), (0.95, 1.5)])
def test_controller_reaches_its_target(start, target):
    model = build(top_p=start)
    controller = TopPController(model, target)
    for _ in range(120):
        with torch.no_grad():
            routing = model(tokens_of(model, 4, 32), return_routing=True).routing
        mean = controller.step(routing)
    assert mean == pytest.approx(target, abs=0.15) and controller.mean == mean
    assert all(m.router.top_p == controller.top_p for m in model.modules() if isinstance(m, MoE))


def test_controller_does_not_wind_up():
    """A target out of reach pins p at its end, and it comes back at once when it is in reach."""
    model = build()
    controller = TopPController(model, 6.0, highest=0.5)
    tokens = tokens_of(model, 4, 32)

    def step():
        with torch.no_grad():
            controller.step(model(tokens, return_routing=True).routing)

    for _ in range(100):
        step()
    assert controller.top_p == 0.5
    controller.target = 1.0
    for _ in range(25):
        step()
    assert controller.top_p < 0.4


def test_controller_sums_over_ranks(monkeypatch):
    model = build()
    controller = TopPController(model, 2.0)
    routing = model(tokens_of(model, 2, 8), return_routing=True).routing
    own = float(torch.cat(list(experts_per_token(routing).values())).sum())

    def all_reduce(both, group=None):
        both += torch.tensor([68.0, 68.0])

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert controller.step(routing) == pytest.approx((own + 68) / (32 + 68))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: TopPController(torch.nn.Linear(2, 2), 2.0), "must hold a TopPRouter"),
        (lambda: TopPController(build(), 0.5), "target must be at least 1, got 0.5"),
        (lambda: TopPController(build(), 2.0, lowest=0.9, highest=0.5), "got 0.9 and 0.5"),
    ],
)
def test_bad_controllers(call, words):
    with pytest.raises(ValueError, match=f"TopPController: .*{words}"):
        call()
