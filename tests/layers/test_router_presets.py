"""`RouterConfig.from_model_type` against the routers of transformers, with the same weights.

Router and experts ids are compared as weight per expert, [T, E], since the order of slots differs.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from tests.helpers.moe import build_moe
from torch import Tensor

from moe_ops.layers import Router, RouterConfig

pytest.importorskip("transformers")

T, H, E, K = 33, 16, 8, 2


def modeling(model: str):
    return importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def configuration(model: str, name: str, **kwargs):
    module = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    return getattr(module, name)(**kwargs)


def dense(weights: Tensor, ids: Tensor) -> Tensor:
    full = torch.zeros(ids.shape[0], E, dtype=weights.dtype)
    return full.scatter_add(1, ids.long(), weights)


def assert_same_routing(router: Router, weights: Tensor, ids: Tensor, x: Tensor) -> None:
    ours = router(x)
    torch.testing.assert_close(dense(ours.topk_weights, ours.topk_ids), dense(weights, ids))
    assert torch.equal(ours.topk_ids.sort(1).values.long(), ids.sort(1).values.long())


# model, name of the router, name of the configuration, its arguments, overrides of the preset
PLAIN = [
    ("mixtral", "MixtralTopKRouter", "MixtralConfig", {"num_local_experts": E}, {}),
    ("qwen2_moe", "Qwen2MoeTopKRouter", "Qwen2MoeConfig", {"num_experts": E}, {}),
    (
        "qwen2_moe",
        "Qwen2MoeTopKRouter",
        "Qwen2MoeConfig",
        {"num_experts": E, "norm_topk_prob": True},
        {"renormalize": True},
    ),
    (
        "qwen3_moe",
        "Qwen3MoeTopKRouter",
        "Qwen3MoeConfig",
        {"num_experts": E, "norm_topk_prob": True},
        {},
    ),
    ("olmoe", "OlmoeTopKRouter", "OlmoeConfig", {"num_experts": E}, {}),
    ("granitemoe", "GraniteMoeTopKRouter", "GraniteMoeConfig", {"num_local_experts": E}, {}),
    ("gpt_oss", "GptOssTopKRouter", "GptOssConfig", {"num_local_experts": E}, {}),
    (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        "DeepseekV2Config",
        {"n_routed_experts": E, "num_attention_heads": 4, "topk_method": "greedy"},
        {},
    ),
    (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        "DeepseekV2Config",
        {
            "n_routed_experts": E,
            "num_attention_heads": 4,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
        },
        {"num_groups": 4, "num_topk_groups": 2, "routed_scaling_factor": 16.0},
    ),
    (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        "DeepseekV3Config",
        {"n_routed_experts": E, "n_group": 4, "topk_group": 2},
        {"num_groups": 4, "num_topk_groups": 2},
    ),
    (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        "DeepseekV3Config",
        {"n_routed_experts": E, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
        {"num_groups": 1, "num_topk_groups": 1, "renormalize": False},
    ),
    ("deepseek_v4", "DeepseekV4TopKRouter", "DeepseekV4Config", {"n_routed_experts": E}, {}),
    ("glm4_moe", "Glm4MoeTopkRouter", "Glm4MoeConfig", {"n_routed_experts": E}, {}),
    (
        "glm4_moe",
        "Glm4MoeTopkRouter",
        "Glm4MoeConfig",
        {"n_routed_experts": E, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.7},
        {"num_groups": 2, "num_topk_groups": 1, "routed_scaling_factor": 1.7},
    ),
]


# Negative biases tell masking losing groups by 0 from masking them by -inf.
CASES = [
    pytest.param(*case, bias, id=f"{case[0]}-{i}-bias{bias}")
    for i, case in enumerate(PLAIN)
    for bias in ((-1.0, 0.2) if case[0] in ("deepseek_v3", "deepseek_v4", "glm4_moe") else (0.0,))
]


@pytest.mark.parametrize(("model", "router", "config", "kwargs", "overrides", "bias"), CASES)
def test_same_as_transformers(model, router, config, kwargs, overrides, bias):
    config = configuration(model, config, hidden_size=H, num_experts_per_tok=K, **kwargs)
    theirs = getattr(modeling(model), router)(config)
    ours = RouterConfig.from_model_type(model, **overrides).build(H, E, K)
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    ours.load_state_dict(
        {
            k.replace("e_score_correction_bias", "expert_bias"): v
            for k, v in theirs.state_dict().items()
        }
    )
    if ours.expert_bias is not None:
        theirs.e_score_correction_bias.uniform_(min(bias, 0), max(bias, 0))
        ours.expert_bias.copy_(theirs.e_score_correction_bias)
    x = torch.randn(T, H)
    logits, weights, ids = theirs(x)
    if not logits.is_floating_point():  # Granite's in transformers 5.20.
        logits, ids = ids, logits
    torch.testing.assert_close(ours(x).router_logits, logits)
    assert_same_routing(ours, weights, ids, x)


def jetmoe(x: Tensor) -> tuple[Router, Tensor, Tensor]:
    theirs = modeling("jetmoe").JetMoeTopKGating(H, E, K)
    ours = RouterConfig.from_model_type("jetmoe").build(H, E, K)
    ours.weight.data.copy_(theirs.layer.weight)
    _, batch, gates, sizes, _ = theirs(x)
    expert = torch.repeat_interleave(torch.arange(E), torch.tensor(sizes))
    order = batch.argsort(stable=True)
    return ours, gates[order].view(-1, K), expert[order].view(-1, K)


def dbrx(x: Tensor, norm: float | None) -> tuple[Router, Tensor, Tensor]:
    config = configuration("dbrx", "DbrxConfig", d_model=H)
    config.ffn_config = configuration(
        "dbrx",
        "DbrxFFNConfig",
        hidden_size=H,
        ffn_hidden_size=8,
        moe_num_experts=E,
        moe_top_k=K,
        moe_normalize_expert_weights=norm,
    )
    theirs = modeling("dbrx").DbrxFFN(config)
    overrides = {"renormalize": False} if norm is None else {"renormalize_p": norm}
    ours = RouterConfig.from_model_type("dbrx", **overrides).build(H, E, K)
    ours.weight.data.copy_(theirs.router.layer.weight)
    weights, ids = theirs.route_tokens_to_experts(theirs.router(x.clone()))
    return ours, weights, ids


def test_jetmoe():
    x = torch.randn(T, H)
    assert_same_routing(*jetmoe(x), x)


@pytest.mark.parametrize("norm", [None, 1.0, 2.0])
def test_dbrx(norm):
    x = torch.randn(T, H)
    assert_same_routing(*dbrx(x, norm), x)


def phimoe(eps: float):
    config = configuration(
        "phimoe",
        "PhimoeConfig",
        hidden_size=H,
        num_local_experts=E,
        num_experts_per_tok=2,
        router_jitter_noise=eps,
    )
    theirs = modeling("phimoe").PhimoeTopKRouter(config)
    torch.nn.init.normal_(theirs.weight)
    ours = RouterConfig.from_model_type("phimoe", sparsemixer_eps=eps).build(H, E, 2)
    ours.weight.data.copy_(theirs.weight)
    return theirs, ours


@pytest.mark.parametrize("eps", [0.01, 0.3])
def test_phimoe_in_evaluation(eps):
    theirs, ours = phimoe(eps)
    theirs.eval(), ours.eval()
    x = torch.randn(T, H)
    x.requires_grad_()
    _, weights, ids = theirs(x.clone())
    out = ours(x)
    assert torch.equal(out.topk_ids.long(), ids)
    torch.testing.assert_close(out.topk_weights, weights)
    upstream = torch.randn_like(weights)
    (g1,) = torch.autograd.grad((weights * upstream).sum(), theirs.weight)
    (g2,) = torch.autograd.grad((out.topk_weights * upstream).sum(), ours.weight)
    torch.testing.assert_close(g1, g2)


def test_phimoe_in_training():
    theirs, ours = phimoe(0.5)
    x = torch.randn(500, H)
    torch.manual_seed(1)
    _, weights, ids = theirs(x.clone())
    torch.manual_seed(1)
    out = ours(x)
    # Both draw in the same order up to the last coin, so the picks are the same and the first
    # weight too (theirs rounds 1/3 to 0.3333); the second may differ by the factor 1/3.
    assert torch.equal(out.topk_ids.long(), ids)
    torch.testing.assert_close(out.topk_weights[:, 0], weights[:, 0], rtol=2e-4, atol=0)
    ratio = (out.topk_weights[:, 1] / weights[:, 1]).detach()
    known = torch.stack(
        [torch.isclose(ratio, torch.tensor(r), rtol=1e-3) for r in (1 / 3, 1.0, 3.0)]
    )
    assert known.any(0).all()
    # Gradients leave the factor out, so they agree although the last coins do not.
    upstream = torch.randn_like(weights)
    (g1,) = torch.autograd.grad((weights * upstream).sum(), theirs.weight)
    (g2,) = torch.autograd.grad((out.topk_weights * upstream).sum(), ours.weight)
    torch.testing.assert_close(g1, g2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2])
def test_llama4(top_k):
    config = configuration(
        "llama4",
        "Llama4TextConfig",
        hidden_size=H,
        intermediate_size=12,
        num_local_experts=E,
        num_experts_per_tok=top_k,
    )
    theirs = modeling("llama4").Llama4TextMoe(config)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = build_moe(H, 12, E, top_k, router="llama4", num_shared_experts=1)
    ours.router.weight.data.copy_(theirs.router.weight)
    ours.experts.w_gate_up.data.copy_(theirs.experts.gate_up_proj.transpose(1, 2))
    ours.experts.w_down.data.copy_(theirs.experts.down_proj.transpose(1, 2))
    shared = theirs.shared_expert
    ours.shared_experts.w_gate_up.data.copy_(
        torch.cat([shared.gate_proj.weight, shared.up_proj.weight])
    )
    ours.shared_experts.w_down.data.copy_(shared.down_proj.weight)
    x = torch.randn(2, 5, H)
    expected, logits = theirs(x)
    out = ours(x, return_routing=True)
    torch.testing.assert_close(out.router_logits, logits)
    torch.testing.assert_close(out.y.view_as(expected), expected, rtol=1e-4, atol=1e-5)


def test_qwen2_moe_block():
    config = configuration(
        "qwen2_moe",
        "Qwen2MoeConfig",
        hidden_size=H,
        num_experts=E,
        num_experts_per_tok=K,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
    )
    config._experts_implementation = "eager"
    theirs = modeling("qwen2_moe").Qwen2MoeSparseMoeBlock(config)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = build_moe(
        H, 12, E, K, router="qwen2_moe", shared_intermediate_size=20, shared_expert_gate=True
    )
    shared = theirs.shared_expert
    ours.load_state_dict(
        {
            "router.weight": theirs.gate.weight,
            "experts.w_gate_up": theirs.experts.gate_up_proj,
            "experts.w_down": theirs.experts.down_proj,
            "shared_experts.w_gate_up": torch.cat([shared.gate_proj.weight, shared.up_proj.weight]),
            "shared_experts.w_down": shared.down_proj.weight,
            "shared_expert_gate.weight": theirs.shared_expert_gate.weight,
        }
    )
    x = torch.randn(2, 7, H)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
