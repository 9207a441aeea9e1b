from __future__ import annotations

import copy
import io

import pytest
import torch

from moe_ops.layers import Router
from moe_ops.layers.router.sparsemixer import sparsemixer
from moe_ops.reference._scores import SCORE_FUNCS

T, H, E, K = 13, 6, 8, 2

# Every way of routing that differs in how weights follow from ids.
ROUTERS = {
    "softmax": {},
    "softmax-renormalize": {"renormalize": True, "routed_scaling_factor": 1.5},
    "softmax-p2": {"renormalize": True, "renormalize_p": 2.0, "routed_scaling_factor": 1.5},
    **{name: {"score_func": name} for name in SCORE_FUNCS if name != "softmax"},
    "sigmoid-bias-groups": {
        "score_func": "sigmoid",
        "renormalize": True,
        "expert_bias": True,
        "num_groups": 4,
        "num_topk_groups": 2,
        "group_score": "top2_sum",
        "routed_scaling_factor": 2.5,
    },
    "softmax-groups": {"num_groups": 4, "num_topk_groups": 2},
    "topk-first": {"topk_first": True, "bias": True},
    "topk-first-sigmoid": {"topk_first": True, "score_func": "sigmoid"},
    "topp": {"kind": "topp", "top_p": 0.5, "max_k": 4},
    "topp-renormalize": {"kind": "topp", "top_p": 0.5, "renormalize": True},
    "expert-choice": {"kind": "expert_choice", "capacity_factor": 1.5},
    "expert-choice-sigmoid": {"kind": "expert_choice", "score_func": "sigmoid"},
    "sparsemixer": {"kind": "sparsemixer", "sparsemixer_eps": 0.2},
}


def make(name: str, **changes) -> Router:
    router = Router(H, E, K, dtype=torch.float64, **{**ROUTERS[name], **changes})
    if router.expert_bias is not None:
        router.expert_bias.uniform_(-0.3, 0.3)
    return router


@pytest.mark.parametrize("name", ROUTERS)
def test_weights_at_the_chosen_ids_are_the_weights(name):
    router = make(name).eval()
    x = torch.randn(T, H, dtype=torch.float64)
    logits, weights, ids = router(x)
    assert ids.dtype == torch.int32 and weights.dtype == torch.float64
    assert logits.shape == (T, E) and weights.shape == ids.shape
    torch.testing.assert_close(router.weights_at(logits, ids), weights)
    assert torch.equal(router.choose(logits), ids)
    given = router(x, topk_ids=ids.long())
    torch.testing.assert_close(given.topk_weights, weights)

    # The gradients agree as well.
    upstream = torch.randn_like(weights)
    logits = logits.detach().requires_grad_()
    (g1,) = torch.autograd.grad((router.route(logits)[0] * upstream).sum(), logits)
    (g2,) = torch.autograd.grad((router.weights_at(logits, ids) * upstream).sum(), logits)
    torch.testing.assert_close(g1, g2)


@pytest.mark.parametrize("name", ROUTERS)
def test_ids_without_an_expert_weigh_nothing(name):
    router = make(name).eval()
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    ids = router.choose(logits).long()
    ids[:, 0] = -1
    ids[3] = E + 2
    weights = router.weights_at(logits, ids)
    assert (weights[:, 0] == 0).all() and (weights[3] == 0).all()
    weights.sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[3] == 0).all()


