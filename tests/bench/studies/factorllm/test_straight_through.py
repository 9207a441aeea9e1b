"""The router that the language model loss teaches."""

from __future__ import annotations

import pytest
import torch
from bench.studies.factorllm.straight_through import StraightThrough
from tests.zoo.lm import common
from tests.zoo.lm.common import sharpen, tokens_of
from tests.zoo.test_factorllm import SMALL, build_dense, check_equations, teaches

from moe_ops.zoo.factorllm import FactorLLMConfig


def build(**changes) -> StraightThrough:
    torch.manual_seed(0)
    return sharpen(StraightThrough(FactorLLMConfig(**SMALL, **changes))).double()


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_equals_its_equations(top_k):
    check_equations(build(top_k=top_k))


def test_the_language_model_loss_teaches_the_router():
    dense = build_dense()
    model = StraightThrough.from_dense(dense, top_k=2)
    assert teaches(model, model.loss(tokens_of(dense, 2, 12)).loss)
    common.check_gradients_flow(build(top_k=2))
