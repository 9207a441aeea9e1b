"""T2MIR without one of its two kinds of experts, or dense."""

from __future__ import annotations

import pytest
import torch
from bench.studies.t2mir.ablations import Ablation, AblationConfig
from tests.zoo.t2mir.common import TINY, drawn, make
from tests.zoo.t2mir.test_model import check_causal, inputs


@pytest.mark.parametrize("variant", ["ad", "dpt"])
@pytest.mark.parametrize("moe", ["token", "task", "none"])
@pytest.mark.parametrize("num_actions", [0, 5])
def test_later_tokens_never_change_earlier_predictions(variant, moe, num_actions):
    changes = {"variant": variant, "moe": moe, "num_actions": num_actions}
    model = drawn(Ablation(AblationConfig(**{**vars(TINY), **changes})))
    check_causal(model.double().eval())
    model.update_target()


def test_with_both_it_is_the_model():
    ours = make()
    model = Ablation(AblationConfig(**vars(TINY)))
    model.load_state_dict(ours.state_dict())
    args = inputs(ours)
    assert torch.equal(model.eval()(*args).actions, ours.eval()(*args).actions)
    with pytest.raises(ValueError, match="moe must be one of both, token, task, none"):
        AblationConfig(moe="all")
