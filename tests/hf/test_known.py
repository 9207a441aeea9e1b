"""Modules of every family of transformers are known, and agree with their formulas."""

from __future__ import annotations

import functools
import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers.models.mixtral import modeling_mixtral as mixtral

import moe_ops.hf
from moe_ops.hf.decode import agreement
from moe_ops.hf.decode.fused import kind_of
from moe_ops.hf.decode.known_parts import Inventory, LayerParts
from moe_ops.hf.decode.stock import take_stock
from moe_ops.hf.models import known, source

from . import families
from .models import build, tokens

# Kinds of modules that are known in the models of families.test, in transformers 5.25.
KNOWN = {
    "afmoe": "norm",
    "aria": "attention block norm router shared",
    "axk1": "attention network norm router",
    "axk2": "network norm",
    "bailing_hybrid": "block norm router shared",
    "beam": "norm router",
    "cohere2_moe": "router",
    "dbrx": "",
    "deepseek_ocr2": "attention block network norm router shared",
    "deepseek_v2": "attention block network norm router shared",
    "deepseek_v3": "attention block network norm router shared",
    "deepseek_v32": "block network norm router shared",
    "deepseek_v4": "norm",
    "diffusion_gemma": "norm",
    "dots1": "attention block network norm router shared",
    "dots3_note": "block network norm router shared",
    "ernie4_5_moe": "block norm",
    "ernie4_5_vl_moe": "norm",
    "exaone_moe": "attention block network norm router shared",
    "flex_olmo": "norm router",
    "flint": "attention block network norm shared",
    "gemma4": "norm",
    "glm4_moe": "attention block network norm router shared",
    "glm4_moe_lite": "attention block network norm router shared",
    "glm4v_moe": "attention block network norm router shared",
    "glm5_next": "norm router",
    "glm_moe_dsa": "norm router",
    "gpt_oss": "attention block norm router",
    "granitemoe": "attention block norm router",
    "granitemoe_swa": "norm router",
    "granitemoehybrid": "norm router",
    "granitemoeshared": "norm router",
    "hunyuan_v1_moe": "norm",
    "hy_v3": "attention network norm",
    "hy_v4": "norm router",
    "hy_v4_vl": "norm router",
    "inkling": "norm",
    "inkling2": "norm",
    "inkling2_loop": "norm",
    "jamba": "norm router",
    "jetmoe": "norm",
    "kimi_linear": "block norm router shared",
    "kolibri1": "norm",
    "laguna": "network norm",
    "lara_mini": "attention block norm router shared",
    "lfm2_moe": "norm",
    "llama4": "norm",
    "mellum": "attention block network norm router",
    "mimo_v2_flash": "network norm router",
    "minimax": "norm router",
    "minimax_m2": "attention norm",
    "minimax_m3_vl": "",
    "mistral4": "block network norm shared",
    "mistral_large4": "norm",
    "mixtral": "attention block norm router",
    "muse_spark": "norm",
    "nemotron_h": "norm router",
    "olmoe": "attention block norm router",
    "openai_privacy_filter": "norm",
    "phimoe": "",
    "qwen2_moe": "attention block network norm router shared",
    "qwen3_5_moe": "router",
    "qwen3_moe": "attention block network norm router",
    "qwen3_next": "router",
    "qwen3_omni_moe": "attention block network norm router",
    "qwen3_vl_moe": "attention block network norm router",
    "qwen4_exp": "router",
    "solar_open": "attention block norm router shared",
    "unlimited_ocr": "block network norm router shared",
    "zaya": "norm",
}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family(family):
    """Modules are known by their code, and all of them agree with the formulas of the tables."""
    stock = take_stock(families.build(family))
    found = {kind for kind in ("norm", "router") if getattr(stock, f"{kind}s")}
    for parts in stock.layers.values():
        names = ("attention", "block", "network", "shared")
        found |= {name for name in names if getattr(parts, name) is not None}
    for reason in stock.left.values():
        assert "differs from the formula" not in reason and "to compare" not in reason
    if transformers.__version__.startswith("5.25."):
        assert found == set(KNOWN[family].split())


def test_every_family_is_listed():
    assert set(families.FAMILIES) <= KNOWN.keys()


# ------------------------------------------------------------------------------------------ digests


class Base(mixtral.MixtralRMSNorm):
    pass


def test_a_digest_is_of_the_code_and_not_of_names():
    from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm
    from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

    codes = [source.read(c) for c in (mixtral.MixtralRMSNorm, OlmoeRMSNorm, PhimoeTopKRouter)]
    assert codes[0].digest == codes[1].digest != codes[2].digest
    assert source.read(nn.Module, "no_such_method") is None


