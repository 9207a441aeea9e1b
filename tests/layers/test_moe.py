from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.moe import build_moe
from torch import Tensor

from moe_ops.layers import (
    Experts,
    MoE,
    MoEOutput,
    SharedExperts,
    TopKRouter,
    load_balancing_loss,
    router_z_loss,
)

B, S, H, I, E, K = 2, 7, 6, 4, 8, 2
T = B * S

CONFIGS = {
    "mixtral": {"router": "mixtral"},
    "qwen2_moe": {
        "router": "qwen2_moe",
        "shared_intermediate_size": 10,
        "shared_expert_gate": True,
    },
    "deepseek_v3": {
        "router": "deepseek_v3",
        "num_groups": 4,
        "num_topk_groups": 2,
        "num_shared_experts": 2,
    },
    "gpt_oss": {"router": "gpt_oss", "activation": "swiglu_oai", "interleaved": True, "bias": True},
    "llama4": {"router": "llama4", "num_shared_experts": 1},
    "dbrx": {"router": "dbrx", "renormalize_p": 2.0},
    "topp": {"kind": "topp", "top_p": 0.5},
    "expert_choice": {"kind": "expert_choice"},
    "phimoe": {"router": "phimoe", "sparsemixer_eps": 0.3},
    "relu2": {"activation": "relu2", "num_shared_experts": 1},
}


def build(name: str, **changes) -> MoE:
    kwargs = {"dtype": torch.float64, "logits_dtype": None, **CONFIGS[name], **changes}
    moe = build_moe(H, I, E, K, **kwargs).eval()
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.6)
    if moe.router.expert_bias is not None:
        moe.router.expert_bias.uniform_(-0.2, 0.2)
    return moe


def one_expert(bank: Experts, e: int, x: Tensor) -> Tensor:
    up = F.linear(x, bank.w_gate_up[e], None if bank.b_gate_up is None else bank.b_gate_up[e])
    if bank.activation == "swiglu":
        gate, up = up.chunk(2, -1)
        h = F.silu(gate) * up
    elif bank.activation == "swiglu_oai":
        gate, up = up[..., ::2].clamp(max=7), up[..., 1::2].clamp(-7, 7)
        h = (up + 1) * gate * (1.702 * gate).sigmoid()
    else:
        h = F.relu(up) ** 2
    return F.linear(h, bank.w_down[e], None if bank.b_down is None else bank.b_down[e])


def loop(moe: MoE, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """The layer, expert by expert, given the routing."""
    flat = x.reshape(-1, H)
    out = torch.zeros_like(flat)
    for e in range(moe.experts.num_experts):
        token, slot = (ids == e).nonzero(as_tuple=True)
        w = weights[token, slot, None]
        if moe.router.apply_router_weight_on_input:
            rows = one_expert(moe.experts, e, flat[token] * w)
        else:
            rows = one_expert(moe.experts, e, flat[token]) * w
        out = out.index_add(0, token, rows)
    if moe.shared_experts is not None:
        s = moe.shared_experts
        up = F.linear(flat, s.w_gate_up)
        h = F.silu(up.chunk(2, -1)[0]) * up.chunk(2, -1)[1] if s.gated else F.relu(up) ** 2
        dense = F.linear(h, s.w_down)
        if moe.shared_expert_gate is not None:
            dense = dense * moe.shared_expert_gate(flat).sigmoid()
        out = out + dense
    return out.view(x.shape)


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_gradients_against_a_loop(name):
    moe = build(name)
    x = torch.randn(B, S, H, dtype=torch.float64, requires_grad=True)
    out = moe(x, return_routing=True)
    assert isinstance(out, MoEOutput)
    router = moe.router
    logits = F.linear(x.reshape(-1, H), router.weight, router.bias)
    torch.testing.assert_close(out.router_logits, logits)
    expected = loop(moe, x, router.weights_at(logits, out.topk_ids), out.topk_ids)
    torch.testing.assert_close(out.y, expected)
    torch.testing.assert_close(moe(x), expected)

    upstream = torch.randn_like(expected)
    inputs = [x, *moe.parameters()]
    ours = torch.autograd.grad((out.y * upstream).sum(), inputs)
    theirs = torch.autograd.grad((expected * upstream).sum(), inputs)
    for (n, _), a, b in zip([("x", x), *moe.named_parameters()], ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=n: f"{n}: {m}")
        assert a.abs().sum() > 0, n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_narrow_dtypes(name, dtype):
    wide = build(name)
    narrow = copy.deepcopy(wide).to(dtype)
    wide.load_state_dict(narrow.state_dict())
    x = torch.randn(B, S, H).to(dtype)
    out = narrow(x, return_routing=True)
    assert out.y.dtype == dtype
    expected = wide(x.double(), topk_ids=out.topk_ids, topk_weights=out.topk_weights.double())
    # Each output is a sum of products that are rounded a few times on their way.
    error = (out.y.double() - expected).norm() / expected.norm()
    assert error < 8 * torch.finfo(dtype).eps


def test_autocast(device):
    moe = build("qwen2_moe", dtype=torch.float32)
    x = torch.randn(B, S, H)
    exact = moe(x)
    with torch.autocast(device.type, torch.bfloat16):
        y = moe(x)
    assert (y.float() - exact).norm() / exact.norm() < 0.1
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in moe.parameters())


