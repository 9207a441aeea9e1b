"""The router's linear map of a few experts on the CPU: `router_linear`, in training one node of
autograd with the choice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.moe import build_router
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.cpu_only

T, H, E, K = 520, 64, 4, 2
OPTIONS = {
    "softmax": {},
    "topk_first-bias": {"topk_first": True, "bias": True},
    "renormalize-scale": {"renormalize": True, "routed_scaling_factor": 1.5},
    "sigmoid-expert_bias": {"score_func": "sigmoid", "expert_bias": True},
    "groups": {"num_groups": 2, "num_topk_groups": 1},
}


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def ops_of(fn):
    with Recorded() as recorded:
        fn()
    return recorded.names


def make(dtype=torch.float32, **options):
    router = build_router(H, E, K, dtype=dtype, **options)
    if router.expert_bias is not None:
        router.expert_bias.uniform_(-0.2, 0.2)
    return router


def by_hand(router, x):
    bias = router.bias
    logits = F.linear(x, router.weight, bias)
    return logits, *router.route(logits)


@pytest.mark.parametrize("used", [("logits", "weights"), ("logits",), ("weights",)], ids="+".join)
@pytest.mark.parametrize("options", OPTIONS)
def test_one_node_is_both_steps(options, used):
    router = make(torch.float64, **OPTIONS[options])
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    leaves = [x, *router.parameters()]
    results = []
    for fn in (lambda: router(x), lambda: by_hand(router, x)):
        logits, weights, ids = fn()
        total = 0.0
        if "logits" in used:
            total = total + (logits**3).sum()
        if "weights" in used:
            total = total + (weights * torch.arange(1.0, K + 1)).square().sum()
        results.append((logits, weights, ids, *torch.autograd.grad(total, leaves)))
    assert type(router(x)[0].grad_fn).__name__ == "_LinearTopkBackward"
    assert not router(x).topk_ids.requires_grad
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_training_counts_loads():
    router = make(expert_bias=True).train()
    ids = router(torch.randn(T, H, requires_grad=True)).topk_ids
    assert torch.equal(router.tokens_per_expert, ids.flatten().bincount(minlength=E))


def test_frozen_weight_and_input():
    router = make(bias=True)
    x = torch.randn(T, H)
    router(x).topk_weights.sum().backward()
    assert x.grad is None and router.weight.grad is not None
    router.requires_grad_(False)
    x.requires_grad_()
    router(x).router_logits.sum().backward()
    torch.testing.assert_close(x.grad, router.weight.sum(0).expand(T, H))


def test_second_derivative_through_the_logits():
    router = make(torch.float64)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    seconds = []
    for fn in (lambda: router(x)[0], lambda: by_hand(router, x)[0]):
        (grad,) = torch.autograd.grad((fn() ** 3).sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(grad.square().sum(), [x, router.weight]))
    for got, want in zip(*seconds, strict=True):
        torch.testing.assert_close(got, want)


def test_second_derivative_through_the_weights_says_so():
    router = make()
    x = torch.randn(T, H, requires_grad=True)
    (grad,) = torch.autograd.grad(router(x).topk_weights.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="topk_router"):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_same_bits_with_and_without_gradients(grad):
    router = make()
    x = torch.randn(T, H)
    with torch.set_grad_enabled(grad):
        outs = router(x), by_hand_through_logits(router, x)
    for got, want in zip(*outs, strict=True):
        assert torch.equal(got, want)
    with torch.no_grad():
        assert torch.equal(router(x)[0], outs[0][0])


def by_hand_through_logits(router, x):
    logits = router.logits(x)
    return logits, *router.route(logits)


@pytest.mark.parametrize(
    ("dtype", "logits_dtype", "x_dtype"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_dtypes(dtype, logits_dtype, x_dtype):
    """The router agrees with F.linear in logits_dtype, whatever x and weight are."""
    router = make(dtype, logits_dtype=logits_dtype, bias=True)
    x = torch.randn(T, H).to(x_dtype).requires_grad_()
    target = logits_dtype or dtype
    want = F.linear(x.to(target), router.weight.to(target), router.bias.to(target))
    assert "router_linear" in ops_of(lambda: router(x))
    got = router(x).router_logits
    assert got.dtype == target
    tolerance = 1e-5 if target != torch.bfloat16 else 2e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    got.float().sum().backward()
    assert x.grad.dtype == x_dtype and router.weight.grad.dtype == dtype


@pytest.mark.parametrize(
    ("changes", "tokens", "used"),
    [
        ({}, T, True),
        ({}, T - 10, False),
        ({"num_experts": 9}, T, False),
        ({"num_experts": 8}, T, False),
        ({"num_experts": 8, "hidden_size": 256}, T, False),
        ({"num_experts": 8, "hidden_size": 256, "dtype": torch.bfloat16}, T, True),
        ({"num_experts": 8, "dtype": torch.bfloat16}, T, False),
        ({"logits_dtype": torch.float64}, T, False),
    ],
    ids=str,
)
def test_where_it_is_used(changes, tokens, used):
    router = build_router(**{"hidden_size": H, "num_experts": E, "top_k": K, **changes})
    x = torch.randn(tokens, router.hidden_size)
    assert ("router_linear" in ops_of(lambda: router(x))) is used


def test_autocast_and_other_ranks_keep_f_linear():
    router = make()
    x = torch.randn(T, H)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert "router_linear" not in ops_of(lambda: router(x))
        assert router(x).router_logits.dtype == torch.bfloat16
    assert "router_linear" not in ops_of(lambda: router.logits(x[None]))
    assert router.logits(x[None]).shape == (1, T, E)
