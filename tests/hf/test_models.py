"""Whole models: moe_ops gives what transformers' eager experts give, in every use of a model."""

from __future__ import annotations

import collections

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import moe_ops.hf

from .models import (
    BLOCK_NAMES,
    CONFIGS,
    DECORATED,
    MODEL_TYPES,
    NUM_BLOCKS,
    NUM_FFNS,
    UNDECORATED,
    build,
    loss_and_gradients,
    tokens,
)

# The longest sum in any of the models; rounding errors are independent, so a relative error of
# LONGEST_SUM * eps in the norm is already far beyond what a correct implementation shows.
LONGEST_SUM = 40


def assert_close(actual, expected, what: str = "", eps: float | None = None) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    bound = LONGEST_SUM * (eps or torch.finfo(expected.dtype).eps)
    error = (actual - expected).double().norm()
    assert error <= bound * expected.double().norm(), f"{what}: {error} of {expected.norm()}"


class CountOps(TorchDispatchMode):
    """Counts the calls of moe_ops's registered ops by name."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moe_ops":
            self.calls[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_and_gradients_equal_eager(model_type):
    loss, logits, gradients = loss_and_gradients(build(model_type), tokens())
    model = build(model_type)
    moe_ops.hf.enable(model)
    loss_ours, logits_ours, gradients_ours = loss_and_gradients(model, tokens())
    assert_close(logits_ours, logits, "logits")
    assert_close(loss_ours, loss, "loss")
    assert gradients_ours.keys() == gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        assert_close(gradients_ours[name], gradient, f"gradient of {name}")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_block_runs_the_ops(model_type):
    model = build(model_type)
    moe_ops.hf.enable(model)
    with torch.no_grad(), CountOps() as count:
        model(input_ids=tokens(), use_cache=False)
    blocks = NUM_BLOCKS[model_type]
    expected = {"moe_ffn": blocks}
    if model_type == "dbrx":  # Gate and up are two parameters there.
        expected = {
            "sort_by_expert": blocks,
            "permute": blocks,
            "grouped_gemm": 3 * blocks,
            "unpermute": blocks,
        }
    if model_type == "jetmoe":
        names = ("moe_ffn", "moe_linear_map", "moa_attention", "moe_linear_reduce")
        expected = dict.fromkeys(names, blocks // 2)
        if torch.get_default_device().type == "cpu":  # On CUDA it is torch's operations.
            expected["rotary"] = blocks  # Of queries and of keys.
    assert count.calls == expected


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_generate_gives_the_same_tokens(model_type):
    prompt = tokens(batch=2, length=5)
    arguments = {"max_new_tokens": 6, "do_sample": False}
    expected = build(model_type).generate(prompt, **arguments)
    model = build(model_type)
    moe_ops.hf.enable(model)
    with moe_ops.hf.assert_used(model) as calls:
        actual = model.generate(prompt, **arguments)
    assert torch.equal(actual, expected)
    assert actual.shape == (2, 11)
    assert set(calls.values()) == {6} and len(calls) == NUM_BLOCKS[model_type]
    assert set(moe_ops.hf.status(model).values()) == {"moe_ops"}


# One of each way to run experts and attention; others take these.
COMPILED = ("qwen3_moe", "deepseek_v3", "gpt_oss", "jetmoe", "dbrx")


@pytest.mark.parametrize(
    "model_type",
    [m if m in COMPILED else pytest.param(m, marks=pytest.mark.full) for m in MODEL_TYPES],
)
def test_compiles_without_graph_breaks(model_type):
    model = build(model_type)
    moe_ops.hf.enable(model)
    _, logits, gradients = loss_and_gradients(model, tokens())
    ops = collections.Counter()
    aot_eager = torch._dynamo.lookup_backend("aot_eager")

    def backend(graph_module, inputs):
        for node in graph_module.graph.nodes:
            if str(node.target).startswith("moe_ops."):
                ops[str(node.target).split(".")[1]] += 1
        return aot_eager(graph_module, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    output = compiled(input_ids=tokens(), labels=tokens(), use_cache=False)
    model.zero_grad()
    output.loss.backward()
    assert_close(output.logits.detach(), logits, "logits")
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], f"gradient of {name}")
    assert ops["moe_ffn"] == (0 if model_type == "dbrx" else NUM_FFNS[model_type]), ops
    assert ops["grouped_gemm"] == (6 if model_type == "dbrx" else 0), ops


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_checkpoints_do_not_notice(model_type, tmp_path):
    original = build(model_type)
    original.save_pretrained(tmp_path / "eager")
    moe_ops.hf.enable(original)
    original.save_pretrained(tmp_path / "moe_ops")
    saved = load_file(tmp_path / "eager" / "model.safetensors")
    saved_ours = load_file(tmp_path / "moe_ops" / "model.safetensors")
    assert saved_ours.keys() == saved.keys()
    assert all(torch.equal(saved_ours[key], saved[key]) for key in saved)

    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "moe_ops", experts_implementation="moe_ops", attn_implementation="eager"
    ).eval()
    if model_type in UNDECORATED:
        moe_ops.hf.enable(model)
    with torch.no_grad(), moe_ops.hf.assert_used(model):
        logits = model(input_ids=tokens()).logits
        assert torch.equal(logits, original(input_ids=tokens()).logits)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bf16_trains(model_type):
    model = build(model_type, dtype=torch.bfloat16)
    moe_ops.hf.enable(model)
    loss, logits, gradients = loss_and_gradients(model, tokens())
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all() and loss.isfinite()
    for name, parameter in model.named_parameters():
        assert gradients[name].dtype == parameter.dtype
        assert gradients[name].isfinite().all(), name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bf16_block_is_as_close_as_eager(model_type):
    # One block, so that both see the same router logits and choose the same experts.
    model = build(model_type, dtype=torch.bfloat16)
    block = model.get_submodule(BLOCK_NAMES[model_type])
    x = torch.randn(2, 13, 32).to(torch.bfloat16)
    with torch.no_grad():
        expected = first(block(x.clone()))
        moe_ops.hf.enable(model)
        actual = first(block(x.clone()))
    # Eager rounds five times on the way (up, activation, product, down, weight).
    assert actual.dtype == torch.bfloat16
    error = (actual.float() - expected.float()).norm()
    assert error <= 5 * torch.finfo(torch.bfloat16).eps * expected.float().norm()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_enable_keeps_parameters_and_disable_restores(model_type):
    model = build(model_type)
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    expected = model(input_ids=tokens()).logits
    how = "forward" if model_type in UNDECORATED else "experts_implementation"
    report = moe_ops.hf.enable(model)
    assert list(report.values()) == [how] * NUM_BLOCKS[model_type]
    assert any(name.startswith(BLOCK_NAMES[model_type]) for name in report)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys

    report = moe_ops.hf.disable(model)
    assert (
        list(report.values())
        == ["forward" if model_type in UNDECORATED else "eager"] * NUM_BLOCKS[model_type]
    )
    assert [type(module) for module in model.modules()] == classes
    with CountOps() as count:
        assert torch.equal(model(input_ids=tokens()).logits, expected)
    assert not count.calls


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "dbrx", "llama4_text"])
def test_gradient_checkpointing(model_type):
    model = build(model_type)
    moe_ops.hf.enable(model)
    _, logits, gradients = loss_and_gradients(model, tokens())
    model.train()
    if hasattr(model, "activation_checkpointing_enable"):  # Its name from transformers 5.2x on.
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()
    _, logits_again, gradients_again = loss_and_gradients(model, tokens())
    assert_close(logits_again, logits, "logits")
    for name, gradient in gradients.items():
        assert_close(gradients_again[name], gradient, f"gradient of {name}")


JITTER = {
    "mixtral": {"router_jitter_noise": 0.1},
    "phimoe": {"input_jitter_noise": 0.1},
    "dbrx": {"ffn_config": {**CONFIGS["dbrx"]["ffn_config"], "moe_jitter_eps": 0.1}},
}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_training_mode_with_jitter_equals_eager(model_type):
    overrides = JITTER.get(model_type, {})
    model = build(model_type, **overrides).train()
    torch.manual_seed(3)
    loss, _, gradients = loss_and_gradients(model, tokens())
    moe_ops.hf.enable(model)
    torch.manual_seed(3)
    loss_ours, _, gradients_ours = loss_and_gradients(model, tokens())
    assert_close(loss_ours, loss, "loss")
    for name, gradient in gradients.items():
        assert_close(gradients_ours[name], gradient, f"gradient of {name}")


WITH_ROUTER_LOGITS = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "granitemoe",
    "gpt_oss",
    "phimoe",
    "jetmoe",
    "dbrx",
)


@pytest.mark.parametrize("model_type", WITH_ROUTER_LOGITS)
def test_router_logits_and_aux_loss(model_type):
    model = build(model_type)
    arguments = {"input_ids": tokens(), "labels": tokens(), "output_router_logits": True}
    expected = model(**arguments)
    moe_ops.hf.enable(model)
    actual = model(**arguments)
    assert expected.aux_loss is not None
    assert_close(actual.aux_loss, expected.aux_loss, "aux_loss")
    assert_close(actual.loss, expected.loss, "loss")
    assert len(actual.router_logits) == len(expected.router_logits) > 0
    for ours, theirs in zip(actual.router_logits, expected.router_logits, strict=True):
        assert_close(ours, theirs, "router_logits")


OTHER_ACTIVATION = {
    "jetmoe": {"activation_function": "tanh"},
    "dbrx": {"ffn_config": {**CONFIGS["dbrx"]["ffn_config"], "ffn_act_fn": {"name": "tanh"}}},
    "llama4_text": {"hidden_act": "sigmoid"},  # Not zero at zero, so unused experts are at work.
}


@pytest.mark.parametrize("model_type", UNDECORATED)
def test_activation_that_no_op_knows(model_type):
    model = build(model_type, **OTHER_ACTIVATION[model_type])
    _, logits, gradients = loss_and_gradients(model, tokens())
    moe_ops.hf.enable(model)
    _, logits_ours, gradients_ours = loss_and_gradients(model, tokens())
    assert_close(logits_ours, logits, "logits")
    for name, gradient in gradients.items():
        assert_close(gradients_ours[name], gradient, f"gradient of {name}")


def test_llama4_block_returns_router_logits():
    model = build("llama4_text")
    block = model.get_submodule(BLOCK_NAMES["llama4_text"])
    x = torch.randn(2, 5, 32)
    out, logits = block(x)
    moe_ops.hf.enable(model)
    out_ours, logits_ours = block(x)
    assert torch.equal(logits_ours, logits)
    assert_close(out_ours, out, "out")


def test_jetmoe_routers_are_switched_and_restored():
    model = build("jetmoe")
    routers = [m for name, m in model.named_modules() if name.endswith("router")]
    classes = [type(router) for router in routers]
    moe_ops.hf.enable(model)
    assert len(routers) == 4 and not set(map(type, routers)) & set(classes)
    assert all(isinstance(router, classes[0]) for router in routers)
    moe_ops.hf.disable(model)
    assert [type(router) for router in routers] == classes


V3_ROUTING = {
    "negative_bias": {"bias": -0.9},
    "very_negative_bias": {"bias": -30.0},
    "one_group": {"n_group": 1, "topk_group": 1},
    "all_groups": {"topk_group": 4},
    "no_renormalization": {"norm_topk_prob": False},
    "equal_scores": {"zero_router": True},
}


@pytest.mark.parametrize("case", V3_ROUTING)
@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_group_limited_routing(model_type, case):
    overrides = dict(V3_ROUTING[case])
    bias, zero_router = overrides.pop("bias", None), overrides.pop("zero_router", False)
    model = build(model_type, **overrides)
    gate = model.get_submodule(BLOCK_NAMES[model_type]).gate
    with torch.no_grad():
        if bias is not None:
            gate.e_score_correction_bias.add_(bias)
        if zero_router:
            gate.weight.zero_()
            gate.e_score_correction_bias.zero_()
    _, logits, gradients = loss_and_gradients(model, tokens())
    moe_ops.hf.enable(model)
    _, logits_ours, gradients_ours = loss_and_gradients(model, tokens())
    assert_close(logits_ours, logits, "logits")
    for name, gradient in gradients.items():
        # A router of equal scores has a gradient of canceling terms: only its size is known.
        if not (zero_router and name.endswith("gate.weight")):
            assert_close(gradients_ours[name], gradient, f"gradient of {name}")


@pytest.mark.parametrize("model_type", UNDECORATED)
def test_equal_logits_choose_the_same_experts(model_type):
    model = build(model_type)
    block = model.get_submodule(BLOCK_NAMES[model_type])
    with torch.no_grad():
        getattr(block.router, "layer", block.router).weight.zero_()
        expected = model(input_ids=tokens()).logits
        moe_ops.hf.enable(model)
        assert_close(model(input_ids=tokens()).logits, expected, "logits")


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "dbrx", "llama4_text", "jetmoe"])
def test_double_precision(model_type):
    model = build(model_type, dtype=torch.float64)
    if model_type == "jetmoe":  # Its experts are in attention too, whose eager softmax is in fp32.
        model.set_attn_implementation("sdpa")
    _, logits, gradients = loss_and_gradients(model, tokens())
    moe_ops.hf.enable(model)
    _, logits_ours, gradients_ours = loss_and_gradients(model, tokens())
    # Routers go through fp32 in some of these models, alike on both sides.
    assert_close(logits_ours, logits, "logits")
    for name, gradient in gradients.items():
        assert_close(gradients_ours[name], gradient, f"gradient of {name}", eps=2.0**-40)


# Not dbrx: its eager experts add bf16 to fp32 under autocast, which raises.
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text", "jetmoe"])
def test_autocast_block_is_as_close_as_eager(model_type):
    model = build(model_type)
    block = model.get_submodule(BLOCK_NAMES[model_type])
    x = torch.randn(2, 13, 32)
    with torch.no_grad(), torch.autocast(torch.get_default_device().type, torch.bfloat16):
        expected = first(block(x.clone()))
        moe_ops.hf.enable(model)
        actual = first(block(x.clone()))
    assert actual.dtype == expected.dtype
    error = (actual.float() - expected.float()).norm()
    assert error <= 5 * torch.finfo(torch.bfloat16).eps * expected.float().norm()


def test_autocast_runs_where_eager_cannot():
    model = build("dbrx")
    block = model.get_submodule(BLOCK_NAMES["dbrx"])
    moe_ops.hf.enable(model)
    x = torch.randn(2, 13, 32)
    with torch.no_grad():
        expected = block(x)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            actual = block(x)
    # The choice of experts may differ for a token whose logits are close: the bound is not tight.
    assert actual.dtype == torch.float32
    assert (actual - expected).norm() <= 0.5 * expected.norm()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_training_step_moves_the_same_weights(model_type):
    def step(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss_and_gradients(model, tokens())
        optimizer.step()
        return model.state_dict()

    expected = step(build(model_type))
    model = build(model_type)
    moe_ops.hf.enable(model)
    actual = step(model)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, name)


@pytest.mark.parametrize("model_type", DECORATED)
def test_selected_by_from_config(model_type):
    model = build(model_type, experts="moe_ops")
    assert model.get_experts_implementation()[""] == "moe_ops"
    with torch.no_grad(), moe_ops.hf.assert_used(model) as calls, CountOps() as count:
        model(input_ids=tokens(), use_cache=False)
    assert count.calls["moe_ffn"] == len(calls) == NUM_BLOCKS[model_type]


def first(output):
    return output[0] if isinstance(output, tuple) else output


def test_attention_that_torch_cannot_do_is_refused():
    """gpt-oss has sinks, which transformers' function for torch's attention ignores in silence."""
    model = build("gpt_oss")
    model.set_attn_implementation("moe_ops")
    message = r'^attn_implementation="moe_ops": .* got attention sinks of GptOssAttention; use "eag'
    with pytest.raises(ValueError, match=message):
        model(tokens())
