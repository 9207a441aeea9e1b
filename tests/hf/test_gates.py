"""Activations between the two products of an expert: known ones are fused, others are called."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import (
    OpenAIPrivacyFilterExperts,
)

from moe_ops.hf.models.gates import activation_name, fused_activation

from .test_experts import assert_like_eager, gate_swapped, make_experts

GATED = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_python": "geglu",
    "gelu_new": "geglu_tanh",
    "gelu_fast": "geglu_tanh",
    "gelu_accurate": "geglu_tanh",
    "gelu_pytorch_tanh": "geglu_tanh",
    "relu": "reglu",
    "relu2": None,
    "gelu_10": None,
    "relu6": None,
    "mish": None,
    "tanh": None,
}


@pytest.mark.parametrize("act", GATED)
def test_gated_activations(act):
    experts = make_experts(act)
    assert (fused_activation(experts) or {}).get("activation") == GATED[act]
    assert_like_eager(experts)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_new", "relu", "relu2", "relu6"])
def test_plain_activations(act):
    experts = make_experts(act, has_gate=False)
    assert (fused_activation(experts) is None) == (act == "relu6")
    assert_like_eager(experts)


def test_torch_gelu_modules_are_known():
    assert activation_name(nn.GELU()) == "gelu"
    assert activation_name(nn.GELU(approximate="tanh")) == "gelu_tanh"


@pytest.mark.parametrize("act", [type("Scaled", (nn.SiLU,), {})(), torch.nn.functional.silu])
def test_subclasses_and_functions_are_unknown(act):
    assert activation_name(act) is None


def gate_clamped(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=self.limit)
    return (up.clamp(-self.limit, self.limit) + 1) * gate * torch.sigmoid(self.alpha * gate)


def gate_clamped_far_out(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate.clamp(max=1000.0)) * up


def gate_fixed_alpha(self, gate_up):
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate = gate.clamp(max=self.limit)
    return (up.clamp(-self.limit, self.limit) + 1) * gate * torch.sigmoid(1.702 * gate)


def gate_with_an_option(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    limit = getattr(self, "my_limit", None)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return self.act_fn(gate) * up


def gate_with_other_names(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * up


CLAMPED = {"activation": "swiglu_oai", "alpha": 1.25, "limit": 1.5}
GATES = {
    "gpt_oss": (GptOssExperts._apply_gate, {**CLAMPED, "interleaved": True}),
    "privacy_filter": (OpenAIPrivacyFilterExperts._apply_gate, {**CLAMPED, "interleaved": False}),
    "mixtral": (MixtralExperts._apply_gate, {"activation": "swiglu"}),
    "other_names": (gate_with_other_names, None),
    "deepseek_v4": (
        DeepseekV4Experts._apply_gate,
        {"activation": "swiglu_clamped", "limit": 1.5, "interleaved": False},
    ),
    "clamped": (gate_clamped, None),
    "far_out": (gate_clamped_far_out, None),
    "swapped": (gate_swapped, None),
    "fixed_alpha": (gate_fixed_alpha, None),
    "option": (gate_with_an_option, None),
}


@pytest.mark.parametrize("case", GATES)
def test_gates_are_known_by_their_code(case):
    gate, expected = GATES[case]
    experts = make_experts(gate=gate)
    experts.alpha, experts.limit = 1.25, 1.5
    assert fused_activation(experts) == expected


def test_bounds_that_may_be_none():
    """With bounds the experts' own gate is called."""
    pytest.importorskip("transformers", minversion="5.25")
    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    experts = make_experts(gate=Step3p7Experts._apply_gate)
    for limit, expected in ((None, {"activation": "swiglu"}), (0.3, None)):
        experts.limit = limit
        assert fused_activation(experts) == expected
        assert_like_eager(experts)


def test_an_option_of_a_gate_is_read_at_each_call():
    experts = make_experts(gate=gate_with_an_option)
    assert_like_eager(experts)
    experts.my_limit = 0.1
    assert_like_eager(experts)


@pytest.mark.parametrize("gate", [gate_clamped_far_out, gate_swapped])
def test_an_unknown_gate_is_used_as_it_is(gate):
    experts = make_experts(gate=gate)
    assert fused_activation(experts) is None
    assert_like_eager(experts)


def test_a_gate_replaced_on_the_module_is_used():
    experts = make_experts()
    experts._apply_gate = types.MethodType(gate_swapped, experts)
    assert_like_eager(experts)
