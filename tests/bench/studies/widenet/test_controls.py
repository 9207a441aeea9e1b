"""The controls of WideNet: against their equations, and against each other."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bench.studies.widenet import controls
from bench.studies.widenet.controls import ControlConfig
from tests.zoo.lm.common import sharpen, tokens_of
from tests.zoo.widenet.test_model import (
    SMALL,
    VISIONS,
    check_language,
    check_language_model,
    check_vision,
)

FORMS = {
    "own norms": {},
    "shared norms": {"sharing": "shared_norms"},
    "unshared": {"sharing": "none"},
    "dense": {"num_experts": 1, "top_k": 1},
}


def build(form: str, **changes):
    torch.manual_seed(0)
    config = ControlConfig(**{**SMALL, **FORMS[form], **changes})
    return sharpen(controls.build(config)).double()


@pytest.mark.parametrize("form", FORMS)
def test_language_equals_its_equations(form):
    check_language(build(form).eval())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("changes", VISIONS, ids=str)
def test_vision_equals_its_equations(form, changes):
    check_vision(build(form, trunk="vision", **changes).eval())


def test_equal_norms_are_shared_norms():
    own, shared = build("own norms").eval(), build("shared norms").eval()
    for i in range(3):
        own.layers[i].load_state_dict(shared.layers[0].state_dict())
    for name in ("blocks", "embed_tokens", "norm", "lm_head"):
        getattr(own, name).load_state_dict(getattr(shared, name).state_dict())
    tokens = tokens_of(own)
    assert torch.equal(own(tokens), shared(tokens))
    unshared = build("unshared").eval()
    for i in range(3):
        unshared.blocks[i].load_state_dict(own.blocks[0].state_dict())
    for name in ("layers", "embed_tokens", "norm", "lm_head"):
        getattr(unshared, name).load_state_dict(getattr(own, name).state_dict())
    assert torch.equal(own(tokens), unshared(tokens))


@pytest.mark.parametrize("preset", ["b", "l", "h"])
def test_parameters(preset):
    config = getattr(ControlConfig, preset)()
    with torch.device("meta"):
        models = [controls.build(dataclasses.replace(config, sharing=s)) for s in controls.SHARINGS]
    count, fewer, more = (m.num_parameters()["total"] for m in models)
    depth, hidden = config.num_layers, config.hidden_size
    assert count - fewer == (depth - 1) * 4 * hidden
    assert more - count == (depth - 1) * sum(p.numel() for p in models[0].blocks.parameters())


def test_counts_active_parameters():
    unshared = build("unshared").num_parameters()
    bank = 4 * (2 * 16 * 12 + 12 + 16)
    assert unshared["total"] - unshared["active"] == 3 * bank // 2


@pytest.mark.parametrize("form", FORMS)
def test_is_a_language_model(form, tmp_path):
    check_language_model(build(form), tmp_path)


def test_a_dense_network_has_no_losses_of_routing():
    model = build("dense")
    out = model.loss(tokens_of(model, 2, 9))
    assert out.aux_losses == {} and out.routing == []


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="sharing must be one of own_norms"):
        ControlConfig(sharing="half")
