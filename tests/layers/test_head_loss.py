"""The cross-entropy of the head in chunks against torch's on all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moe_ops.layers import head_loss
from moe_ops.layers.head_loss import head_cross_entropy


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """11 tokens are 4 chunks, of unequal lengths."""
    monkeypatch.setattr(head_loss, "MIN_CHUNK", 3)
    monkeypatch.setattr(head_loss, "CHUNK_LOGITS", {"cpu": 1, "cuda": 1})


def case(dtype: torch.dtype, tokens: int = 11) -> tuple[torch.Tensor, ...]:
    x, weight = torch.randn(tokens, 5, dtype=dtype), torch.randn(7, 5, dtype=dtype)
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(7, (tokens,))


def expected(x, weight, targets, mask=None):
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    losses = F.cross_entropy(x @ weight.t(), targets, reduction="none")
    counted = targets != -100 if mask is None else mask
    loss = losses[counted].sum() / (counted.sum() if mask is None else counted.sum().clamp(min=1))
    return loss, *torch.autograd.grad(loss, (x, weight))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["all", "mask", "ignored", "none"])
def test_equals_cross_entropy(dtype, which):
    x, weight, targets = case(dtype)
    mask = None
    if which == "ignored":
        targets[::3] = -100
    elif which != "all":
        mask = (torch.arange(11) % 3 > 0) & (which == "mask")
    loss = head_cross_entropy(x, weight, targets, mask)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    ours = (loss, *torch.autograd.grad(3 * loss, (x, weight)))
    scale = (1, 3, 3)
    # bfloat16: logits, their gradient and the result are rounded, 2^-9 of values up to about 3.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b, s in zip(ours, expected(x, weight, targets, mask), scale, strict=True):
        torch.testing.assert_close(a.double(), s * b, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        plain = head_cross_entropy(x, weight, targets, mask)
    torch.testing.assert_close(plain, loss.detach())


def test_one_gradient_and_none():
    x, weight, targets = case(torch.float64)
    grads = expected(x, weight, targets)[1:]
    for i, (a, b) in enumerate([(x, weight.detach()), (x.detach(), weight)]):
        (grad,) = torch.autograd.grad(head_cross_entropy(a, b, targets), (a, b)[i])
        torch.testing.assert_close(grad, grads[i])
    assert not head_cross_entropy(x.detach(), weight.detach(), targets).requires_grad


def test_no_tokens():
    x, weight, targets = case(torch.float32, tokens=0)
    assert head_cross_entropy(x, weight, targets).isnan()
    loss = head_cross_entropy(x, weight, targets, torch.zeros(0, dtype=torch.bool))
    grads = torch.autograd.grad(loss, (x, weight))
    assert loss == 0 and grads[0].shape == (0, 5) and not grads[1].any()


def test_target_out_of_range():
    x, weight, targets = case(torch.float32)
    targets[4] = 7
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        head_cross_entropy(x, weight, targets)


def test_gradcheck():
    x, weight, targets = case(torch.float64)
    targets[2] = -100
    assert torch.autograd.gradcheck(lambda x, w: head_cross_entropy(x, w, targets), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x, w: head_cross_entropy(x, w, targets), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x: head_cross_entropy(x, weight, targets), x)
    # Twice through one graph: what is saved is not overwritten.
    loss = head_cross_entropy(x, weight, targets)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, weight)), first)


def test_autocast_and_compile():
    x, weight, targets = case(torch.float32)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        loss = head_cross_entropy(x, weight, targets)
        by_torch = F.cross_entropy(F.linear(x, weight).float(), targets)
    torch.testing.assert_close(loss, by_torch)
    compiled = torch.compile(head_cross_entropy, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(x, weight, targets), head_cross_entropy(x, weight, targets)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(
        torch.autograd.grad(got, (x, weight)), torch.autograd.grad(wanted, (x, weight)), strict=True
    ):
        torch.testing.assert_close(a, b)
