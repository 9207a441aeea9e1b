"""Comparisons of fused modules with their own forward while a model is in use."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.quantized import weight_config
from transformers import DynamicCache

import moe_ops.hf
from moe_ops import _verify
from moe_ops.hf.decode import fused, step
from moe_ops.hf.experts import forward as experts
from moe_ops.layers import linear

from .models import CACHE, MODEL_TYPES, build, tokens
from .test_optimize import GREEDY, padded
from .test_quantize import make


@pytest.fixture
def compared(monkeypatch):
    """The comparisons that were made."""
    seen = []

    def judge(module, what, *args):
        seen.append((module.__dict__["_moe_ops_verify"].name, what))
        return original(module, what, *args)

    original = _verify._judge
    monkeypatch.setattr(_verify, "_judge", judge)
    return seen


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_model_in_use_agrees(model_type, weights, compared):
    model = make(model_type)
    group = 32 if weights == "int4" else None
    moe_ops.hf.optimize(model, quantization=weight_config(weights, group), verify=1)
    want = build(model_type) if weights is None else None
    got = model.generate(**padded(), **GREEDY)
    if want is not None:
        plain = make(model_type).generate(**padded(), **GREEDY)
        assert torch.equal(got, plain), "comparing changes nothing"
    assert compared
    with torch.no_grad():
        model(tokens(2, 60))  # Too many tokens for steps.
    names = {what for _, what in compared}
    assert "linear layer" in names
    if model_type in ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"):
        assert names >= {"attention", "experts", "router logits", "routing weights"}


BROKEN = {
    "attention": (step, "attention_decode"),
    "shared experts": (step, "gated_mlp_decode"),
    "router logits": (fused, "router_linear"),
    "experts": (experts, "expert_ffn"),
    "norm": (fused, "add_rms_norm"),
    "linear layer": (linear, "grouped_gemm"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_wrong_kernel_is_found(what, monkeypatch):
    """Each kind of comparison fails where the op behind it computes something else."""
    module, name = BROKEN[what]
    op = getattr(module, name)

    def wrong(*args, **kwargs):
        y = op(*args, **kwargs)
        return (y[0] * 1.01, *y[1:]) if isinstance(y, tuple) else y * 1.01

    model = build("qwen2_moe")
    moe_ops.hf.optimize(model, verify=1)
    monkeypatch.setattr(module, name, wrong)
    if what == "norm":  # In fused layers an op of the attention reads the weight.
        with pytest.raises(_verify.VerificationError, match=r"the norm of model\.norm in its call"):
            model.model.norm(torch.randn(2, 32))
        return
    with (
        torch.no_grad(),
        pytest.raises(
            _verify.VerificationError, match=rf"the {what} of \S+ in its call 1 differs .* by 0\.0"
        ),
    ):
        model(tokens(1, 5), **{CACHE: DynamicCache(config=model.config)})


def test_a_warning_instead_of_an_error(monkeypatch):
    monkeypatch.setenv("MOE_OPS_VERIFY", "warn:2")
    model = build("qwen3_moe")
    moe_ops.hf.optimize(model)
    monkeypatch.setattr(linear, "grouped_gemm", lambda x, w, *_, **__: F.linear(x, w[0] * 2))
    name, x = "model.layers.0.self_attn.q_proj", torch.randn(1, 32)
    with torch.no_grad():
        model.get_submodule(name)(x)
        with pytest.warns(UserWarning, match=rf"linear layer of {name} in its call 2 differs"):
            model.get_submodule(name)(x)


def test_one_call_in_n(compared):
    model = build("mixtral")
    moe_ops.hf.optimize(model, verify=5)
    with torch.no_grad():
        for _ in range(11):
            model(tokens(1, 3))
    counts = [n for n, what in compared if n == "lm_head"]
    assert len(counts) == 2


def test_restore_ends_comparisons(compared):
    model = build("mixtral")
    moe_ops.hf.optimize(model, verify=1)
    moe_ops.hf.restore(model)
    with torch.no_grad():
        model(tokens(1, 3))
    assert not compared
    assert not any("_moe_ops_verify" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("given", [-1, "often", True, "warn:x", 1.5])
def test_bad_numbers(given):
    with pytest.raises(ValueError, match=r"verify \(MOE_OPS_VERIFY\) must be a number of calls"):
        moe_ops.hf.optimize(build("mixtral"), verify=given)
