"""Nemotron-H's latent experts: a layer of ours from the same weights, and theirs on moe_ops."""

from __future__ import annotations

import pytest
import torch

from moe_ops import hf
from moe_ops.layers import Experts, LatentProjection, MoE, Router, SharedExperts

nemotron = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
H, L, I, E, K = 16, 8, 6, 4, 2


def test_nemotron_h_layer():
    config = nemotron.NemotronHConfig(
        hidden_size=H,
        moe_latent_size=L,
        moe_intermediate_size=I,
        moe_shared_expert_intermediate_size=I,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    if not hasattr(config, "moe_latent_size"):
        pytest.skip("this release of transformers has no latent experts")
    theirs = nemotron.NemotronHMoE(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.gate.e_score_correction_bias.uniform_(-0.1, 0.1)
    options = {"renormalize": True, "routed_scaling_factor": 2.5}
    ours = MoE(
        Router(H, E, K, score_func="sigmoid", expert_bias=True, **options),
        Experts(E, L, I, activation="relu2"),
        SharedExperts(H, I, activation="relu2"),
        latent=LatentProjection(H, L),
    )
    shared = theirs.shared_experts
    ours.load_state_dict(
        {
            "router.weight": theirs.gate.weight,
            "router.expert_bias": theirs.gate.e_score_correction_bias,
            "experts.w_gate_up": theirs.experts.up_proj,
            "experts.w_down": theirs.experts.down_proj,
            "shared_experts.w_gate_up": shared.up_proj.weight,
            "shared_experts.w_down": shared.down_proj.weight,
            "latent.down.weight": theirs.fc1_latent_proj.weight,
            "latent.up.weight": theirs.fc2_latent_proj.weight,
        }
    )
    x = torch.randn(2, 5, H)
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected)
        assert hf.enable(theirs) == {"experts": "experts_implementation"}
        with hf.assert_used(theirs):
            torch.testing.assert_close(theirs(x), expected)
