"""GateRouter: gates against their formulas, drawing in training, bank operations."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from moe_ops.layers import AttentionExperts, Experts, GateRouter, MoE, TopKRouter

T, H, G, E, K = 40, 10, 6, 7, 3
GATES = {"linear": None, "mlp": G, "cosine": G}


def build(gate, **options):
    router = GateRouter(H, E, K, gate=gate, gate_size=GATES[gate], dtype=torch.float64, **options)
    for p in router.parameters():
        torch.nn.init.normal_(p)
    return router.eval()


def logits_by_hand(router, x):
    if router.gate == "linear":
        return x @ router.weight.T
    z = x @ router.stem.weight.T
    if router.gate == "mlp":
        z = z + router.stem.bias
        return (z * 0.5 * (1 + torch.erf(z / 2**0.5))) @ router.weight.T
    cosine = torch.stack([F.cosine_similarity(z, w[None], dim=-1) for w in router.weight], -1)
    return cosine * router.temperature.exp()


@pytest.mark.parametrize("gate", GATES)
def test_equals_its_formula(gate):
    router, x = build(gate), torch.randn(T, H, dtype=torch.float64)
    out = router(x)
    expected = logits_by_hand(router, x)
    torch.testing.assert_close(out.router_logits, expected)
    p, ids = expected.softmax(-1).topk(K)
    assert torch.equal(out.topk_ids.long(), ids)
    torch.testing.assert_close(out.topk_weights, p)
    grad = torch.randn_like(p)
    leaves = list(router.parameters())
    ours = torch.autograd.grad(out.topk_weights, leaves, grad)
    theirs = torch.autograd.grad(p, leaves, grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_linear_is_router():
    router = build("linear")
    plain = TopKRouter(H, E, K, dtype=torch.float64)
    plain.load_state_dict(router.state_dict())
    x = torch.randn(T, H, dtype=torch.float64)
    assert torch.equal(router(x).topk_weights, plain(x).topk_weights)


def test_gate_dropout_is_for_training():
    router, x = build("mlp", gate_dropout=0.5), torch.randn(T, H, dtype=torch.float64)
    torch.testing.assert_close(router(x).router_logits, logits_by_hand(router, x))
    router.train()
    assert not torch.equal(router(x).router_logits, router(x).router_logits)


@pytest.mark.parametrize("drawn", [1, 2, 3])
def test_drawn_experts(drawn):
    """The first K - s are the top ones; the rest is drawn with the routing probabilities."""
    router = build("mlp", sample_top_k=drawn)
    x = torch.randn(1, H, dtype=torch.float64).expand(4000, H)
    top = router(x[:1]).topk_ids[0]
    router.train()
    out = router(x)
    certain = K - drawn
    assert bool((out.topk_ids[:, :certain] == top[:certain]).all())
    assert all(len(set(row)) == K for row in out.topk_ids[:50].tolist())
    p = out.router_logits[0].softmax(-1).detach()
    torch.testing.assert_close(out.topk_weights, p[out.topk_ids.long()])
    rest = p.clone()
    rest[top[:certain].long()] = 0
    share = torch.bincount(out.topk_ids[:, certain].long(), minlength=E) / len(x)
    error = (rest / rest.sum() * (1 - rest / rest.sum()) / len(x)).sqrt()
    assert bool(((share - rest / rest.sum()).abs() <= 5 * error + 1e-4).all())
    mask = torch.tensor([True, True, True, True, False, True, False])
    masked = router(x[:200], expert_mask=mask).topk_ids
    assert set(masked.flatten().tolist()) <= {0, 1, 2, 3, 5}


@pytest.mark.parametrize("gate", GATES)
def test_select_is_a_mask(gate):
    router, x = build(gate, sample_top_k=1), torch.randn(T, H, dtype=torch.float64)
    keep = [5, 0, 3, 6]
    mask = torch.zeros(E, dtype=torch.bool)
    mask[keep] = True
    small, masked = router.select(keep), router(x, expert_mask=mask)
    assert isinstance(small, GateRouter) and small.sample_top_k == 1 and not small.training
    out = small(x)
    assert torch.equal(torch.tensor(keep)[out.topk_ids.long()], masked.topk_ids.long())
    torch.testing.assert_close(out.topk_weights, masked.topk_weights)
    if small.stem is not None:
        assert small.stem.weight.data_ptr() != router.stem.weight.data_ptr()


@pytest.mark.parametrize("gate", GATES)
def test_append_keeps_the_old_rows(gate):
    router, x = build(gate), torch.randn(T, H, dtype=torch.float64)
    large = router.append(2)
    assert large.num_experts == E + 2 and large.weight.shape == (E + 2, GATES[gate] or H)
    torch.testing.assert_close(large.logits(x)[:, :E], router.logits(x))
    twice = router.append(build(gate))
    assert twice.num_experts == 2 * E


def test_in_layers_and_copies():
    layer = MoE(build("cosine"), Experts(E, H, 8, dtype=torch.float64))
    attention = AttentionExperts(build("mlp"), 2, 4, dtype=torch.float64)
    x = torch.randn(2, 9, H, dtype=torch.float64)
    y = attention(layer(x))
    again = copy.deepcopy(attention)
    again.load_state_dict(attention.state_dict())
    assert torch.equal(again(layer(x)), y)
    assert layer.select([1, 2, 4]).router.gate == "cosine"
    y.sum().backward()
    assert all(p.grad is not None for p in (*layer.parameters(), *attention.parameters()))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_half_types_and_devices():
    router = build("cosine").to(torch.bfloat16)
    assert router.stem.weight.dtype == torch.bfloat16
    assert router(torch.randn(T, H, dtype=torch.bfloat16)).topk_weights.dtype == torch.float32
    with torch.device("meta"):
        assert GateRouter(H, E, K, gate_size=G).stem.weight.is_meta


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"gate": "gmm", "gate_size": 3}, "gate must be one of linear, mlp, cosine, got 'gmm'"),
        ({"gate": "mlp"}, "gate_size must be given"),
        ({"gate": "linear", "gate_size": 3}, "gate_size must be given unless"),
        ({"gate_size": 0}, "gate_size must be at least 1, got 0"),
        ({"gate_size": 3, "gate_dropout": 1.0}, "gate_dropout"),
        ({"gate_size": 3, "sample_top_k": 4}, r"sample_top_k must be in \[0, top_k = 3\], got 4"),
        ({"gate_size": 3, "kind": "topp"}, "kind and score_func"),
        ({"gate_size": 3, "score_func": "sigmoid"}, "kind and score_func"),
    ],
)
def test_bad_arguments(arguments, word):
    with pytest.raises(ValueError, match=f"GateRouter: .*{word}"):
        GateRouter(H, E, K, **arguments)
