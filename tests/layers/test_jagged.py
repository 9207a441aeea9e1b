"""Jagged tensors [B, j*, H] through layers: what a loop over the sequences gives."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.moe import build_moe, build_router
from torch import Tensor, nn

from moe_ops import layers, quant

H, E, K = 8, 4, 2
LENGTHS = (3, 0, 5, 1)
WHERE = {"dtype": torch.float64}


class Block(nn.Module):
    def forward(self, x: Tensor, *, positions: Tensor) -> Tensor:
        return x


def router(**options) -> layers.Router:
    return build_router(H, E, K, logits_dtype=None, **WHERE, **options)


LAYERS = {
    "MoE": lambda: build_moe(
        H, 6, E, K, router="qwen2_moe", num_shared_experts=1, shared_expert_gate=True, **WHERE
    ),
    "MoE of a latent width": lambda: build_moe(
        H, 6, E, K, latent_size=4, latent_norm=True, **WHERE
    ),
    "SharedExperts": lambda: layers.SharedExperts(H, 6, **WHERE),
    "PEER": lambda: layers.PEER(H, 9, 2, num_heads=2, query_norm=False, **WHERE),
    "SoftMoE": lambda: layers.SoftMoE(layers.Experts(E, H, 6, **WHERE), 2, **WHERE),
    "AttentionExperts": lambda: layers.AttentionExperts(router(), 2, 4, rope_theta=1e4, **WHERE),
}
DENSE = {
    "Router": router,
    "Experts": lambda: layers.Experts(E, H, 6, **WHERE),
    "ExpertLoRA": lambda: layers.ExpertLoRA(layers.Experts(E, H, 6), 2),
    "QuantizedExperts": lambda: quant.QuantizedExperts(E, 64, 64),
    "ZeroComputationExperts": lambda: layers.ZeroComputationExperts(layers.Experts(E, H, 6)),
    "MixtureOfDepths": lambda: layers.MixtureOfDepths(Block(), H, predictor_size=0, **WHERE),
}


def sequences() -> list[Tensor]:
    return [torch.randn(n, H, **WHERE) for n in LENGTHS]


def jagged(rows: list[Tensor], **options) -> Tensor:
    return torch.nested.nested_tensor(rows, layout=torch.jagged, **options)


def run_one(layer: nn.Module, row: Tensor) -> Tensor:
    """One sequence, as the layer takes one."""
    return layer(row[None])[0]


@pytest.mark.parametrize("name", LAYERS)
def test_is_the_loop_over_sequences(name):
    layer, rows = LAYERS[name](), sequences()
    x = jagged(rows, requires_grad=True)
    y = layer(x)
    assert y.offsets() is x.offsets() and y.values().shape == (sum(LENGTHS), H)
    upstream = torch.randn(sum(LENGTHS), H, **WHERE)
    (x + y).values().mul(upstream).sum().backward()  # The residual stream goes on.
    got = [x.grad.values(), *(p.grad for p in layer.parameters())]

    leaf = torch.cat(rows).requires_grad_()
    made = [run_one(layer, row) for row in leaf.split(LENGTHS)]
    torch.testing.assert_close(y.values(), torch.cat(made))
    wanted = torch.autograd.grad(
        (leaf + torch.cat(made)).mul(upstream).sum(), [leaf, *layer.parameters()]
    )
    torch.testing.assert_close(got, list(wanted))


def test_arguments_of_the_tokens_may_be_jagged():
    layer = LAYERS["MoE"]()
    x = jagged(sequences())
    ids = torch.randint(0, E, (sum(LENGTHS), K))
    mask = torch.rand(sum(LENGTHS)) < 0.5
    out = layer(
        x,
        topk_ids=torch.nested.nested_tensor_from_jagged(ids, x.offsets()),
        token_mask=torch.nested.nested_tensor_from_jagged(mask, x.offsets()),
        return_routing=True,
    )
    flat = layer(x.values(), topk_ids=ids, token_mask=mask, return_routing=True)
    assert isinstance(out, layers.MoEOutput) and out.y.is_nested
    torch.testing.assert_close((out.y.values(), *out[1:4]), flat[:4])
    with pytest.raises(ValueError, match="MoE: topk_ids must have the offsets of x where it is j"):
        layer(x, topk_ids=jagged([row[:, :K].long() for row in reversed(sequences())]))
    table = layers.HashRouter(H, E, K, vocab_size=7)
    tokens = torch.nested.nested_tensor_from_jagged(ids, x.offsets())[..., 0]
    assert torch.equal(table.lookup(tokens).values(), table.lookup(ids[:, 0]))


def test_what_else_layers_return():
    x = jagged(sequences())
    layer = LAYERS["SoftMoE"]()
    out = layer(x, return_routing=True)
    for i, row in enumerate(x.unbind()):
        one = layer(row, return_routing=True)
        for got, wanted in zip(out, one, strict=True):
            torch.testing.assert_close(got.unbind()[i], wanted)
    layer = layers.AttentionExperts(router(), 2, 4, kind="stick_breaking", **WHERE)
    out = layer(x, return_routing=True)
    last = layer(x.unbind()[2][None], return_routing=True)
    torch.testing.assert_close(out.remainder.unbind()[2], last.remainder[0])
    norm = layers.AddRMSNorm(H, **WHERE)
    y, total = norm(x, x)
    torch.testing.assert_close((y.values(), total.values()), norm(x.values(), x.values()))
    linear = quant.QuantizedLinear(nn.Linear(64, 16))
    x = torch.nested.nested_tensor_from_jagged(torch.randn(9, 64), x.offsets())
    assert torch.equal(linear(x).values(), linear(x.values()))


def test_compiles():
    layer, x = LAYERS["MoE"](), jagged(sequences(), requires_grad=True)
    torch.compiler.reset()
    step = torch.compile(lambda x: x + layer(x), fullgraph=True, backend="aot_eager")
    y = step(x)
    torch.testing.assert_close(y.values(), (x + layer(x)).values())
    y.values().sum().backward()
    wanted = torch.autograd.grad((x + layer(x)).values().sum(), x)[0]
    torch.testing.assert_close(x.grad.values(), wanted.values())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", LAYERS)
def test_other_nested_tensors_are_refused(name):
    layer, rows = LAYERS[name](), sequences()
    kind = type(layer).__name__
    with pytest.raises(ValueError, match=rf"{kind}: x must be a jagged .* strided layout"):
        layer(torch.nested.nested_tensor(rows))
    padded = torch.randn(2, 6, H, **WHERE)
    holes = torch.nested.narrow(padded, 1, torch.tensor([0, 1]), torch.tensor([2, 3]), torch.jagged)
    with pytest.raises(ValueError, match=rf"{kind}: x must .* without holes"):
        layer(holes)
    torch.testing.assert_close(
        layer(holes.contiguous()).unbind()[1], run_one(layer, padded[1, 1:4])
    )


@pytest.mark.parametrize("name", DENSE)
def test_layers_that_take_no_nested_tensors(name):
    with pytest.raises(ValueError, match=rf"\w*{name}: x must be a dense tensor, got a nested one"):
        DENSE[name]()(jagged(sequences()), None, None)


def test_refusals_of_arguments():
    x = jagged(sequences())
    layer = LAYERS["AttentionExperts"]()
    with pytest.raises(ValueError, match="cache and cu_seqlens must be None with a jagged x"):
        layer(x, cache=layers.KVCache())
    with pytest.raises(ValueError, match="SoftMoE: token_mask must be None with a jagged x"):
        LAYERS["SoftMoE"]()(x, token_mask=x.values() > 0)
    with pytest.raises(ValueError, match=r"MoE: x must be a jagged .* got shape \[4, j\*\]"):
        LAYERS["MoE"]()(x[..., 0])
