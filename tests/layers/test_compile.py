"""Forward and backward of the layers in one graph: torch.compile(fullgraph=True)."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.moe import build_moe, build_router
from torch import Tensor, nn

from moe_ops.layers import (
    AttentionExperts,
    ExpertLoadStats,
    TopKRouter,
    load_balancing_loss,
    mutual_information_loss,
    router_z_loss,
    sequence_balance_loss,
)

B, S, H, I, E, K = 2, 5, 6, 4, 8, 2

CONFIGS = {
    "mixtral": {"router": "mixtral", "aux_losses": ("load_balancing", "router_z", "entropy")},
    "qwen2_moe": {"router": "qwen2_moe", "num_shared_experts": 1, "shared_expert_gate": True},
    "deepseek_v3": {"router": "deepseek_v3", "num_groups": 4, "num_topk_groups": 2},
    "gpt_oss": {"router": "gpt_oss", "activation": "swiglu_oai", "interleaved": True, "bias": True},
    "llama4": {"router": "llama4"},
    "dbrx": {"router": "dbrx", "renormalize_p": 2.0},
    "phimoe": {"router": "phimoe"},
    "topp": {"kind": "topp"},
    "expert_choice": {"kind": "expert_choice"},
    "relu": {"kind": "relu", "max_k": 3, "router_bias": True},
    "capacity": {"kind": "capacity", "capacity_factor": 0.5, "drop_by": "weight"},
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(fn):
    return torch.compile(fn, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("name", CONFIGS)
def test_moe_forward_and_backward(name):
    moe = build_moe(H, I, E, K, freeze_routing_in_recompute=True, **CONFIGS[name])
    if name == "phimoe":
        moe.eval()  # training draws random numbers
    x = torch.randn(B, S, H, requires_grad=True)

    def run(module: nn.Module) -> tuple[Tensor, list[Tensor]]:
        out = module(x, return_routing=True)
        loss = out.y.square().sum() + sum(out.aux_losses.values())
        return out, torch.autograd.grad(loss, [x, *moe.parameters()])

    out, grads = run(moe)
    out_compiled, grads_compiled = run(compiled(moe))
    assert torch.equal(out.topk_ids, out_compiled.topk_ids)
    torch.testing.assert_close(out_compiled.y, out.y)
    assert out_compiled.aux_losses.keys() == out.aux_losses.keys()
    for a, b in zip(grads_compiled, grads, strict=True):
        torch.testing.assert_close(a, b)
    if name == "deepseek_v3":
        assert moe.router.tokens_per_expert.sum() == 2 * B * S * K


def test_generated_code_calls_the_ops(monkeypatch, tmp_path):
    """Not only the graph: what inductor makes of it, with calls from C++. Its cache does not know
    the schemas of ops, so code of another version of this package must not be found there."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # What takes half of the time: optimizing, headers compiled in advance, trying the processor.
    monkeypatch.setenv("TORCHINDUCTOR_DEBUG_COMPILE", "1")
    monkeypatch.setattr("torch._inductor.config.cpp_cache_precompile_headers", False)
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", True)
    layer = nn.ModuleDict(
        {
            "attention": AttentionExperts(
                build_router(H, E, K, topk_first=True), 2, 4, rope_theta=1e4
            ),
            "moe": build_moe(H, I, E, K, router="mixtral"),
        }
    )
    x = torch.randn(B, S, H, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return layer["moe"](x + layer["attention"](x)).square().sum()

    fast = torch.compile(run, fullgraph=True, options={"cpp_wrapper": True})
    inputs = [x, *layer.parameters()]
    y, y_compiled = run(x), fast(x)
    torch.testing.assert_close(y_compiled, y)
    for a, b in zip(
        torch.autograd.grad(y_compiled, inputs), torch.autograd.grad(y, inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["phimoe", "mixtral"])
def test_training_with_random_numbers(name):
    moe = build_moe(H, I, E, K, jitter=0.1, **CONFIGS[name])
    compiled(moe)(torch.randn(B, S, H)).sum().backward()
    assert moe.router.weight.grad is not None


def test_overrides_and_masks():
    moe = build_moe(H, I, E, K, router="deepseek_v3", num_groups=4, num_topk_groups=2)
    x, ids = torch.randn(B, S, H), torch.randint(E, (B, S, 3))
    mask = torch.arange(E) < 6
    weights = torch.rand(B, S, 3)
    fast = compiled(moe)
    for kwargs in (
        {"topk_ids": ids},
        {"topk_ids": ids, "topk_weights": weights},
        {"expert_mask": mask},
        {"topk_ids": ids, "expert_mask": mask},
    ):
        torch.testing.assert_close(fast(x, **kwargs), moe(x, **kwargs))


def test_dynamic_number_of_tokens():
    moe = build_moe(H, I, E, K, router="qwen2_moe", num_shared_experts=1)
    fast = torch.compile(moe, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 7, 12):
        x = torch.randn(tokens, H)
        torch.testing.assert_close(fast(x), moe(x))


@pytest.mark.parametrize("name", ["attention", "soft attention", "capacity"])
def test_exports_with_a_dynamic_number_of_tokens(name):
    if name == "capacity":
        layer = build_moe(H, I, E, K, kind="capacity", eval_capacity_factor=1.0).eval()
    else:
        soft = name == "soft attention"
        layer = AttentionExperts(TopKRouter(H, E, K), 2, 4, soft_routing=soft, expert_kv=soft)
    tokens = {1: torch.export.Dim("tokens", min=2, max=64)}
    program = torch.export.export(layer, (torch.randn(1, 5, H),), dynamic_shapes=(tokens,))
    x = torch.randn(1, 9, H)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("masked", [False, True])
def test_losses(masked):
    logits, ids = torch.randn(B, S, E, requires_grad=True), torch.randint(E, (B, S, K))
    mask = torch.rand(B, S) > 0.3 if masked else None

    def losses(logits: Tensor, ids: Tensor) -> Tensor:
        return (
            load_balancing_loss(logits, ids, token_mask=mask)
            + router_z_loss(logits, token_mask=mask)
            + mutual_information_loss(logits, token_mask=mask)
            + sequence_balance_loss(logits, ids, token_mask=mask)
        )

    expected, value = losses(logits, ids), compiled(losses)(logits, ids)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        torch.autograd.grad(value, logits), torch.autograd.grad(expected, logits)
    )


def test_stats_take_ids_of_a_compiled_layer():
    moe = build_moe(H, I, E, K)
    stats = ExpertLoadStats()
    stats.update(compiled(moe)(torch.randn(B, S, H), return_routing=True).topk_ids, E)
    assert stats.tokens_per_expert().sum() == B * S * K