@pytest.mark.parametrize("name", ROUTERS)
def test_an_expert_mask_routes_as_if_the_others_did_not_exist(name):
    # One masked expert in each of two groups, so that the groups stay equal after selection.
    kept = [0, 1, 2, 3, 4, 5]
    router = make(name).eval()
    mask = torch.zeros(E, dtype=torch.bool)
    mask[kept] = True
    x = torch.randn(T, H, dtype=torch.float64)
    masked = router(x, expert_mask=mask)
    if router.num_groups > 1:
        router.num_topk_groups = 2
    selected = router.select(kept)(x)
    assert ((masked.topk_ids < 0) | mask[masked.topk_ids.long()]).all()
    if router.kind == "expert_choice":
        return  # a masked expert takes part of the tokens' slots, and T * K / E differs
    width = selected.topk_ids.shape[1]
    assert torch.equal(masked.topk_ids[:, :width], selected.topk_ids)
    torch.testing.assert_close(masked.topk_weights[:, :width], selected.topk_weights)
    assert (masked.topk_ids[:, width:] < 0).all()


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("left", [0, 1])
def test_masks_that_leave_too_few_experts(name, left):
    router = make(name).eval()
    mask = torch.zeros(E, dtype=torch.bool)
    mask[5 : 5 + left] = True
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    _, weights, ids = router(x, expert_mask=mask)
    assert weights.isfinite().all()
    assert set(ids.unique().tolist()) <= ({-1, 5} if left else {-1})
    assert (weights[ids < 0] == 0).all()
    weights.sum().backward()
    assert x.grad.isfinite().all()


def test_a_bias_does_not_bring_masked_experts_back():
    router = Router(H, E, K, score_func="sigmoid", expert_bias=True)
    router.expert_bias[3] = 100.0
    mask = torch.ones(E, dtype=torch.bool)
    mask[3] = False
    assert (router(torch.randn(T, H)).topk_ids == 3).any(1).all()
    assert not (router(torch.randn(T, H), expert_mask=mask).topk_ids == 3).any()


def test_the_bias_chooses_but_does_not_weigh():
    router = Router(H, E, 1, score_func="sigmoid", expert_bias=True)
    router.expert_bias[3] = -1.0
    router.expert_bias[2] = 5.0
    logits, weights, ids = router(torch.randn(T, H))
    assert (ids == 2).all()
    torch.testing.assert_close(weights[:, 0], logits[:, 2].sigmoid())


@pytest.mark.parametrize(
    ("convert", "name"),
    [
        (lambda m: m.to(torch.bfloat16), "to"),
        (lambda m: m.half(), "half"),
        (lambda m: m.bfloat16(), "bfloat16"),
        (lambda m: m.double(), "double"),
        (lambda m: torch.nn.Sequential(m).bfloat16()[0], "nested"),
    ],
)
def test_expert_bias_stays_fp32(convert, name):
    router = Router(H, E, K, expert_bias=True)
    router.expert_bias.copy_(torch.rand(E))
    before = router.expert_bias.clone()
    router = convert(router)
    assert router.weight.dtype != torch.float32
    assert router.expert_bias.dtype == torch.float32
    assert torch.equal(router.expert_bias, before)


def test_meta_construction():
    router = Router(H, E, K, expert_bias=True, device="meta", dtype=torch.bfloat16)
    assert router.expert_bias.is_meta
    router = router.to_empty(device=torch.get_default_device())
    assert router.expert_bias.dtype == torch.float32 and not router.expert_bias.is_meta
    assert not router.tokens_per_expert.is_meta and (router.tokens_per_expert == 0).all()
    router.reset_parameters()
    assert (router.expert_bias == 0).all() and router.weight.abs().max() <= H**-0.5


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_dtype(autocast):
    x = torch.randn(T, H).bfloat16()
    plain = Router(H, E, K, dtype=torch.bfloat16)
    wide = Router(H, E, K, dtype=torch.bfloat16, logits_dtype=torch.float32)
    wide.load_state_dict(plain.state_dict())
    exact = x.float() @ plain.weight.float().T
    with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=autocast):
        assert plain.logits(x).dtype == torch.bfloat16
        assert wide.logits(x).dtype == torch.float32
        torch.testing.assert_close(wide.logits(x), exact)
        out = plain(x)
    assert out.topk_weights.dtype == torch.float32


def test_half_input_of_a_float_router():
    router = Router(H, E, K)
    assert router(torch.randn(T, H).bfloat16()).router_logits.dtype == torch.float32


