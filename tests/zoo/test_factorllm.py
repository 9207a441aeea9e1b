"""FactorLLM against its equations and its dense model, and where its gradients come from."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moe_ops import upcycle, zoo
from moe_ops.zoo.factorllm import FactorLLM, nearest_slices, route_loss, slice_balance_loss

from .lm import common
from .lm.common import published_tensors, sharpen, tokens_of
from .lm.llama import attention, rms_norm, swiglu

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "head_size": 8}


def build_dense():
    torch.manual_seed(0)
    return sharpen(zoo.create_model("llama", **SMALL)).double()


def build(**changes) -> FactorLLM:
    torch.manual_seed(0)
    return sharpen(zoo.create_model("factorllm", **SMALL, **changes)).double()


def by_hand(w: dict[str, Tensor], model: FactorLLM, tokens: Tensor) -> Tensor:
    config = model.config
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(config.num_layers):
        p = f"model.layers.{i}"
        u = rms_norm(x, w[f"{p}.input_layernorm.weight"])
        x = x + attention(w, f"{p}.self_attn", u, config.num_heads)
        u = rms_norm(x, w[f"{p}.post_attention_layernorm.weight"])
        logits = u @ w[f"{p}.mlp.route1.weight"].T + w[f"{p}.mlp.route1.bias"]
        rows = []
        for t in range(len(tokens)):
            chosen = logits[t].argsort(descending=True)[: config.top_k].tolist()
            parts = []
            for j in chosen:
                names = {f"s.{n}_proj.weight": w[f"{p}.mlp.{n}_proj_list.{j}.weight"]
                         for n in ("gate", "up", "down")}  # fmt: skip
                parts.append(swiglu(names, "s", u[t]))
            rows.append(sum(parts) * config.num_slices / config.top_k)
        x = x + torch.stack(rows)
    return rms_norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_equals_its_equations(top_k):
    check_equations(build(top_k=top_k))


def check_equations(model: FactorLLM) -> None:
    tokens = tokens_of(model, 1, 13)
    w = {key: t.detach() for key, t in published_tensors(model).items()}
    expected = by_hand(w, model, tokens[0])
    torch.testing.assert_close(model(tokens)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clustered", [False, True])
def test_all_slices_are_the_dense_model(clustered):
    dense = build_dense()
    orders = None
    if clustered:
        banks = [upcycle.experts_from_dense(block.mlp) for block in dense.layers]
        orders = [upcycle.k_means_order(bank, 4) for bank in banks]
    tokens = tokens_of(dense, 2, 10)
    model = FactorLLM.from_dense(dense, num_slices=4, top_k=4, orders=orders)
    torch.testing.assert_close(model(tokens), dense(tokens), rtol=1e-9, atol=1e-9)
    half = FactorLLM.from_dense(dense, num_slices=4, top_k=2, orders=orders)
    assert not torch.allclose(half(tokens), dense(tokens), rtol=1e-2, atol=1e-2)
    part = half.layers[1].mlp.experts.w_down[2]
    order = slice(12, 18) if orders is None else orders[1][0, 12:18]
    assert torch.equal(part, dense.layers[1].mlp.w_down[:, order])


def test_a_slice_that_is_not_used_is_not_computed():
    model = build(top_k=1)
    layer, x = model.layers[0].mlp, torch.randn(1, 32, dtype=torch.float64)
    used = int(layer.router(x).topk_ids)
    with torch.no_grad():
        layer.experts.w_down[[j for j in range(4) if j != used]] = torch.nan
    assert bool(layer(x).isfinite().all())


def test_labels_are_the_slices_nearest_to_the_network():
    torch.manual_seed(0)
    outputs, target = torch.randn(6, 4, 5), torch.randn(6, 5)
    for k in (1, 2, 3):
        label = nearest_slices(outputs, target, k)
        for t in range(6):
            error = [float((4 / k * outputs[t, j] - target[t]).square().mean()) for j in range(4)]
            best = sorted(range(4), key=error.__getitem__)[:k]
            assert label[t].nonzero().flatten().tolist() == sorted(best)
    assert nearest_slices(torch.zeros(1, 4, 5), target[:1], 2).tolist() == [[1, 1, 0, 0]]


def test_losses_by_hand():
    torch.manual_seed(0)
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    label = torch.zeros(5, 4, dtype=torch.float64)
    label[:, 1] = 1.0
    p, q = logits.softmax(-1), label.softmax(-1)
    torch.testing.assert_close(route_loss(logits, label), (p * (p / q).log()).sum(-1).mean())
    assert route_loss(label, label).item() == pytest.approx(0.0, abs=1e-12)
    ids = torch.tensor([[0], [0], [1], [3], [0]])
    shares = torch.tensor([0.6, 0.2, 0.0, 0.2], dtype=torch.float64)
    torch.testing.assert_close(slice_balance_loss(logits, ids), (shares * p.mean(0)).mean())


def teaches(model: FactorLLM, loss: Tensor) -> bool:
    """Returns True if a loss has gradients of all routers, False if of none."""
    loss.backward()
    grads = [block.mlp.router.weight.grad for block in model.layers]
    model.zero_grad(set_to_none=True)
    (found,) = {g is not None and bool((g != 0).any()) for g in grads}
    return found


@pytest.mark.parametrize("coefficients", [(0.05, 0.01), (0.0, 0.0)])
def test_where_the_router_gets_its_gradient(coefficients):
    dense, (route, balance) = build_dense(), coefficients
    model = FactorLLM.from_dense(
        dense, top_k=2, route_coefficient=route, balance_coefficient=balance
    )
    tokens = tokens_of(dense, 2, 12)
    assert not teaches(model, model.loss(tokens).loss)
    out = model.distill(tokens, dense)
    assert teaches(model, out.loss) == bool(route)
    assert all(p.grad is None for p in dense.parameters())
    expected = route * out.aux_losses["route"] + balance * out.aux_losses["balance"]
    torch.testing.assert_close(out.loss - out.cross_entropy, expected)


def test_routers_learn_what_the_dense_network_says():
    dense = build_dense()
    model = FactorLLM.from_dense(dense, route_coefficient=1.0)
    routers = [p for block in model.layers for p in block.mlp.router.parameters()]
    optimizer, tokens = torch.optim.Adam(routers, lr=0.05), tokens_of(dense, 4, 17)
    first = model.distill(tokens, dense).aux_losses["route"].item()
    for _ in range(30):
        optimizer.zero_grad()
        out = model.distill(tokens, dense)
        out.loss.backward()
        optimizer.step()
    assert out.aux_losses["route"].item() < 0.7 * first


def test_is_a_language_model(tmp_path):
    model = build(top_k=2)
    common.check_cache(model)
    common.check_generate(model)
    key = "model.layers.0.mlp.gate_proj_list.3.weight"
    common.check_round_trip(model.float(), tmp_path, a_key=key)
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    assert tensors["model.layers.1.mlp.route1.bias"].shape == (4,)
    # The teachers that published training keeps beside the slices.
    common.change_file(
        tmp_path / "one", lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(1)})
    )
    report = FactorLLM.from_pretrained(tmp_path / "one").load_report
    assert report.unexpected == [] and len(report.ignored) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_slices": 5}, "num_slices must divide intermediate_size = 24, got 5"),
        ({"top_k": 5}, r"top_k must be in \[1, num_experts = 4\], got 5"),
    ],
)
def test_says_what_is_wrong(changes, words):
    with pytest.raises(ValueError, match=words):
        build(**changes)