def test_helpers_are_part_of_the_code(monkeypatch):
    attention = mixtral.MixtralAttention
    before = source.read(attention)
    assert before.is_intact() and known.entry_of("attention", attention)
    rotate = mixtral.apply_rotary_pos_emb

    @functools.wraps(rotate)
    def backwards(q, k, cos, sin, **kwargs):
        return rotate(q, k, cos, -sin, **kwargs)

    monkeypatch.setattr(mixtral, "apply_rotary_pos_emb", backwards)
    assert not before.is_intact()
    assert source.read(attention).digest != before.digest
    with pytest.raises(known.Unknown, match=r"no attention with the code that mixtral\.Mixtral"):
        known.entry_of("attention", attention)
    monkeypatch.undo()
    assert known.entry_of("attention", attention)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda norm: setattr(norm, "__class__", Base), "Base is not a class of transformers"),
        (lambda norm: setattr(norm, "forward", lambda x: x), "has a forward of its own"),
        (lambda norm: setattr(norm, "variance_epsilon", None), "a number called variance_epsilon"),
        (lambda norm: norm.register_parameter("bias", nn.Parameter(torch.ones(4))), "only param"),
        (
            lambda norm: nn.utils.parametrize.register_parametrization(norm, "weight", nn.Tanh()),
            "ParametrizedMixtralRMSNorm is not a class of transformers",
        ),
    ],
)
def test_what_is_no_longer_known(change, reason):
    norm = mixtral.MixtralRMSNorm(4)
    assert known.find("norm", norm)
    change(norm)
    with pytest.raises(known.Unknown, match=reason):
        known.find("norm", norm)


# ----------------------------------------------------------------------------------- registration


class OwnNorm(nn.Module):
    clamp = 1e9

    def __init__(self, size):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), 1e-5

    def forward(self, x):
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (x * self.weight).clamp(-self.clamp, self.clamp)


class Clamped(OwnNorm):
    clamp = 1.5


class Offset(OwnNorm):
    def forward(self, x):
        return super().forward(x + 1e-3)


def with_norm(cls):
    model = build("mixtral")
    for layer in model.model.layers:
        layer.input_layernorm = cls(32)
    return model


def test_a_class_that_a_user_registers():
    model, ids = with_norm(OwnNorm), tokens(1, 5)
    name = "model.layers.0.input_layernorm"
    assert "moe_ops.hf.register_norm can say" in take_stock(model).left[name]
    moe_ops.hf.register_norm(OwnNorm, eps="eps")
    with torch.no_grad():
        want = model(ids).logits
        report = moe_ops.hf.optimize(model)
        assert report[name] == "fused norm"
        torch.testing.assert_close(model(ids).logits, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("cls", "size"), [(Clamped, "1"), (Offset, "0.001")])
def test_a_registered_class_must_agree(cls, size):
    """A formula that does not fit, only for large numbers or only for small ones, is not used."""
    moe_ops.hf.register_norm(cls, eps="eps")
    report = moe_ops.hf.optimize(with_norm(cls))
    left = report.left["model.layers.0.input_layernorm"]
    assert left == f"it differs from the formula of its class on inputs of size {size}"


def test_only_classes_of_modules_are_registered():
    for register in (moe_ops.hf.register_network, moe_ops.hf.register_block):
        with pytest.raises(TypeError, match=r"cls must be a class of modules, got 3"):
            register(3)


# ------------------------------------------------------------------------------------------ pickles


def test_a_pickle_is_read_with_the_code_of_today(monkeypatch):
    model = build("mixtral")
    moe_ops.hf.optimize(model)
    layer = model.model.layers[0]
    data = pickle.dumps(layer)
    again = pickle.loads(data)
    assert kind_of(again) == "layer" and isinstance(again._moe_ops_fused, LayerParts)
    assert again._moe_ops_fused.attention.is_still(again.self_attn)

    def forward(self, hidden_states, **kwargs):
        return hidden_states, None

    monkeypatch.setattr(mixtral.MixtralAttention, "forward", forward)
    other = pickle.loads(data)
    assert other._moe_ops_fused.attention is None
    monkeypatch.setattr(mixtral.MixtralRMSNorm, "forward", lambda self, x: x)
    assert type(pickle.loads(data).input_layernorm) is mixtral.MixtralRMSNorm


# ---------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("size", [0.01, 3.0, 500.0])
def test_checks_see_a_clamp_at_any_size(size):
    """A comparison that no change could fail would prove nothing."""
    layer = build("qwen2_moe").model.layers[0]
    inventory = Inventory()
    for kind, module in (
        ("norm", layer.input_layernorm),
        ("attention", layer.self_attn),
        ("network", layer.mlp.shared_expert),
        ("block", layer.mlp),
        ("layer", layer),
    ):
        entry = inventory.find(kind, module).entry
        forward = type(module).forward

        def clamped(self, *args, forward=forward, **kwargs):
            y = forward(self, *args, **kwargs)
            first = y[0] if isinstance(y, tuple) else y
            first = first.clamp(-size, size)
            return (first, *y[1:]) if isinstance(y, tuple) else first

        assert agreement.why_not(kind, module, entry) is None
        module.__class__ = type("Clamped", (type(module),), {"forward": clamped})
        if kind != "norm" or size < 10:  # A norm's outputs have size one.
            assert "differs from the formula" in agreement.why_not(kind, module, entry), kind