def test_jitter_is_out_of_place_and_only_in_training():
    router = Router(H, E, K, jitter=0.3)
    x = torch.randn(T, H)
    before = x.clone()
    first, second = router(x).router_logits, router(x).router_logits
    assert torch.equal(x, before)
    assert not torch.equal(first, second)
    exact = x @ router.weight.T
    assert (first - exact).abs().max() <= 0.3 * (x.abs() @ router.weight.abs().T).max()
    torch.testing.assert_close(router.eval()(x).router_logits, exact)


def test_no_tokens():
    for name in ROUTERS:
        router = make(name)
        x = torch.zeros(0, H, dtype=torch.float64, requires_grad=True)
        logits, weights, ids = router(x)
        assert logits.shape == (0, E) and weights.shape == ids.shape and ids.shape[0] == 0
        weights.sum().backward()


def test_expert_choice_capacity():
    router = Router(H, E, K, kind="expert_choice", capacity_factor=1.0)
    ids = router(torch.randn(16, H)).topk_ids
    assert torch.bincount(ids[ids >= 0].long(), minlength=E).tolist() == [4] * E


def test_topp_reaches_its_mass():
    router = Router(H, E, K, kind="topp", top_p=0.6)
    logits, weights, ids = router(torch.randn(T, H) * 3)
    assert (weights.sum(1) >= 0.6 - 1e-6).all()
    probs = logits.softmax(-1)
    assert torch.equal(ids[:, 0].long(), probs.argmax(1))


# ------------------------------------------------------------------------------- SparseMixer


def test_sparsemixer_by_hand():
    # Competing with 1.0 at eps 0.25: those within half of it, relative to the larger magnitude.
    logits = torch.tensor([[1.0, 0.6, 0.4, -3.0]], dtype=torch.float64)
    weights, ids = sparsemixer(logits, 2, eps=0.25)
    assert ids.tolist() == [[0, 1]]
    first = torch.tensor([1.0, 0.6]).double().softmax(0)[0]
    second = torch.tensor([0.6, 0.4]).double().softmax(0)[0]
    torch.testing.assert_close(weights[0], torch.stack([first, second]))


def test_sparsemixer_in_training():
    logits = torch.zeros(4000, 4, dtype=torch.float64)
    logits[:, 0] = 0.4
    weights, ids = sparsemixer(logits, 1, eps=5.0, training=True)
    p = logits[0].softmax(0)
    share = torch.bincount(ids[:, 0].long(), minlength=4) / 4000
    assert (share - p).abs().max() < 0.03
    assert torch.allclose(weights[ids == 0], p[0])
    # Not the largest: the probability with chance 1/4, else a third of it.
    other = weights[ids != 0]
    third, whole = torch.isclose(other, p[1] / 3), torch.isclose(other, p[1])
    assert (third | whole).all()
    assert abs(third.double().mean().item() - 0.75) < 0.05


def test_sparsemixer_backward_leaves_the_factor_out():
    logits = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    weights, ids = sparsemixer(logits, 2, eps=1.0, training=True)
    upstream = torch.rand_like(weights)
    (grad,) = torch.autograd.grad((weights * upstream).sum(), logits)
    exact = sparsemixer(logits, 2, eps=1.0, topk_ids=ids)[0]
    (expected,) = torch.autograd.grad((exact * upstream).sum(), logits)
    torch.testing.assert_close(grad, expected)
    assert (weights < exact * 0.9).any()


def test_sparsemixer_draws_the_same_numbers_for_given_ids():
    logits = torch.randn(20, 6)
    torch.manual_seed(1)
    weights, ids = sparsemixer(logits, 2, eps=1.0, training=True)
    after = torch.rand(1)
    torch.manual_seed(1)
    again, same = sparsemixer(logits, 2, eps=1.0, training=True, topk_ids=ids)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(ids, same) and torch.equal(weights, again)


# ----------------------------------------------------------------------------- bank operations


def rows_equal(router: Router, index: list[int], other: Router) -> None:
    assert torch.equal(router.weight, other.weight[index])
    for name in ("bias", "expert_bias"):
        if getattr(other, name) is not None:
            assert torch.equal(getattr(router, name), getattr(other, name)[index])


