from __future__ import annotations

import math

import pytest
import torch
from tests.helpers.moe import build_moe
from torch import Tensor

from moe_ops.layers import (
    concentration_loss,
    count_tokens_per_expert,
    device_balance_loss,
    load_balancing_loss,
    mutual_information_loss,
    router_entropy_loss,
    router_z_loss,
    sequence_balance_loss,
    update_expert_bias,
)
from moe_ops.reference._scores import SCORE_FUNCS

E = 8
PLAIN_LOSSES = (router_z_loss, router_entropy_loss, mutual_information_loss, concentration_loss)


def probabilities(logits: Tensor, score_func: str = "softmax") -> Tensor:
    if score_func == "softmax":
        return logits.double().softmax(-1)
    scores = SCORE_FUNCS[score_func](logits.double())
    return scores / scores.sum(-1, keepdim=True)


def one_hot_logits(ids: Tensor, num_experts: int = E, scale: float = 60.0) -> Tensor:
    return torch.nn.functional.one_hot(ids, num_experts).float() * scale


def cyclic_ids(num_tokens: int, top_k: int, num_experts: int = E) -> Tensor:
    return (torch.arange(num_tokens * top_k) % num_experts).view(num_tokens, top_k)


@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
@pytest.mark.parametrize("score_func", SCORE_FUNCS)
def test_load_balancing_is_one_at_balance_whatever_k(top_k, score_func):
    loss = load_balancing_loss(
        torch.zeros(2 * E, E), cyclic_ids(2 * E, top_k), score_func=score_func
    )
    assert loss.item() == pytest.approx(1.0, rel=1e-6)


def test_load_balancing_is_e_at_collapse():
    ids = torch.full((5,), 3)
    assert load_balancing_loss(one_hot_logits(ids), ids[:, None]).item() == pytest.approx(E)


@pytest.mark.parametrize("score_func", SCORE_FUNCS)
@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_formula(score_func, masked):
    logits = torch.randn(19, E)
    ids = torch.stack([torch.randperm(E)[:3] for _ in range(19)])
    ids[4, 1] = -1
    ids[5, 2] = E
    mask = torch.rand(19) > 0.4 if masked else None
    keep = mask if masked else torch.ones(19, dtype=torch.bool)
    counts = [sum(int(i) == e for row in ids[keep].tolist() for i in row) for e in range(E)]
    f = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    expected = E * (f * probabilities(logits[keep], score_func).mean(0)).sum()
    loss = load_balancing_loss(logits, ids, score_func=score_func, token_mask=mask)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_load_balancing_of_given_counts():
    logits, ids = torch.randn(12, E), torch.randint(E, (12, 2))
    counts = count_tokens_per_expert(ids, E)
    by_ids = load_balancing_loss(logits, ids)
    assert torch.equal(load_balancing_loss(logits, tokens_per_expert=counts), by_ids)
    # Only the share matters, so counts of more ranks have the same scale.
    assert torch.equal(load_balancing_loss(logits, tokens_per_expert=4 * counts), by_ids)


def test_load_balancing_gradient_goes_through_probabilities_only():
    logits = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(4, (9, 2))
    assert torch.autograd.gradcheck(lambda x: load_balancing_loss(x, ids), (logits,))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_balancing_hf_compat(layers, masked, top_k):
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = tuple(torch.randn(2 * 7, E, requires_grad=True) for _ in range(layers))
    mask = torch.ones(2, 7, dtype=torch.int64) if masked else None
    if masked:
        mask[1, 4:] = 0
    theirs = modeling.load_balancing_loss_func(logits, E, top_k, mask)
    ours = load_balancing_loss(logits, top_k=top_k, token_mask=mask, hf_compat=True)
    torch.testing.assert_close(ours, theirs)
    expected = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(torch.autograd.grad(ours, logits), expected)


def test_hf_compat_pools_where_ours_does_not():
    layers = [one_hot_logits(torch.full((4,), e)) for e in range(E)]
    pooled = load_balancing_loss(layers, top_k=1, hf_compat=True)
    assert pooled.item() == pytest.approx(1.0)
    for e, layer in enumerate(layers):
        loss = load_balancing_loss(layer, torch.full((4, 1), e))
        assert loss.item() == pytest.approx(E)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_z_loss_formula(dtype):
    logits = torch.randn(3, 5, E).to(dtype)
    loss = router_z_loss(logits)
    expected = logits.double().exp().sum(-1).log().square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("score_func", SCORE_FUNCS)
