"""The experts function on its own: every layout flag, activation, dtype mix and odd routing."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import (
    OpenAIPrivacyFilterExperts,
)

import moe_ops.hf
from moe_ops.hf.models.gates import fused_activation

from .models import BLOCK_NAMES, DECORATED, build

T, H, I, E, K = 17, 16, 12, 5, 2
EPS = torch.finfo(torch.float32).eps


def config(**overrides):
    values = {
        "hidden_size": H,
        "moe_hidden_size": H,
        "moe_latent_size": None,
        "intermediate_size": I,
        "moe_intermediate_size": I,
        "num_local_experts": E,
        "n_routed_experts": E,
        "moe_num_experts": E,
        "hidden_act": "silu",
        "mlp_hidden_act": "relu2",
        "swiglu_alpha": 1.3,
        "swiglu_limit": 0.7,
        "post_norm_eps": 1e-6,
        "_experts_implementation": "eager",
    }
    return types.SimpleNamespace(**{**values, **overrides})


def draw(experts: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, H**-0.5)
    return experts


def make_experts(act="silu", gate=None, norm=False, **flags):
    """Experts as a modeling file would define them, with any combination of the flags."""
    has_gate, transposed = flags.get("has_gate", True), flags.get("is_transposed", False)
    has_bias = flags.get("has_bias", False)

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            width = 2 * I if has_gate else I
            up, down = (E, width, H), (E, H, I)
            name = "gate_up_proj" if has_gate else "up_proj"
            if transposed:
                up, down = (E, H, width), (E, I, H)
            setattr(self, name, nn.Parameter(torch.empty(up)))
            self.down_proj = nn.Parameter(torch.empty(down))
            if has_bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.empty(E, width)))
                self.down_proj_bias = nn.Parameter(torch.empty(E, H))
            self.num_experts = E
            self.act_fn = ACT2FN[act]
            if norm:
                self.post_expert_norm = nn.LayerNorm(H)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            """A slot at a time."""
            up = self.gate_up_proj if has_gate else self.up_proj
            result = torch.zeros(hidden_states.shape)
            for token in range(hidden_states.shape[0]):
                for k in range(top_k_index.shape[1]):
                    e = int(top_k_index[token, k])
                    if not 0 <= e < E:
                        continue
                    w_up, w_down = up[e], self.down_proj[e]
                    if transposed:
                        w_up, w_down = w_up.T, w_down.T
                    h = w_up @ hidden_states[token]
                    if has_bias:
                        h = h + (self.gate_up_proj_bias if has_gate else self.up_proj_bias)[e]
                    h = w_down @ (self._apply_gate(h) if has_gate else self.act_fn(h))
                    if has_bias:
                        h = h + self.down_proj_bias[e]
                    if norm:
                        h = self.post_expert_norm(h)
                    mask = torch.arange(hidden_states.shape[0]) == token
                    result = result + mask[:, None] * (h * top_k_weights[token, k])
            return result

    if gate is not None:
        Experts._apply_gate = gate
    decorate = use_experts_implementation(has_post_expert_norm=norm, **flags)
    return draw(decorate(Experts)(config()))


def operands(num_tokens=T, dtype=torch.float32):
    x = torch.randn(num_tokens, H, dtype=dtype, requires_grad=True)
    weights = torch.rand(num_tokens, K, dtype=dtype, requires_grad=True)
    ids = torch.rand(num_tokens, E).argsort(1)[:, :K]
    return x, ids, weights


def run(experts, implementation, x, ids, weights, grad=None):
    """Output and the gradients of x, the routing weights and every parameter."""
    experts.config._experts_implementation = implementation
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    y = experts(x, ids, weights)
    wrt = {"x": x, "weights": weights, **dict(experts.named_parameters())}
    grad = torch.ones_like(y) if grad is None else grad
    return y.detach(), dict(zip(wrt, torch.autograd.grad(y, list(wrt.values()), grad), strict=True))


def assert_same(actual, expected, bound=40 * EPS):
    for name, ours, theirs in (
        ("y", actual[0], expected[0]),
        *((name, actual[1][name], expected[1][name]) for name in expected[1]),
    ):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
        assert (ours - theirs).norm() <= bound * theirs.norm(), name


def assert_like_eager(experts):
    call = operands()
    assert_same(run(experts, "moe_ops", *call), run(experts, "eager", *call))


FLAGS = {
    "plain": {},
    "bias": {"has_bias": True},
    "transposed": {"is_transposed": True},
    "transposed_bias": {"is_transposed": True, "has_bias": True},
    "no_gate": {"has_gate": False},
    "no_gate_bias_transposed": {"has_gate": False, "has_bias": True, "is_transposed": True},
}


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("act", ["silu", "quick_gelu"])
@pytest.mark.parametrize("flags", FLAGS)
def test_layout_flags(flags, act, norm):
    experts = make_experts(act, norm=norm, **FLAGS[flags])
    fused = fused_activation(experts)
    assert (fused is None) == (act == "quick_gelu")
    x, ids, weights = operands()
    grad = torch.randn(T, H)
    expected = run(experts, "eager", x, ids, weights, grad)
    assert_same(run(experts, "moe_ops", x, ids, weights, grad), expected)


def gate_swapped(self, gate_up):
    up, gate = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * up


OTHER_MODELS = {
    "aria": (AriaExperts, "swiglu"),
    "openai_privacy_filter": (OpenAIPrivacyFilterExperts, "swiglu_oai"),
    "nemotron_h": (NemotronHExperts, "relu2"),
    "muse_spark": (MuseSparkExperts, "swiglu"),
    "deepseek_v4": (DeepseekV4Experts, "swiglu_clamped"),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_experts_of_other_models(name):
    experts_class, activation = OTHER_MODELS[name]
    experts = draw(experts_class(config()))
    assert (fused_activation(experts) or {}).get("activation") == activation
    x, ids, weights = operands()
    expected = run(experts, "batched_mm", x, ids, weights)
    assert_same(run(experts, "moe_ops", x, ids, weights), expected)


def experts_of(model_type, **arguments):
    model = build(model_type, **arguments)
    moe_ops.hf.enable(model)
    return model.get_submodule(BLOCK_NAMES[model_type]).experts


def with_sentinels(ids, num_experts):
    """Some slots of nobody: E, -1, beyond E, and one token without any expert."""
    ids = ids.clone()
    ids[0], ids[2, 0], ids[3, 1], ids[4, 0] = num_experts, -1, num_experts, num_experts + 7
    return ids, (ids < 0) | (ids >= num_experts)


def check_sentinels(experts, eager, num_experts, x, ids, weights):
    ids, nobody = with_sentinels(ids, num_experts)
    poisoned = weights.detach().masked_fill(nobody, torch.nan)
    grad = torch.randn(x.shape)
    actual = run(experts, "moe_ops", x, ids, poisoned, grad)
    assert (actual[0][0] == 0).all()
    assert (actual[1]["x"][0] == 0).all()
    assert (actual[1]["weights"][nobody] == 0).all()
    # Eager cannot skip a slot in every model, but it can give it weight zero.
    safe = weights.detach().masked_fill(nobody, 0.0)
    expected = run(eager, "eager", x, ids.masked_fill(nobody, 0), safe, grad)
    expected[1]["weights"][nobody] = 0
    assert_same(actual, expected)


@pytest.mark.parametrize("model_type", DECORATED)
def test_expert_parallel_sentinels(model_type):
    experts = experts_of(model_type)
    experts._is_expert_parallel = True
    num_experts = experts.num_experts
    x = torch.randn(T, 32)
    ids = torch.rand(T, num_experts).argsort(1)[:, :K]
    check_sentinels(experts, experts, num_experts, x, ids, torch.rand(T, K))


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_expert_parallel_sentinels_outside_the_fused_op(norm):
    experts = make_experts("tanh", has_bias=True, norm=norm)
    experts._is_expert_parallel = True
    check_sentinels(experts, experts, E, *operands())


def test_negative_sentinels_in_dbrx():
    experts = experts_of("dbrx")
    x = torch.randn(1, T, 32)
    ids = torch.rand(T, 6).argsort(1)[:, :K]
    ids, nobody = with_sentinels(ids, 6)
    weights = torch.rand(T, K)
    with torch.no_grad():
        actual = experts(x, ids, weights.masked_fill(nobody, torch.nan))
        expected = experts(x, ids.masked_fill(nobody, 0), weights.masked_fill(nobody, 0.0))
    assert (actual - expected).norm() <= 40 * EPS * expected.norm()


NO_TOKENS = {
    "fused": {},
    "fused_bias": {"has_bias": True, "is_transposed": True},
    "steps": {"act": "tanh", "has_bias": True, "norm": True},
}


@pytest.mark.parametrize("case", NO_TOKENS)
def test_no_tokens(case):
    experts = make_experts(**NO_TOKENS[case])
    y, gradients = run(experts, "moe_ops", *operands(num_tokens=0))
    assert y.shape == (0, H)
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("case", NO_TOKENS)
def test_experts_without_tokens_get_zero_gradients(case):
    experts = make_experts(**NO_TOKENS[case])
    x, _, weights = operands()
    ids = torch.full((T, K), 3)  # Both slots of every token name the same expert.
    actual = run(experts, "moe_ops", x, ids, weights)
    assert_same(actual, run(experts, "eager", x, ids, weights))
    for name, gradient in actual[1].items():
        if gradient.shape[0] == E:
            assert (gradient[[0, 1, 2, 4]] == 0).all(), name


@pytest.mark.parametrize("model_type", ["dbrx", "llama4_text", "jetmoe"])
def test_no_tokens_in_undecorated_blocks(model_type):
    model = build(model_type)
    moe_ops.hf.enable(model)
    block = model.get_submodule(BLOCK_NAMES[model_type])
    output = block(torch.randn(1, 0, 32))
    output = output[0] if isinstance(output, tuple) else output
    assert output.numel() == 0 and output.shape[-1] == 32


@pytest.mark.parametrize("act", ["silu", "tanh"])
@pytest.mark.parametrize(
    ("x_dtype", "weights_dtype", "parameter_dtype"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_dtypes(x_dtype, weights_dtype, parameter_dtype, act):
    experts = make_experts(act, has_bias=True).to(parameter_dtype)
    x, ids, weights = operands()
    x, weights = x.detach().to(x_dtype), weights.detach().to(weights_dtype)
    y, gradients = run(experts, "moe_ops", x, ids, weights)
    assert y.dtype == gradients["x"].dtype == x_dtype
    assert gradients["weights"].dtype == weights_dtype
    assert all(gradients[n].dtype == p.dtype for n, p in experts.named_parameters())
    # Truth in fp32 from the values that were given; a few roundings to the half type on the way.
    expected = run(experts.float(), "eager", x.float(), ids, weights.float())
    rounded = (y, {name: gradient.float() for name, gradient in gradients.items()})
    half = torch.bfloat16 if parameter_dtype == torch.float32 else parameter_dtype
    assert_same((rounded[0].float(), rounded[1]), expected, bound=4 * torch.finfo(half).eps)


def test_biases_of_another_dtype():
    experts = make_experts(has_bias=True).to(torch.bfloat16)
    experts.gate_up_proj_bias.data = experts.gate_up_proj_bias.data.float()
    experts.down_proj_bias.data = experts.down_proj_bias.data.float()
    x, ids, weights = operands()
    y, gradients = run(experts, "moe_ops", x.detach().bfloat16(), ids, weights)
    assert y.dtype == torch.bfloat16
    assert gradients["down_proj_bias"].dtype == torch.float32


def test_weights_of_two_dtypes():
    experts = make_experts()
    experts.down_proj.data = experts.down_proj.data.bfloat16()
    x, ids, weights = operands()
    y, _ = run(experts, "moe_ops", x, ids, weights)
    expected, _ = run(experts.float(), "eager", x, ids, weights)
    assert y.dtype == torch.float32
    assert (y - expected).norm() <= 4 * torch.finfo(torch.bfloat16).eps * expected.norm()


@pytest.fixture
def seen(monkeypatch):
    """Returns what the last call of moe_ffn was given, by name."""
    arguments = {}
    original = moe_ops.expert_weights.packing.moe_ffn

    def spy(x, w_gate_up, w_down, *args, **kwargs):
        arguments.update(kwargs, up=w_gate_up, down=w_down)
        return original(x, w_gate_up, w_down, *args, **kwargs)

    monkeypatch.setattr(moe_ops.expert_weights.packing, "moe_ffn", spy)
    return arguments


def test_layout_views_share_memory(seen):
    experts = make_experts(is_transposed=True, has_bias=True)
    run(experts, "moe_ops", *operands())
    assert seen["up"].shape == (E, 2 * I, H) and seen["down"].shape == (E, H, I)
    assert seen["up"].data_ptr() == experts.gate_up_proj.data_ptr()
    assert seen["down"].data_ptr() == experts.down_proj.data_ptr()


def test_gpt_oss_attributes_reach_the_op(seen):
    experts = draw(GptOssExperts(config(_experts_implementation="moe_ops")))
    run(experts, "moe_ops", *operands())
    names = ("activation", "interleaved", "alpha", "limit")
    assert [seen[name] for name in names] == ["swiglu_oai", True, 1.3, 0.7]


@pytest.mark.parametrize("act", ["silu", "tanh"])
def test_same_bits_again(act):
    experts = make_experts(act, has_bias=True)
    x, ids, weights = operands()
    first, second = (run(experts, "moe_ops", x, ids, weights) for _ in range(2))
    assert_same(second, first, bound=0.0)


@pytest.mark.parametrize("case", ["quick_gelu", "norm", "gate"])
def test_steps_compile_without_graph_breaks(case):
    experts = make_experts(
        act="quick_gelu" if case == "quick_gelu" else "silu",
        norm=case == "norm",
        gate=gate_swapped if case == "gate" else None,
        has_bias=True,
    )
    x, ids, weights = operands()
    expected = run(experts, "eager", x, ids, weights)
    torch._dynamo.reset()
    experts.forward = torch.compile(experts.forward, fullgraph=True, backend="aot_eager")
    assert_same(run(experts, "moe_ops", x, ids, weights), expected)


def test_compiles_with_a_dynamic_number_of_tokens():
    experts = make_experts()
    torch._dynamo.reset()
    graphs = []

    def backend(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module.forward

    experts.config._experts_implementation = "moe_ops"
    compiled = torch.compile(experts, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for num_tokens in (17, 5, 31):
            x, ids, weights = operands(num_tokens)
            assert torch.equal(compiled(x, ids, weights), experts(x, ids, weights))
    assert len(graphs) == 1