def biased_router(**kwargs) -> Router:
    router = Router(H, E, K, bias=True, expert_bias=True, **kwargs).eval()
    torch.nn.init.normal_(router.bias)
    router.expert_bias.normal_()
    return router


def test_select_keeps_rows_dtype_and_requires_grad():
    router = biased_router(dtype=torch.bfloat16)
    router.weight.requires_grad_(False)
    small = router.select([6, 1, 1])
    rows_equal(small, [6, 1, 1], router)
    assert small.num_experts == 3 and small.weight.dtype == torch.bfloat16
    assert small.expert_bias.dtype == torch.float32
    assert not small.weight.requires_grad and small.bias.requires_grad
    assert small.weight.data_ptr() != router.weight.data_ptr()
    assert small.tokens_per_expert.shape == (3,) and not small.training
    everything = router.select(torch.arange(E))
    x = torch.randn(T, H).bfloat16()
    for a, b in zip(router(x), everything(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("ids", "groups"),
    [
        ([0, 1, 2, 3], 2),
        ([4, 5, 0, 1], 2),
        ([0, 2, 4, 6], 4),
        ([7, 6, 5, 4, 3, 2], 3),
        ([2, 3], 1),
    ],
)
def test_select_follows_groups(ids, groups):
    router = Router(H, E, K, num_groups=4, num_topk_groups=2)
    small = router.select(ids)
    assert small.num_groups == groups and small.num_topk_groups == min(2, groups)


@pytest.mark.parametrize("ids", [[0, 1, 2], [0, 2, 1, 3], [0, 2, 3, 1]])
def test_select_refuses_uneven_groups(ids):
    router = Router(H, E, K, num_groups=4, num_topk_groups=2)
    with pytest.raises(ValueError, match="groups"):
        router.select(ids)
    assert router.select(ids, num_groups=1).num_groups == 1


def test_select_refuses_fewer_experts_than_top_k():
    router = Router(H, E, 3)
    with pytest.raises(ValueError, match="top_k must be in"):
        router.select([0, 1])
    assert router.select([0, 1], top_k=2).top_k == 2


def test_append():
    router = biased_router()
    copied = router.append(3, init="copy")
    rows_equal(copied, [*range(E), 0, 1, 2], router)
    mean = router.append(1, init="mean")
    torch.testing.assert_close(mean.weight[E], router.weight.mean(0))
    random = router.append(2)
    assert random.weight[E:].abs().max() <= H**-0.5 and (random.bias[E:] == 0).all()
    torch.testing.assert_close(random.expert_bias[E:], router.expert_bias.mean().expand(2))
    rows_equal(random.select(range(E)), list(range(E)), router)
    both = router.append(biased_router())
    assert both.num_experts == 2 * E and torch.equal(both.weight[:E], router.weight)


def test_merge_rows():
    router = biased_router()
    merged = router.merge([[0, 3], [1], [2, 4, 5, 6, 7]])
    torch.testing.assert_close(merged.weight[0], (router.weight[0] + router.weight[3]) / 2)
    assert torch.equal(merged.weight[1], router.weight[1])
    w = torch.tensor([3.0, 0, 0, 1, 0, 0, 0, 0])
    merged = router.merge([[0, 3]], w, top_k=1)
    torch.testing.assert_close(merged.bias[0], 0.75 * router.bias[0] + 0.25 * router.bias[3])


def test_split_copy_then_merge_is_the_identity():
    router = biased_router()
    back = router.split([1, 4], 3, mode="copy").merge(
        [[0], [1, 2, 3], [4], [5], [6, 7, 8], [9], [10], [11]]
    )
    torch.testing.assert_close(back.weight, router.weight)
    torch.testing.assert_close(back.expert_bias, router.expert_bias)


def test_slices_scale_top_k_and_weights():
    router = biased_router()
    split = router.split(factor=3)
    assert split.num_experts == 3 * E and split.top_k == 3 * K
    assert split.routed_scaling_factor == pytest.approx(3.0)
    back = split.merge([list(range(3 * e, 3 * e + 3)) for e in range(E)], mode="concat")
    assert back.top_k == K and back.routed_scaling_factor == pytest.approx(1.0)
    torch.testing.assert_close(back.expert_bias, router.expert_bias)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda r: r.select([E]), "ids"),
        (lambda r: r.select([]), "ids"),
        (lambda r: r.append(0), "number of experts"),
        (lambda r: r.append(1, init="zeros"), "init"),
        (lambda r: r.append(Router(H + 1, 2, 1)), "hidden_size"),
        (lambda r: r.split([0], 2), "mode='slice'"),
        (lambda r: r.split([0, 0], 2, mode="copy"), "repeat"),
        (lambda r: r.split(None, 0), "factor"),
        (lambda r: r.split(None, 2, mode="halve"), "mode"),
        (lambda r: r.merge([[0, 1], [1, 2]]), "at most once"),
        (lambda r: r.merge([]), "groups"),
        (lambda r: r.merge([[0, 1], [2]], mode="concat"), "one size"),
        (lambda r: r.merge([[0, 1, 2], [3, 4, 5]], mode="concat"), "top_k"),
        (lambda r: r.merge([[0], [1]], [1.0]), "weights"),
        (lambda r: r.merge([[0], [1]], [0.0] * E), "weights"),
        (lambda r: r.merge([[0], [1]], [-1.0] * E), "weights"),
        (lambda r: r(torch.randn(2, H), expert_mask=torch.ones(3).bool()), "expert_mask"),
        (lambda r: r(torch.randn(2, H), expert_mask=torch.ones(E)), "expert_mask"),
        (lambda r: r(torch.randn(2, H), topk_ids=torch.zeros(3, 1).int()), "topk_ids"),
    ],
)
def test_bad_calls(call, word):
    with pytest.raises(ValueError) as caught:
        call(Router(H, E, K))
    assert word in str(caught.value) and ", got " in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": E + 1}, "top_k"),
        ({"num_experts": 0}, "num_experts"),
        ({"kind": "other"}, "kind"),
        ({"score_func": "relu"}, "score_func"),
        ({"num_groups": 3}, "num_groups"),
        ({"num_groups": 4, "num_topk_groups": 5}, "num_topk_groups"),
        ({"num_groups": 8, "num_topk_groups": 1}, "top_k"),
        ({"group_score": "sum"}, "group_score"),
        ({"group_score": "top2_sum", "num_groups": 8, "num_topk_groups": 4}, "at least 2"),
        ({"jitter": 1.0}, "jitter"),
        ({"kind": "topp", "top_p": 0.0}, "top_p"),
        ({"kind": "topp", "max_k": E + 1}, "max_k"),
        ({"kind": "expert_choice", "capacity_factor": 0.0}, "capacity_factor"),
        ({"renormalize_p": 0.5}, "renormalize_p"),
        ({"kind": "topp", "expert_bias": True}, "expert_bias"),
        ({"kind": "expert_choice", "renormalize": True}, "renormalize"),
        ({"kind": "sparsemixer", "score_func": "sigmoid"}, "score_func"),
    ],
)
def test_bad_construction(kwargs, word):
    with pytest.raises(ValueError) as caught:
        Router(**{"hidden_size": H, "num_experts": E, "top_k": K, **kwargs})
    assert word in str(caught.value) and ", got " in str(caught.value)


def test_unknown_preset():
    with pytest.raises(ValueError, match="mixtral"):
        Router.like("gpt2", H, E, K)


def test_state_dict_pickle_and_deepcopy():
    router = biased_router()
    assert set(router.state_dict()) == {"weight", "bias", "expert_bias"}
    fresh = Router(H, E, K, bias=True, expert_bias=True)
    fresh.load_state_dict(router.state_dict())
    rows_equal(fresh, list(range(E)), router)
    buffer = io.BytesIO()
    torch.save(router, buffer)
    buffer.seek(0)
    rows_equal(torch.load(buffer, weights_only=False), list(range(E)), router)
    twin = copy.deepcopy(router)
    twin.weight.data.zero_()
    assert router.weight.abs().sum() > 0