def test_entropies_formula(score_func):
    logits = torch.randn(11, E)
    p = probabilities(logits, score_func)
    conditional = -(p * p.log()).sum(1).mean().item()
    marginal = -(p.mean(0) * p.mean(0).log()).sum().item()
    entropy = router_entropy_loss(logits, score_func=score_func).item()
    assert entropy == pytest.approx(conditional, rel=1e-5)
    assert concentration_loss(logits, score_func=score_func).item() == pytest.approx(marginal)
    information = mutual_information_loss(logits, score_func=score_func).item()
    assert information == pytest.approx(conditional - marginal, abs=1e-5)


def test_extremes_of_entropies():
    balanced, collapsed = one_hot_logits(torch.arange(E)), one_hot_logits(torch.zeros(E).long())
    uniform = torch.zeros(E, E)
    log_e = math.log(E)
    assert mutual_information_loss(balanced).item() == pytest.approx(-log_e, rel=1e-5)
    assert mutual_information_loss(collapsed).item() == pytest.approx(0, abs=1e-5)
    assert mutual_information_loss(uniform).item() == pytest.approx(0, abs=1e-5)
    assert concentration_loss(balanced).item() == pytest.approx(log_e, rel=1e-5)
    assert concentration_loss(collapsed).item() == pytest.approx(0, abs=1e-5)
    assert router_entropy_loss(uniform).item() == pytest.approx(log_e, rel=1e-5)
    assert router_entropy_loss(collapsed).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("loss", PLAIN_LOSSES)
def test_gradients(loss):
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True, False])
    assert torch.autograd.gradcheck(lambda x: loss(x, token_mask=mask), (logits,))


@pytest.mark.parametrize("loss", PLAIN_LOSSES)
def test_gradients_are_finite_where_probabilities_underflow(loss):
    logits = one_hot_logits(torch.arange(E), scale=1000.0).requires_grad_()
    value = loss(logits)
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", PLAIN_LOSSES)
def test_masked_tokens_are_never_used(loss):
    logits = torch.randn(3, 4, E)
    mask = torch.rand(3, 4) > 0.5
    mask[0, 0] = True
    dirty = logits.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    value = loss(dirty, token_mask=mask)
    torch.testing.assert_close(value, loss(logits[mask]))
    value.backward()
    assert dirty.grad.isfinite().all()
    assert (dirty.grad[~mask] == 0).all()


@pytest.mark.parametrize("loss", PLAIN_LOSSES)
def test_no_tokens_is_zero(loss):
    assert loss(torch.randn(0, E)).item() == 0
    assert loss(torch.randn(3, E), token_mask=torch.zeros(3, dtype=torch.bool)).item() == 0


def test_no_tokens_is_zero_for_balance():
    ids = torch.zeros(0, 2, dtype=torch.int32)
    assert load_balancing_loss(torch.randn(0, E), ids).item() == 0
    assert load_balancing_loss(torch.randn(3, E), torch.full((3, 2), -1)).item() == 0


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_sequence_balance_is_the_mean_over_sequences(flat, masked):
    b, s, k = 3, 6, 2
    logits, ids = torch.randn(b, s, E), torch.randint(E, (b, s, k))
    mask = torch.ones(b, s, dtype=torch.bool)
    if masked:
        mask[0, 3:] = False
        mask[2] = False
    expected = torch.stack(
        [
            load_balancing_loss(logits[i], ids[i], score_func="sigmoid", token_mask=mask[i])
            for i in range(b)
            if mask[i].any()
        ]
    ).mean()
    kwargs = {"token_mask": mask} if masked else {}
    if flat:
        logits, ids, kwargs["num_sequences"] = logits.flatten(0, 1), ids.flatten(0, 1), b
    torch.testing.assert_close(sequence_balance_loss(logits, ids, **kwargs), expected)


def test_sequence_balance_sees_what_the_batch_hides():
    # Each sequence collapses onto its own expert, and the batch as a whole is balanced.
    ids = torch.arange(E)[:, None].expand(E, 4)
    logits = one_hot_logits(ids)
    whole = load_balancing_loss(logits, ids[..., None])
    assert whole.item() == pytest.approx(1.0, rel=1e-5)
    each = sequence_balance_loss(logits, ids[..., None], score_func="softmax")
    assert each.item() == pytest.approx(E, rel=1e-5)


def test_sequence_balance_gradient():
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(4, (2, 3, 2))
    assert torch.autograd.gradcheck(lambda x: sequence_balance_loss(x, ids), (logits,))