@pytest.mark.parametrize("shape", [(H,), (3, H), (2, 3, 2, H), (0, H), (2, 0, H)])
def test_leading_dimensions(shape):
    moe = build("mixtral")
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out = moe(x, return_routing=True)
    assert out.y.shape == x.shape
    assert out.topk_ids.shape == (x.numel() // H, K)
    torch.testing.assert_close(out.y.reshape(-1, H), moe(x.reshape(-1, H)))
    out.y.sum().backward()
    assert x.grad.shape == x.shape


def test_strided_input():
    moe = build("deepseek_v3")
    x = torch.randn(S, H, B, dtype=torch.float64).permute(2, 0, 1)
    torch.testing.assert_close(moe(x), moe(x.contiguous()))
    same = torch.randn(1, 1, H, dtype=torch.float64).expand(B, S, H)
    torch.testing.assert_close(moe(same), moe(same.contiguous()))


@pytest.mark.parametrize("on_all", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_given_ids(on_all, dtype):
    moe = build("mixtral")
    x = torch.randn(B, S, H, dtype=torch.float64)
    ids = torch.randint(E, (B, S, 3)).to(dtype)
    ids[0, 0, 1] = -1
    given = ids if on_all else ids.view(T, 3)
    out = moe(x, topk_ids=given, return_routing=True)
    assert torch.equal(out.topk_ids, ids.view(T, 3))
    weights = moe.router.weights_at(out.router_logits, ids.view(T, 3))
    torch.testing.assert_close(out.topk_weights, weights)
    torch.testing.assert_close(out.y, loop(moe, x, weights, ids.view(T, 3)))
    out.y.sum().backward()
    assert moe.router.weight.grad.abs().sum() > 0


def test_given_ids_and_weights_do_not_run_the_router():
    moe = build("mixtral", aux_losses=("load_balancing",))
    moe.router.forward = moe.router.logits = None  # a call would raise
    x = torch.randn(B, S, H, dtype=torch.float64)
    ids, weights = torch.randint(E, (T, 1)), torch.rand(T, 1, dtype=torch.float64)
    out = moe(x, topk_ids=ids, topk_weights=weights, return_routing=True)
    assert out.router_logits is None and out.aux_losses == {}
    torch.testing.assert_close(out.y, loop(moe, x, weights, ids))


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "expert_choice"])
def test_an_expert_mask_is_a_selection(name):
    moe = build(name)
    kept = [2, 3, 6, 7]  # whole groups of deepseek_v3
    mask = torch.zeros(E, dtype=torch.bool)
    mask[kept] = True
    x = torch.randn(B, S, H, dtype=torch.float64)
    out = moe(x, expert_mask=mask, return_routing=True)
    assert ((out.topk_ids < 0) | mask[out.topk_ids.long()]).all()
    torch.testing.assert_close(out.y, moe.select(kept)(x))


def test_an_expert_mask_drops_given_ids():
    moe = build("mixtral")
    mask = torch.ones(E, dtype=torch.bool)
    mask[3] = False
    x = torch.randn(B, S, H, dtype=torch.float64)
    ids = torch.randint(E, (T, 2))
    dropped = torch.where(ids == 3, -1, ids)
    for weights in (None, torch.rand(T, 2, dtype=torch.float64)):
        out = moe(x, topk_ids=ids, topk_weights=weights, expert_mask=mask, return_routing=True)
        assert torch.equal(out.topk_ids, dropped)
        assert (out.topk_weights[ids == 3] == 0).all()
        torch.testing.assert_close(out.y, loop(moe, x, out.topk_weights, dropped))


