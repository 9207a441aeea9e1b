"""The networks that MoFME is compared with, against their equations."""

from __future__ import annotations

import pytest
import torch
from bench.studies.mofme.rivals import FFNMixture, PlainMoFME, Restoration, RivalConfig
from tests.zoo.mofme.test_layers import check_equations, film_by_hand, gelu, layer
from tests.zoo.mofme.test_model import SMALL, images


def ffn_by_hand(made, n, best, weights):
    bank, out = made.experts, 0
    for e, w in zip(best, weights, strict=True):
        inner = gelu(bank.w_gate_up[e] @ n + bank.b_gate_up[e])
        out = out + w * (bank.w_down[e] @ inner + bank.b_down[e])
    return out


@pytest.mark.parametrize(
    ("kind", "by_hand"), [(PlainMoFME, film_by_hand), (FFNMixture, ffn_by_hand)]
)
def test_equals_a_plain_transcription(kind, by_hand):
    check_equations(layer(kind), by_hand)


def test_a_plain_router_has_the_weights_of_the_other():
    torch.manual_seed(0)
    plain = Restoration(RivalConfig(**SMALL, router="plain"))
    torch.manual_seed(0)
    other = Restoration(RivalConfig(**SMALL))
    for name, value in other.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name


def test_a_dense_network_has_no_routing():
    made, routing = Restoration(RivalConfig(**SMALL, experts="dense"))(images())
    assert torch.equal(made, images()) and routing == []


def test_bad_configs():
    with pytest.raises(ValueError, match="experts must be one of film, ffn, dense, got 'conv'"):
        RivalConfig(experts="conv")
    with pytest.raises(ValueError, match="router must be one of uncertainty, plain, got 'best'"):
        RivalConfig(router="best")