def test_device_balance_formula():
    logits, ids = torch.randn(10, E), torch.randint(E, (10, 3))
    f = count_tokens_per_expert(ids, E).double() / 30 * E
    p = probabilities(logits).mean(0)
    expected = sum(f[4 * d : 4 * d + 4].mean() * p[4 * d : 4 * d + 4].sum() for d in range(2))
    assert device_balance_loss(logits, ids, 2).item() == pytest.approx(expected.item(), rel=1e-5)
    # A group an expert is the balance of experts.
    torch.testing.assert_close(
        device_balance_loss(logits, ids, E), load_balancing_loss(logits, ids)
    )
    assert device_balance_loss(logits, ids, 1).item() == pytest.approx(1.0, rel=1e-5)


def test_device_balance_ignores_what_happens_inside_a_group():
    ids = torch.tensor([[0], [4]]).repeat(3, 1)  # one expert of each half
    loss = device_balance_loss(one_hot_logits(ids[:, 0]), ids, 2)
    assert loss.item() == pytest.approx(1.0, rel=1e-5)
    assert device_balance_loss(one_hot_logits(ids[:1, 0]), ids[:1], 2).item() == pytest.approx(2)


def test_update_expert_bias_of_a_tensor():
    bias, counts = torch.zeros(4), torch.tensor([10, 2, 4, 0])  # mean 4
    update_expert_bias(bias, counts, rate=0.5)
    assert bias.tolist() == [-0.5, 0.5, 0.0, 0.5]
    assert counts.tolist() == [10, 2, 4, 0]
    update_expert_bias(bias, torch.zeros(4, dtype=torch.int64), rate=0.5)
    assert bias.tolist() == [-0.5, 0.5, 0.0, 0.5]


def test_update_expert_bias_accumulates_over_forwards():
    moe = build_moe(8, 4, E, 2, router="deepseek_v3", num_groups=2, num_topk_groups=2)
    counts = torch.zeros(E, dtype=torch.int64)
    for _ in range(3):
        counts += count_tokens_per_expert(moe(torch.randn(5, 8), return_routing=True).topk_ids, E)
    moe.eval()
    moe(torch.randn(5, 8))
    assert torch.equal(moe.router.tokens_per_expert, counts)
    update_expert_bias(moe, rate=0.01)
    expected = 0.01 * (counts.double().mean() - counts).sign()
    torch.testing.assert_close(moe.router.expert_bias.double(), expected, atol=1e-9, rtol=1e-6)
    assert (moe.router.tokens_per_expert == 0).all()


def test_loss_free_updates_balance_a_skewed_router():
    moe = build_moe(8, 4, E, 2, score_func="sigmoid", expert_bias=True)
    x = torch.randn(64, 8) + 1.0  # a common direction makes some experts everyone's favorite

    def violation() -> float:
        load = count_tokens_per_expert(moe(x, return_routing=True).topk_ids, E).float()
        return (load.max() / load.mean() - 1).item()

    before = violation()
    for _ in range(200):
        moe(x)
        update_expert_bias(moe, rate=0.01)
    assert before > 0.5
    assert violation() < before / 3


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: load_balancing_loss(torch.randn(3, E)), "exactly one"),
        (lambda: load_balancing_loss([torch.randn(3, E)], torch.zeros(3, 1)), "one layer"),
        (lambda: load_balancing_loss(torch.randn(3, E), hf_compat=True), "top_k"),
        (lambda: load_balancing_loss(torch.randn(3, E), torch.zeros(2, 1)), "topk_ids"),
        (lambda: load_balancing_loss(torch.randn(3, E), tokens_per_expert=torch.ones(3)), "[8]"),
        (lambda: router_z_loss(torch.ones(3, E, dtype=torch.int32)), "float"),
        (lambda: router_z_loss(torch.randn(3, E), token_mask=torch.ones(4)), "token_mask"),
        (lambda: router_entropy_loss(torch.randn(3, E), score_func="relu"), "score_func"),
        (lambda: sequence_balance_loss(torch.randn(6, E), torch.zeros(6, 1)), "num_sequences"),
        (
            lambda: sequence_balance_loss(torch.randn(6, E), torch.zeros(6, 1), num_sequences=4),
            "divide",
        ),
        (lambda: device_balance_loss(torch.randn(3, E), torch.zeros(3, 1), 3), "num_groups"),
        (lambda: update_expert_bias(torch.zeros(3)), "tokens_per_expert"),
        (lambda: update_expert_bias(build_moe(4, 4, 2, 1)), "expert_bias"),
    ],
)
def test_bad_input(call, word):
    with pytest.raises(ValueError) as caught:
        call()
    assert word in str(caught.value) and ", got " in str(caught.value)
