"""DenseMixer: the router's gradient from all experts."""

from __future__ import annotations

import sys

import pytest
import torch
from tests.helpers.moe import build_moe, build_router
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_ops.layers import Experts, LatentProjection, MoE, TopKRouter, dense_gradient
from moe_ops.reference._scores import router_scores

T, H, I, E, K = 11, 6, 5, 5, 2
ROUTERS = {
    "softmax": {},
    "renormalized": {"renormalize": True, "routed_scaling_factor": 2.0},
    "of the chosen": {"topk_first": True},
    "sigmoid": {"score_func": "sigmoid", "renormalize": True, "expert_bias": True},
    "p-norm": {"renormalize": True, "renormalize_p": 2.0},
    "threshold": {"kind": "topp", "top_p": 0.6},
}


def make(name: str, **options) -> MoE:
    router = build_router(H, E, K, dtype=torch.float64, **ROUTERS[name])
    if router.expert_bias is not None:
        router.expert_bias.uniform_(-0.2, 0.2)
    return MoE(router, Experts(E, H, I, bias=True, dtype=torch.float64), **options)


def definition(moe: MoE, x: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """All experts on all tokens, and a top-k whose derivative is the identity."""
    router = moe.router
    logits = router.logits(x)
    if mask is not None:
        logits = logits.masked_fill(~mask, -1e300)
    scores = router_scores(logits, router.score_func)
    spare = scores.new_zeros(len(x), E + 1)
    chosen = spare.scatter(1, torch.where(ids < 0, E, ids).long(), 1.0)[:, :E]
    kept = scores * chosen + (scores - scores.detach()) * (1 - chosen)
    if router.renormalize or router.topk_first:
        p = router.renormalize_p
        total = (chosen * kept).norm(p, dim=1, keepdim=True) if p > 1 else kept.sum(1, True)
        kept = kept / total
    weights = kept * router.routed_scaling_factor
    return torch.einsum("te,teh->th", weights, moe.experts.outputs(x))


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_definition(name, masked, monkeypatch):
    monkeypatch.setattr(dense_gradient, "SLOTS_AT_A_TIME", 3 * E)  # Several parts.
    moe = make(name, router_gradient="dense")
    mask = torch.tensor([True, True, False, True, True]) if masked else None
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    out = moe(x, expert_mask=mask, return_routing=True)
    expected = definition(moe, x, out.topk_ids, mask)
    torch.testing.assert_close(out.y, expected)
    upstream = torch.randn_like(expected)
    leaves = [x, *moe.parameters()]
    got = torch.autograd.grad((out.y * upstream).sum(), leaves)
    wanted = torch.autograd.grad((expected * upstream).sum(), leaves)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    moe.router_gradient = "topk"
    plain = moe(x, expert_mask=mask)
    assert torch.equal(plain, out.y), "the output must keep its bits"
    few = torch.autograd.grad((plain * upstream).sum(), leaves)
    for a, b, n in zip(got[2:], few[2:], [n for n, _ in moe.named_parameters()][1:], strict=True):
        assert torch.equal(a, b), f"{n} of the experts must learn as before"
    assert not torch.allclose(got[1], few[1])


def test_only_the_weights_of_slots_are_differentiated(monkeypatch):
    """The other experts' own gradients would cost twice their forward pass, and would be added to
    gradients that are accumulated in place."""
    module = sys.modules["moe_ops.ops.moe_ffn"]
    backward, asked = module._moe_ffn_bwd, []

    def record(*args):
        asked.append(args[-6:])
        return backward(*args)

    monkeypatch.setattr(module, "_moe_ffn_bwd", record)
    moe = make("softmax", router_gradient="dense")
    moe(torch.randn(T, H, dtype=torch.float64)).sum().backward()
    others, chosen = asked
    assert others == (False, False, False, True, False, False)
    assert chosen[1:] == (True,) * 5


def test_with_a_latent_width_recomputation_and_autocast():
    moe = MoE(
        TopKRouter(H, E, K, renormalize=True),
        Experts(E, 4, I),
        latent=LatentProjection(H, 4),
        router_gradient="dense",
    )
    x = torch.randn(T, H, requires_grad=True)
    moe(x).square().sum().backward()
    wanted = moe.router.weight.grad.clone()
    moe.zero_grad()
    checkpoint(moe, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(moe.router.weight.grad, wanted)
    moe.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe(x)
    y.float().square().sum().backward()
    assert (moe.router.weight.grad - wanted).norm() < 0.1 * wanted.norm()


def test_no_tokens_and_no_gradient():
    moe = make("softmax", router_gradient="dense")
    moe(torch.empty(0, H, dtype=torch.float64)).sum().backward()
    x = torch.randn(T, H, dtype=torch.float64)
    moe.router.requires_grad_(False)
    moe(x).sum().backward()
    assert moe.router.weight.grad is None or not moe.router.weight.grad.any()
    assert (
        build_moe(H, I, E, K, router_gradient="dense").select([0, 1, 2]).router_gradient == "dense"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"router_gradient": "all"}, "router_gradient"),
        ({"router_gradient": "dense", "kind": "sparsemixer"}, "SparseMixerRouter"),
        ({"router_gradient": "dense", "apply_router_weight_on_input": True}, "outputs"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError) as caught:
        build_moe(H, I, E, K, **options)
    assert words in str(caught.value) and ", got " in str(caught.value)
