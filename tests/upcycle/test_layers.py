"""Layers from dense networks: what they compute at the start, and where each weight comes from."""

from __future__ import annotations

import pytest
import torch

from moe_ops import upcycle
from moe_ops.layers import Experts, SharedExperts, TopKRouter
from moe_ops.layers.rotary import Rope
from moe_ops.layers.self_attention import Attention

H, I = 16, 24
D = torch.float64


def ffn(seed: int = 0, activation: str = "swiglu") -> SharedExperts:
    torch.manual_seed(seed)
    return SharedExperts(H, I, activation=activation, dtype=D)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("experts", "top_k", "options"),
    [
        (1, 1, {}),
        (6, 2, {}),
        (6, 6, {}),
        (4, 4, {"num_slices": 4}),  # The network itself, cut.
        (8, 4, {"num_slices": 4}),  # One of two copies.
        (12, 6, {"num_slices": 3}),  # Two of four copies.
        (8, 4, {"num_slices": 4, "by": "k_means"}),
        (8, 4, {"num_slices": 4, "by": "coactivation"}),
        (8, 2, {"num_slices": 2, "activation": "geglu"}),
    ],
)
def test_starts_as_the_dense_network(experts, top_k, options):
    dense, x = ffn(activation=options.pop("activation", "swiglu")), torch.randn(40, H, dtype=D)
    by, order = options.pop("by", None), None
    bank = upcycle.experts_from_dense(dense)
    if by == "k_means":
        order = upcycle.k_means_order(bank, options["num_slices"])
    elif by == "coactivation":
        order = upcycle.coactivation_order(bank, options["num_slices"], x)
    layer = upcycle.upcycle_ffn(
        dense, experts, top_k, order=order, generator=generator(), router_std=1.0, **options
    )
    assert upcycle.layer.preserves(1, top_k, **options)
    out = layer(x, return_routing=True)
    torch.testing.assert_close(out.y, dense(x), rtol=1e-6, atol=1e-7)
    # Every copy is used, as the router's rows differ.
    copies = experts // options.get("num_slices", 1)
    assert len(out.topk_ids.unique()) == experts and (copies == 1 or layer.router.weight.std() > 0)
    out.y.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())


class TwoMaps(torch.nn.Module):
    """A network as in decoder layers of DETR and its kin in transformers."""

    def __init__(self, activation, bias=True):
        super().__init__()
        self.fc1 = torch.nn.Linear(H, I, bias=bias, dtype=D)
        self.activation_fn = activation
        self.fc2 = torch.nn.Linear(I, H, bias=bias, dtype=D)

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))


@pytest.mark.parametrize(
    ("activation", "bias"), [(torch.nn.ReLU(), True), (torch.nn.GELU(), False)]
)
def test_networks_of_two_maps(activation, bias):
    torch.manual_seed(0)
    dense, x = TwoMaps(activation, bias), torch.randn(20, H, dtype=D)
    layer = upcycle.upcycle_ffn(dense, 6, 2, num_slices=2, generator=generator(), router_std=1.0)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-6, atol=1e-7)
    if bias:
        torch.testing.assert_close(layer.experts.b_down, dense.fc2.bias.expand(6, H) / 2)


def test_fewer_slices_than_a_copy_are_a_weighted_mean():
    dense, x = ffn(), torch.randn(7, H, dtype=D)
    assert not upcycle.layer.preserves(1, 2, num_slices=4)
    layer = upcycle.upcycle_ffn(dense, 4, 2, num_slices=4, generator=generator(), router_std=1.0)
    gate, up = dense.w_gate_up.chunk(2)
    h = torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())
    logits = x @ layer.router.weight.t()
    best = logits.topk(2, dim=-1)
    weights = best.values.softmax(-1) * 4
    expected = torch.zeros_like(x)
    for t in range(7):
        for w, e in zip(weights[t], best.indices[t].tolist(), strict=True):
            part = slice(6 * e, 6 * e + 6)
            expected[t] += w * (dense.w_down[:, part] @ h[t, part])
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-7)


