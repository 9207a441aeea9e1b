"""AttentionExperts against plain torch, its cache, routings and options."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.moe import build_router

from moe_ops import reference
from moe_ops.layers import AttentionExperts, KVCache, TopKRouter, load_balancing_loss

B, S, H, E, K, N, D = 2, 9, 12, 5, 2, 3, 4

OPTIONS = {
    "jetmoe": {"rope_theta": 10000.0, "bias": True},
    "moduleformer": {"kind": "stick_breaking", "kv_bias": True},
    "window": {"window": 3, "softcap": 2.0, "scale": 0.4},
    "soft": {"soft_routing": True, "rope_theta": 100.0},
    "bam": {"soft_routing": True, "expert_kv": True},
    "expert_kv": {"expert_kv": True, "rope_theta": 100.0},
    "stick_expert_kv": {"expert_kv": True, "kind": "stick_breaking"},
    "full": {"causal": False},
}


def build(name="jetmoe", **changes):
    router = build_router(H, E, K, topk_first=True, dtype=torch.float64)
    layer = AttentionExperts(router, N, D, dtype=torch.float64, **{**OPTIONS[name], **changes})
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return layer.eval()


def rotated(t, theta, positions):
    """Pairs (i, i + d/2) turned by position * theta^(-2i/d), one by one; t [S, d]."""
    out, half = t.clone(), t.shape[1] // 2
    for i in range(half):
        angle = positions.float() * torch.tensor(theta) ** (-2 * i / t.shape[1])
        cos, sin = angle.cos().double(), angle.sin().double()
        out[:, i] = t[:, i] * cos - t[:, i + half] * sin
        out[:, i + half] = t[:, i + half] * cos + t[:, i] * sin
    return out


def slowly(layer, x, weights, ids):
    """The layer expert by expert and head by head: every expert attends for every token."""
    y = torch.zeros_like(x)
    positions = torch.arange(x.shape[1])
    for b in range(x.shape[0]):
        kv = F.linear(x[b], layer.kv_proj.weight, layer.kv_proj.bias)
        k, v = kv.chunk(2, -1)
        for e in range(E):
            chosen = (ids.view(B, -1, ids.shape[-1])[b] == e).double()
            weight = (chosen * weights.view(B, -1, ids.shape[-1])[b]).sum(-1)
            heads = []
            for h in range(N):
                at = (e * N if layer.expert_kv else 0) + h
                q_h = x[b] @ layer.w_query[e, h * D : (h + 1) * D].T
                k_h, v_h = (t[:, at * D : (at + 1) * D] for t in (k, v))
                if layer.rope_theta is not None:
                    q_h, k_h = (rotated(t, layer.rope_theta, positions) for t in (q_h, k_h))
                out = reference.moa_attention(
                    q_h[None, :, None, None], k_h[None, :, None], v_h[None, :, None],
                    kind=layer.kind, causal=layer.causal, scale=layer.scale, window=layer.window,
                    softcap=layer.softcap,
                )  # fmt: skip
                out = out if layer.kind == "softmax" else out[0]
                heads.append(out[0, :, 0, 0])
            y[b] = y[b] + weight[:, None] * (torch.cat(heads, -1) @ layer.w_output[e].T)
    return y if layer.bias is None else y + layer.bias


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_its_formula(name):
    layer, x = build(name), torch.randn(B, S, H, dtype=torch.float64, requires_grad=True)
    out = layer(x, return_routing=True)
    assert out.topk_ids.shape == (B * S, E if layer.soft_routing else K)
    if layer.soft_routing:
        torch.testing.assert_close(out.topk_weights, out.router_logits.softmax(-1))
    expected = slowly(layer, x, out.topk_weights, out.topk_ids)
    torch.testing.assert_close(out.y, expected, rtol=1e-6, atol=1e-7)
    grad, leaves = torch.randn_like(x), [x, *layer.parameters()]
    ours = torch.autograd.grad(out.y, leaves, grad, retain_graph=True)
    theirs = torch.autograd.grad(expected, leaves, grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "full"])
def test_steps_with_a_cache_equal_the_whole(name):
    layer, x = build(name), torch.randn(B, 150, H, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x)
        cache, parts = KVCache(), []
        for start, end in ((0, 3), (3, 4), (4, 70), (70, 71), (71, 149), (149, 150)):
            parts.append(layer(x[:, start:end], cache=cache))
            assert cache.length == end
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-11)


def test_a_cache_goes_on_with_chosen_sequences():
    layer, x = build(), torch.randn(B, 4, H, dtype=torch.float64)
    rows = torch.tensor([1, 1, 0])
    with torch.no_grad():
        cache = KVCache()
        cache.select(rows)
        layer(x[:, :3], cache=cache)
        cache.select(rows)
        step = layer(x[rows, 3:], cache=cache)
        torch.testing.assert_close(step, layer(x[rows])[:, 3:], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["jetmoe", "moduleformer", "bam"])
def test_sequences_equal_calls_of_their_own(name):
    layer, lengths = build(name), (5, 1, 7)
    x = torch.randn(1, sum(lengths), H, dtype=torch.float64)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    own = torch.cat([layer(part) for part in x.split(lengths, 1)], 1)
    torch.testing.assert_close(layer(x, cu_seqlens=cu), own, rtol=1e-10, atol=1e-11)


def test_positions_of_ones_own():
    layer, x = build(), torch.randn(B, S, H, dtype=torch.float64)
    shifted = layer(x, positions=torch.arange(S) + 1000)
    # Only differences of positions count; angles are fp32.
    torch.testing.assert_close(shifted, layer(x), rtol=1e-2, atol=1e-2)
    each = torch.arange(S).expand(B, S)
    torch.testing.assert_close(layer(x, positions=each), layer(x))


def test_one_expert_is_plain_attention():
    router = TopKRouter(H, 1, 1, dtype=torch.float64)
    layer = AttentionExperts(router, N, D, dtype=torch.float64)
    x = torch.randn(B, S, H, dtype=torch.float64)
    q, (k, v) = F.linear(x, layer.w_query[0]), layer.kv_proj(x).chunk(2, -1)
    heads = (t.view(B, S, N, D).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), F.linear(out, layer.w_output[0]))


@pytest.mark.parametrize("name", ["jetmoe", "bam", "expert_kv"])
def test_given_routing(name):
    layer, x = build(name), torch.randn(B, S, H, dtype=torch.float64)
    out = layer(x, return_routing=True)
    again = layer(x, topk_ids=out.topk_ids, topk_weights=out.topk_weights, return_routing=True)
    torch.testing.assert_close(again.y, out.y)
    assert again.router_logits is None and again.aux_losses == {}
    torch.testing.assert_close(layer(x, topk_ids=out.topk_ids.view(B, S, -1)), out.y)
    ids, weights = torch.randint(-1, E + 1, (B, S, 3)), torch.rand(B, S, 3, dtype=torch.float64)
    y = layer(x, topk_ids=ids, topk_weights=weights)
    expected = slowly(layer, x, weights.flatten(0, 1), ids.flatten(0, 1))
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["jetmoe", "soft", "bam"])
def test_masked_experts_are_not_used(name):
    layer, x = build(name), torch.randn(B, S, H, dtype=torch.float64)
    mask = torch.tensor([True, False, True, False, True])
    out = layer(x, expert_mask=mask, return_routing=True)
    used = out.topk_ids[out.topk_weights > 0]
    assert set(used.tolist()) <= {0, 2, 4}
    torch.testing.assert_close(
        out.topk_weights.sum(-1), torch.ones(B * S, dtype=out.topk_weights.dtype)
    )
    with torch.no_grad():
        layer.w_query[1], layer.w_output[3] = torch.nan, torch.nan
    torch.testing.assert_close(layer(x, expert_mask=mask), out.y)


def test_aux_losses():
    layer = build(aux_losses=("load_balancing", "router_z"))
    x = torch.randn(B, S, H, dtype=torch.float64)
    out = layer(x, return_routing=True)
    assert set(out.aux_losses) == {"load_balancing", "router_z"}
    expected = load_balancing_loss(out.router_logits, out.topk_ids)
    torch.testing.assert_close(out.aux_losses["load_balancing"], expected)
    sum(out.aux_losses.values()).backward()
    assert layer.router.weight.grad is not None


def test_remainder():
    layer, x = build("stick_expert_kv"), torch.randn(B, S, H, dtype=torch.float64)
    assert layer(x, return_routing=True).remainder.shape == (B, S, E, N)
    layer = build("moduleformer")
    remainder = layer(x, return_routing=True).remainder
    assert remainder.shape == (B, S, K, N) and bool(((remainder > 0) & (remainder < 1)).all())
    assert build()(x, return_routing=True).remainder is None


@pytest.mark.parametrize("name", ["jetmoe", "moduleformer", "bam", "expert_kv"])
def test_compile(name):
    layer, x = build(name), torch.randn(B, S, H, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_autocast():
    layer = build().float()
    x = torch.randn(B, S, H)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    error = (y.float() - layer(x)).norm()
    assert error <= 0.1 * layer(x).norm()


def test_state_dict_round_trip():
    layer, other = build(), build()
    assert set(layer.state_dict()) == {
        "router.weight", "w_query", "w_output", "kv_proj.weight", "bias",
    }  # fmt: skip
    other.load_state_dict(layer.state_dict())
    x = torch.randn(B, S, H, dtype=torch.float64)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"kind": "linear"}, "kind"),
        ({"head_size": 257}, "257"),
        ({"head_size": 5, "rope_theta": 1e4}, "even"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"aux_losses": ("balance",)}, "balance"),
    ],
)
def test_bad_arguments(changes, word):
    arguments = {"num_kv_heads": N, "head_size": D, **changes}
    with pytest.raises(ValueError, match=f"AttentionExperts: .*{word}"):
        AttentionExperts(TopKRouter(H, E, K), **arguments)


def test_bad_calls():
    layer, x = build(), torch.randn(B, S, H, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"x must be \[B, S, 12\], got shape \[2, 12\]"):
        layer(x[:, 0])
    with pytest.raises(ValueError, match="topk_weights must come with topk_ids"):
        layer(x, topk_weights=torch.rand(B * S, K))
    with pytest.raises(ValueError, match="topk_ids must be"):
        layer(x, topk_ids=torch.zeros(3, K, dtype=torch.int64))
    with pytest.raises(ValueError, match="cache must be None with cu_seqlens"):
        layer(x[:1], cache=KVCache(), cu_seqlens=torch.tensor([0, S]))
    cache = KVCache()
    layer(x, cache=cache)
    with pytest.raises(ValueError, match=r"KVCache: k must be \[2, S, 3, 4\]"):
        layer(x[:1], cache=cache)


def test_cache_of_two_sizes():
    cache, k, v = KVCache(), torch.randn(B, 70, 1, 6), torch.randn(B, 70, N, 3)
    for start, end in ((0, 2), (2, 3), (3, 66), (66, 70)):
        held = cache.update(k[:, start:end], v[:, start:end])
        assert torch.equal(held[0], k[:, :end]) and torch.equal(held[1], v[:, :end])
    with pytest.raises(ValueError, match=r"KVCache: v must be \[2, S, 3, 3\]"):
        cache.update(k[:, :1], v[:, :1, :2])
    with pytest.raises(ValueError, match=r"KVCache: v must have B, S = \[2, 1\]"):
        cache.update(k[:, :1], v[:, :2])


# --- bank operations


@pytest.mark.parametrize("name", ["jetmoe", "moduleformer", "expert_kv", "bam"])
def test_select_is_a_mask(name):
    layer, x = build(name), torch.randn(B, S, H, dtype=torch.float64)
    keep = [4, 0, 2]
    mask = torch.zeros(E, dtype=torch.bool)
    mask[keep] = True
    small = layer.select(keep)
    assert small.router.num_experts == 3 and small.w_query.shape[0] == 3 and not small.training
    torch.testing.assert_close(small(x), layer(x, expert_mask=mask))
    assert small.kv_proj.weight.data_ptr() != layer.kv_proj.weight.data_ptr()
    ids = layer(x, expert_mask=mask, return_routing=True).topk_ids
    if not layer.soft_routing:
        chosen = torch.tensor(keep)[small(x, return_routing=True).topk_ids.long()]
        assert torch.equal(chosen, ids.long())


@pytest.mark.parametrize("init", ["random", "zero_output", "copy", "mean"])
@pytest.mark.parametrize("name", ["jetmoe", "moduleformer", "expert_kv"])
def test_append(name, init):
    layer, x = build(name, kv_bias=True), torch.randn(B, S, H, dtype=torch.float64)
    layer.w_query.requires_grad_(False)
    large = layer.append(2, init=init)
    assert large.router.num_experts == E + 2 and large.w_output.shape == (E + 2, H, N * D)
    assert not large.w_query.requires_grad and large.w_output.requires_grad
    old = torch.arange(E + 2) < E
    torch.testing.assert_close(large(x, expert_mask=old), layer(x))
    torch.testing.assert_close(large.select(range(E))(x), layer(x))
    if init == "zero_output":
        assert bool((large.w_output[E:] == 0).all()) and bool((large.w_query[E:] != 0).any())
    if init == "copy":
        ids = torch.tensor([E, E + 1]).expand(B, S, 2)
        weights = torch.rand(B, S, 2, dtype=torch.float64)
        ours = large(x, topk_ids=ids, topk_weights=weights)
        theirs = layer(x, topk_ids=ids - E, topk_weights=weights)
        torch.testing.assert_close(ours, theirs)


def test_bad_bank_operations():
    layer = build()
    with pytest.raises(ValueError, match=r"AttentionExperts\.select: ids must be in \[0, 5\)"):
        layer.select([5])
    with pytest.raises(ValueError, match=r"AttentionExperts\.append: init must be"):
        layer.append(1, init="slice")
    with pytest.raises(ValueError, match="number of experts must be >= 1, got 0"):
        layer.append(0)