def test_aux_losses():
    names = ("load_balancing", "router_z", "entropy", "mutual_information", "concentration")
    moe = build("deepseek_v3", aux_losses=names)
    x = torch.randn(B, S, H, dtype=torch.float64)
    mask = torch.rand(B, S) > 0.3
    out = moe(x, token_mask=mask, return_routing=True)
    assert tuple(out.aux_losses) == names
    torch.testing.assert_close(
        out.aux_losses["load_balancing"],
        load_balancing_loss(out.router_logits, out.topk_ids, score_func="sigmoid", token_mask=mask),
    )
    torch.testing.assert_close(
        out.aux_losses["router_z"], router_z_loss(out.router_logits, token_mask=mask)
    )
    (grad,) = torch.autograd.grad(sum(out.aux_losses.values()), moe.router.weight)
    assert grad.abs().sum() > 0
    # Nothing is added to gradients behind the caller's back.
    plain = build("deepseek_v3")
    plain.load_state_dict(moe.state_dict())
    (a,) = torch.autograd.grad(moe(x, return_routing=True).y.sum(), moe.router.weight)
    (b,) = torch.autograd.grad(plain(x).sum(), plain.router.weight)
    torch.testing.assert_close(a, b)


def test_input_stays_as_it_was_under_jitter():
    moe = build("mixtral", jitter=0.2).train()
    x = torch.randn(B, S, H, dtype=torch.float64)
    before = x.clone()
    out = moe(x, return_routing=True)
    assert torch.equal(x, before)
    # The experts see x itself.
    torch.testing.assert_close(out.y, loop(moe, x, out.topk_weights, out.topk_ids))


# ----------------------------------------------------------------------------- bank operations


@pytest.mark.parametrize("name", CONFIGS)
def test_select_all_is_the_same_layer(name):
    moe = build(name)
    x = torch.randn(B, S, H, dtype=torch.float64)
    same = moe.select(range(E))
    assert torch.equal(same(x), moe(x))
    shared = {p.data_ptr() for p in moe.parameters()} & {p.data_ptr() for p in same.parameters()}
    assert not shared


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "deepseek_v3"])
def test_permuted_experts_are_the_same_layer(name):
    moe = build(name)
    x = torch.randn(B, S, H, dtype=torch.float64)
    torch.testing.assert_close(moe.select(torch.randperm(E))(x), moe(x))


SLICEABLE = {
    "mixtral": {},
    "qwen2_moe": {},
    "gpt_oss": {},
    "llama4": None,  # the weight is applied before the activation, inside each slice
    "dbrx": {},
    "relu2": {},
    "sigmoid": {"score_func": "sigmoid", "bias": True},
    "deepseek_v3": {"num_groups": 1, "num_topk_groups": 1},
    "softmax-bias-groups": {"expert_bias": True, "num_groups": 4, "num_topk_groups": 2},
}


@pytest.mark.parametrize("name", [n for n, c in SLICEABLE.items() if c is not None])
@pytest.mark.parametrize("factor", [2, 4])
def test_slices_compute_the_same_and_concat_restores(name, factor):
    moe = build(
        name if name in CONFIGS else "mixtral",
        **({"router": None} if name not in CONFIGS else {}),
        **SLICEABLE[name],
    )
    x = torch.randn(B, S, H, dtype=torch.float64)
    fine = moe.split(factor=factor)
    assert fine.experts.num_experts == E * factor
    assert fine.experts.intermediate_size == I // factor
    assert fine.router.top_k == K * factor
    torch.testing.assert_close(fine(x), moe(x))
    back = fine.merge([list(range(e * factor, (e + 1) * factor)) for e in range(E)], mode="concat")
    torch.testing.assert_close(back(x), moe(x))
    for (n, p), q in zip(moe.state_dict().items(), back.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, msg=n)


def test_copies_merge_to_the_same_layer():
    moe = build("qwen2_moe")
    x = torch.randn(B, S, H, dtype=torch.float64)
    wide = moe.split([5], 3, mode="copy")
    assert wide.experts.num_experts == E + 2
    back = wide.merge([[0], [1], [2], [3], [4], [5, 6, 7], [8], [9]])
    torch.testing.assert_close(back(x), moe(x))


@pytest.mark.parametrize("init", ["random", "zero_output", "copy", "mean"])
def test_append(init):
    moe = build("mixtral", shared_intermediate_size=4)
    x = torch.randn(B, S, H, dtype=torch.float64)
    grown = moe.append(2, init=init)
    assert grown.experts.num_experts == grown.router.num_experts == E + 2
    mask = torch.arange(E + 2) < E
    torch.testing.assert_close(grown(x, expert_mask=mask), moe(x))
    grown(x).sum().backward()
    torch.testing.assert_close(grown.select(range(E))(x), moe(x))