def test_noise_multiplies_the_weights_of_copies():
    bank = upcycle.experts_from_dense(ffn())
    same = upcycle.copy_experts(bank, 3)
    noisy = upcycle.copy_experts(bank, 3, noise=0.1, generator=generator())
    again = upcycle.copy_experts(bank, 3, noise=0.1, generator=generator())
    for name in ("w_gate_up", "w_down"):
        old, new = getattr(same, name).detach(), getattr(noisy, name).detach()
        assert torch.equal(new, getattr(again, name))
        factor = new / old - 1
        assert 0.08 < float(factor.std()) < 0.12 and not torch.equal(new[0], new[1])
    assert not upcycle.layer.preserves(1, 1, noise=0.1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_neurons_are_drawn_anew(interleaved):
    torch.manual_seed(0)
    bank = Experts(2, 8, 1000, interleaved=interleaved)
    with torch.no_grad():
        bank.w_down.add_(3.0)
    new = upcycle.experts.reinitialize(bank, 0.5, generator=generator())
    torch.testing.assert_close(upcycle.experts.reinitialize(bank, 0.0).w_down, bank.w_down)
    changed = (new.w_down != bank.w_down).all(1)  # [E, I]
    assert changed.sum(1).tolist() == [500, 500] and not torch.equal(changed[0], changed[1])
    assert torch.equal((new.w_down != bank.w_down).any(1), changed)
    rows = (new.w_gate_up != bank.w_gate_up).all(-1)
    both = changed.repeat_interleave(2, 1) if interleaved else torch.cat([changed, changed], 1)
    assert torch.equal(rows, both)
    for e in range(2):
        fresh, old = (b.w_down.detach()[e][:, changed[e]] for b in (new, bank))
        assert abs(float(fresh.mean() - old.mean())) < 0.01
        assert float(fresh.std()) == pytest.approx(float(old.std()), rel=0.1)


def test_specialists_become_experts():
    specialists, x = [ffn(s) for s in range(3)], torch.randn(9, H, dtype=D)
    assert not upcycle.layer.preserves(3, 1)
    layer = upcycle.upcycle_ffn(specialists, 6, 1, generator=generator(), router_std=1.0)
    out = layer(x, return_routing=True)
    each = torch.stack([s(x) for s in specialists for _ in range(2)], 1)
    expected = each[torch.arange(9), out.topk_ids[:, 0].long()]
    torch.testing.assert_close(out.y, expected, rtol=1e-6, atol=1e-7)


def test_clusters_are_equal_and_found():
    torch.manual_seed(0)
    centers = torch.randn(4, 10) * 10
    labels = torch.arange(4).repeat(8)[torch.randperm(32)]
    found = upcycle.neurons.balanced_k_means(centers[labels] + torch.randn(32, 10), 4)
    assert found.bincount().tolist() == [8, 8, 8, 8]
    for c in range(4):
        assert len(labels[found == c].unique()) == 1
    # Equal points, and clusters that are not equal, still give equal parts.
    assert upcycle.neurons.balanced_k_means(torch.zeros(6, 2), 3).bincount().tolist() == [2, 2, 2]
    crowd = torch.cat([torch.zeros(9, 2), torch.ones(1, 2)])
    assert upcycle.neurons.balanced_k_means(crowd, 2).bincount().tolist() == [5, 5]


def test_neurons_that_are_active_together_are_one_slice():
    torch.manual_seed(0)
    bank = Experts(1, 4, 8, dtype=D)
    kind = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])  # Neurons read one of two halves of x.
    with torch.no_grad():
        bank.w_gate_up.zero_()
        for j, k in enumerate(kind.tolist()):
            rows = slice(2 * k, 2 * k + 2)
            bank.w_gate_up[0, j, rows] = 5.0
            bank.w_gate_up[0, 8 + j, rows] = 1.0 + torch.rand(2, dtype=D)
    which = torch.randint(2, (200,))
    x = torch.zeros(200, 4, dtype=D)
    x[torch.arange(200), 2 * which] = 1.0
    order = upcycle.coactivation_order(bank, 2, x, share=0.5)
    assert {len(kind[part].unique()) for part in order[0].split(4)} == {1}


