"""Hash routing: experts by token id."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.helpers.moe import build_moe, build_router

from moe_ops.layers import HashRouter, MoE
from moe_ops.reference._scores import SCORE_FUNCS

T, H, I, E, K, V = 12, 6, 5, 8, 2, 30


def layer(score_func: str, **options) -> MoE:
    moe = build_moe(H, I, E, K, dtype=torch.float64)
    moe.router = HashRouter(
        H, E, K, vocab_size=V, score_func=score_func, dtype=torch.float64, **options
    )
    return moe


def score(logits: torch.Tensor, score_func: str, ids: torch.Tensor) -> torch.Tensor:
    if score_func == "uniform":
        return torch.full_like(ids, 1 / K, dtype=logits.dtype)
    return SCORE_FUNCS[score_func](logits).gather(1, ids.long())


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("score_func", [*SCORE_FUNCS, "uniform"])
def test_layer_is_a_loop_over_tokens(score_func, renormalize):
    moe = layer(score_func, renormalize=renormalize, routed_scaling_factor=1.5)
    tokens = torch.randint(V, (3, 4))
    x = torch.randn(3, 4, H, dtype=torch.float64, requires_grad=True)
    ids = moe.router.lookup(tokens)
    assert ids.shape == (3, 4, K) and ids.dtype == torch.int32
    y = moe(x, topk_ids=ids)

    flat, flat_ids = x.reshape(-1, H), ids.view(-1, K)
    weights = score(flat @ moe.router.weight.T, score_func, flat_ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights * 1.5
    outputs = moe.experts.outputs(flat)
    chosen = torch.stack([outputs[t, flat_ids[t].long()] for t in range(T)])
    expected = (weights[..., None] * chosen).sum(1).view_as(x)
    torch.testing.assert_close(y, expected)

    upstream = torch.randn_like(y)
    leaves = [x, moe.experts.w_down]
    leaves += [moe.router.weight] if score_func != "uniform" else []
    got = torch.autograd.grad((y * upstream).sum(), leaves, retain_graph=True)
    wanted = torch.autograd.grad((expected * upstream).sum(), leaves)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("score_func", ["softmax", "sqrtsoftplus"])
def test_gradients_of_the_weights(score_func):
    router = layer(score_func, renormalize=True).router
    ids = router.lookup(torch.randint(V, (T,)))
    ids[2, 1] = -1
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: router.weights_at(z, ids), logits)
    assert router.weights_at(logits, ids)[2, 1] == 0


def test_uniform_weights_leave_the_linear_map_alone():
    moe = layer("uniform")
    moe(torch.randn(T, H).double(), topk_ids=moe.router.lookup(torch.arange(T))).sum().backward()
    assert moe.router.weight.grad is None and not moe.router.weight.requires_grad


def test_the_table_is_saved():
    router = build_router(H, E, K, kind="hash", vocab_size=V)
    assert type(router) is HashRouter
    other = HashRouter(H, E, K, vocab_size=V)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.table, router.table)
    assert torch.equal(copy.deepcopy(router).table, router.table)
    assert router.bfloat16().table.dtype == torch.int32


def test_tables():
    table = HashRouter.make_table(V, E, 3, generator=torch.Generator().manual_seed(1))
    assert table.shape == (V, 3) and table.dtype == torch.int32
    assert all(len(set(row)) == 3 and set(row) <= set(range(E)) for row in table.tolist())
    again = HashRouter.make_table(V, E, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(table, again)

    counts = torch.tensor([1, 7, 1, 4, 2, 1])
    # 7 to expert 0, 4 to 1, 2 to 2, then 1, 1 and 1 to expert 2, which has the least.
    assert HashRouter.make_table(6, 3, counts=counts)[:, 0].tolist() == [2, 0, 2, 1, 2, 1]
    zipf = (1000 / torch.arange(1, 501)).long()
    table = HashRouter.make_table(500, 16, 2, counts=zipf)
    load = torch.zeros(16).index_add_(0, table.flatten().long(), zipf.repeat_interleave(2).float())
    assert load.max() <= max(load.mean() * 1.05, zipf.max())
    assert HashRouter.make_table(0, E, 2).shape == (0, 2)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: HashRouter(H, E, K), "vocab_size"),
        (lambda: HashRouter(H, E, K, table=torch.zeros(V, K).int(), vocab_size=V), "vocab_size"),
        (lambda: HashRouter(H, E, K, table=torch.zeros(V, K + 1).int()), "table"),
        (lambda: HashRouter(H, E, K, table=torch.full((V, K), E)), "table"),
        (lambda: HashRouter(H, E, K, vocab_size=V, score_func="relu"), "score_func"),
        (lambda: HashRouter(H, E, K, vocab_size=V)(torch.randn(2, H)), "topk_ids"),
        (lambda: HashRouter.make_table(V, E, E + 1), "top_k"),
        (lambda: HashRouter.make_table(V, E, counts=torch.ones(3)), "counts"),
    ],
)
def test_errors(call, word):
    with pytest.raises(ValueError) as caught:
        call()
    assert word in str(caught.value) and ", got " in str(caught.value)


def test_operations_on_experts_are_refused():
    router = HashRouter(H, E, K, vocab_size=V)
    for call in (lambda: router.select([0, 1]), lambda: router.append(1)):
        with pytest.raises(NotImplementedError, match="table"):
            call()