def test_append_a_layer():
    first, second = build("mixtral"), build("mixtral")
    x = torch.randn(B, S, H, dtype=torch.float64)
    both = first.append(second)
    mask = torch.arange(2 * E) >= E
    torch.testing.assert_close(both(x, expert_mask=mask), second(x))
    torch.testing.assert_close(both(x, expert_mask=~mask), first(x))


def test_groups_that_stop_dividing():
    moe = build("deepseek_v3")
    with pytest.raises(ValueError, match="groups"):
        moe.select([0, 1, 2])
    with pytest.raises(ValueError, match="num_groups"):
        moe.append(1)
    assert moe.append(4, num_groups=4).router.num_groups == 4


def test_operations_keep_the_mode_and_options():
    moe = build("mixtral", aux_losses=("router_z",), freeze_routing_in_recompute=True)
    for result in (moe.select([0, 1, 2]), moe.append(1), moe.split(), moe.merge([[0, 1], [2, 3]])):
        assert not result.training
        assert result.aux_losses == ("router_z",) and result.freeze_routing_in_recompute
        assert result.router.renormalize


# ------------------------------------------------------------------------------- module manners


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_state_dict_deepcopy_and_pickle(name):
    moe = build(name, freeze_routing_in_recompute=True)
    x = torch.randn(B, S, H, dtype=torch.float64)
    expected = moe(x)
    fresh = build(name)
    fresh.load_state_dict(moe.state_dict())
    # A frozen layer computes weights apart from ids, so the last bits may differ.
    torch.testing.assert_close(fresh(x), expected)
    assert torch.equal(copy.deepcopy(moe)(x), expected)
    buffer = io.BytesIO()
    torch.save(moe, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)


def test_moving_dtypes_keeps_the_bias():
    moe = build("deepseek_v3").to(torch.bfloat16)
    assert moe.router.weight.dtype == moe.experts.w_down.dtype == torch.bfloat16
    assert moe.router.expert_bias.dtype == torch.float32
    assert moe(torch.randn(3, H).bfloat16()).dtype == torch.bfloat16


def test_meta_construction(device):
    options = {"num_groups": 4, "num_shared_experts": 1}
    moe = build_moe(H, I, E, K, router="deepseek_v3", device="meta", **options)
    assert all(t.is_meta for t in moe.state_dict().values())
    moe = moe.to_empty(device=device)
    moe.load_state_dict(build("deepseek_v3", **options).state_dict())
    moe(torch.randn(3, H))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda m: m(torch.randn(3, H + 1)), "x must be"),
        (lambda m: m(torch.randn(3, H), topk_weights=torch.ones(3, 1)), "topk_weights"),
        (lambda m: m(torch.randn(3, H), topk_ids=torch.zeros(2, 1).int()), "topk_ids"),
        (lambda m: m(torch.randn(3, H), topk_ids=torch.zeros(3).int()), "topk_ids"),
        (
            lambda m: m(
                torch.randn(3, H), topk_ids=torch.zeros(3, 1).int(), topk_weights=torch.ones(3, 2)
            ),
            "topk_weights",
        ),
        (lambda m: MoE(TopKRouter(H, 4, 2), m.experts), "num_experts"),
        (lambda m: MoE(TopKRouter(H + 1, E, 2), m.experts), "hidden_size"),
        (lambda m: MoE(m.router, m.experts, aux_losses=("z",)), "aux_losses"),
        (lambda m: MoE(m.router, m.experts, None, torch.nn.Linear(H, 1)), "shared_expert_gate"),
        (lambda m: build_moe(H, I, E, K, shared_expert_gate=True), "shared_expert_gate"),
    ],
)
def test_bad_input(call, word):
    with pytest.raises(ValueError) as caught:
        call(build_moe(H, I, E, K))
    assert word in str(caught.value) and ", got " in str(caught.value)


def test_parts_can_be_shared_and_replaced():
    router, experts = TopKRouter(H, E, K), Experts(E, H, I)
    shared = SharedExperts(H, I)
    first, second = MoE(router, experts, shared), MoE(TopKRouter(H, E, 1), experts)
    x = torch.randn(4, H)
    (first(x).sum() + second(x).sum()).backward()
    assert experts.w_down.grad is not None and first.experts is second.experts