@pytest.mark.parametrize("expert_kv", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_starts_as_dense_attention(expert_kv, kv_heads):
    torch.manual_seed(0)
    rope = Rope(8, 10_000.0)
    dense = Attention(H, 4, 8, rope, num_kv_heads=kv_heads).double()
    router = TopKRouter(H, 3, 1, dtype=D)
    layer = upcycle.upcycle_attention(
        [dense] * 3, router, rope_theta=rope.theta, expert_kv=expert_kv
    )
    x = torch.randn(2, 10, H, dtype=D)
    expected = dense(x, rope.rotation(0, 10))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    top = upcycle.upcycle_attention(
        [dense] * 3,
        upcycle.paired_router(H, 3, 2, dtype=D),
        rope_theta=rope.theta,
        expert_kv=expert_kv,
        soft_routing=False,
    )
    torch.testing.assert_close(top(x), expected, rtol=1e-5, atol=1e-6)


def test_attention_of_specialists():
    torch.manual_seed(0)
    rope = Rope(8, 10_000.0)
    several = [Attention(H, 2, 8, rope).double() for _ in range(2)]
    x, weights = torch.randn(1, 6, H, dtype=D), torch.rand(6, 2, dtype=D)
    ids = torch.tensor([[0, 1]]).expand(6, 2)
    layer = upcycle.upcycle_attention(several, TopKRouter(H, 2, 1, dtype=D), rope_theta=10_000.0)
    each = torch.stack([a(x, rope.rotation(0, 6)) for a in several], -1)
    y = layer(x, topk_ids=ids, topk_weights=weights)
    torch.testing.assert_close(y, (each * weights[:, None]).sum(-1), rtol=1e-5, atol=1e-6)
    shared = upcycle.upcycle_attention(
        several, TopKRouter(H, 2, 1, dtype=D), rope_theta=10_000.0, expert_kv=False
    )
    k = (several[0].k_proj.weight + several[1].k_proj.weight) / 2
    torch.testing.assert_close(shared.kv_proj.weight[:16], k)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: upcycle.upcycle_ffn(ffn(), 6, 2, num_slices=4), "multiple of num_slices = 4"),
        (lambda: upcycle.upcycle_ffn([ffn(), ffn()], 3, 1), "the 2 networks, got 3"),
        (lambda: upcycle.upcycle_ffn([], 3, 1), "at least one network"),
        (lambda: upcycle.experts_from_dense(torch.nn.Linear(2, 2)), "got Linear with NoneType"),
        (lambda: upcycle.slice_experts(upcycle.experts_from_dense(ffn()), 5), "factor must divide"),
        (
            lambda: upcycle.copy_experts(upcycle.experts_from_dense(ffn()), 2, noise=-1.0),
            "noise must be 0",
        ),
        (
            lambda: upcycle.experts.reinitialize(upcycle.experts_from_dense(ffn()), 1.5),
            r"ratio must be in \[0, 1",
        ),
        (
            lambda: upcycle.neurons.balanced_k_means(torch.zeros(5, 1), 2),
            "must divide the 5 points",
        ),
        (
            lambda: upcycle.coactivation_order(
                upcycle.experts_from_dense(ffn()), 2, torch.zeros(0, H)
            ),
            r"x must be \[T, 16\] with T >= 1",
        ),
        (lambda: upcycle.paired_router(H, 6, 2, num_slices=4), "num_slices must divide"),
        (
            lambda: upcycle.upcycle_attention([], TopKRouter(H, 2, 1), rope_theta=None),
            "must be 2 like the router's experts, got 0",
        ),
        (
            lambda: upcycle.upcycle_attention([ffn()], TopKRouter(H, 1, 1), rope_theta=None),
            "got SharedExperts",
        ),
    ],
)
def test_says_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call()
