"""WideNet against its equations, and the parameters that are published."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bench.studies.widenet.depths import across_depths
from safetensors.torch import load_file
from torch import Tensor

from moe_ops import zoo
from moe_ops.layers import ExpertLoadStats
from moe_ops.layers.losses import load_balancing_loss
from moe_ops.zoo.lm.model import CausalLM
from moe_ops.zoo.widenet import NoisyRouter, WideNetLM, WideNetViT

from ..lm import common
from ..lm.common import sharpen, tokens_of

SMALL = {
    "vocab_size": 32, "hidden_size": 16, "num_layers": 3, "num_heads": 2, "intermediate_size": 12,
    "image_size": 8, "num_classes": 5, "channels": 2,
}  # fmt: skip


def build(seed: int = 0, **changes):
    torch.manual_seed(seed)
    return sharpen(zoo.create_model("widenet", **{**SMALL, **changes})).double()


def norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    scale = (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return centered / scale * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def experts_of(w: dict[str, Tensor], name: str, config, x: Tensor) -> Tensor:
    """Rows of x one by one."""
    bank = [w[f"{name}.experts.{k}"] for k in ("w_gate_up", "b_gate_up", "w_down", "b_down")]

    def network(e, row):
        up, b_up, down, b_down = (t[e] for t in bank)
        return down @ gelu(up @ row + b_up) + b_down

    if f"{name}.router.weight" not in w:
        return torch.stack([network(0, row) for row in x])
    out = []
    for row in x:
        share = (w[f"{name}.router.weight"] @ row).softmax(-1)
        best = share.argsort(descending=True)[: config.top_k].tolist()
        out.append(sum(share[e] * network(e, row) for e in best))
    return torch.stack(out)


def attention(w, name, x, heads, out, causal, turn=lambda t: t):
    parts = []
    q, k, v = (
        F.linear(x, w[f"{name}.{n}_proj.weight"], w.get(f"{name}.{n}_proj.bias")).chunk(heads, -1)
        for n in "qkv"
    )
    for a, b, c in zip(q, k, v, strict=True):
        scores = turn(a) @ turn(b).T / math.sqrt(a.shape[-1])
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf)
        parts.append(scores.softmax(-1) @ c)
    return F.linear(torch.cat(parts, -1), w[f"{name}.{out}.weight"], w.get(f"{name}.{out}.bias"))


def turned(x: Tensor) -> Tensor:
    """Rotary positions of [S, d]: halves rotated."""
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(len(x), dtype=x.dtype)[:, None] * rates
    a, b = x[:, :half], x[:, half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def through(w, config, x: Tensor, out: str, causal: bool) -> Tensor:
    """One sequence through all depths; a block or norms that there is one of serve all."""
    blocks, norms = (
        len({key.split(".")[1] for key in w if key.startswith(f"{name}.")})
        for name in ("blocks", "layers")
    )
    for i in range(config.num_layers):
        block, own = f"blocks.{i % blocks}", f"layers.{i % norms}"
        turn = turned if causal else (lambda t: t)
        y = norm(w, f"{own}.attention_norm", x)
        x = x + attention(w, f"{block}.attention", y, config.num_heads, out, causal, turn)
        x = x + experts_of(w, f"{block}.ffn", config, norm(w, f"{own}.ffn_norm", x))
    return norm(w, "norm", x)


def test_language_equals_its_equations():
    check_language(build().eval())


def check_language(model: WideNetLM) -> None:
    w = model.state_dict()
    tokens = tokens_of(model, 1, 7)
    x = through(w, model.config, w["embed_tokens.weight"][tokens[0]], "o_proj", True)
    expected = x @ w["lm_head.weight"].T
    torch.testing.assert_close(model(tokens)[0], expected, rtol=1e-5, atol=1e-5)


VISIONS = ({}, {"pooling": "token", "representation": True})


@pytest.mark.parametrize("changes", VISIONS, ids=str)
def test_vision_equals_its_equations(changes):
    check_vision(build(trunk="vision", **changes).eval())


def check_vision(model: WideNetViT) -> None:
    w, config = model.state_dict(), model.config
    images = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    logits = model(images)
    for image, ours in zip(images, logits, strict=True):
        places = [torch.zeros(16, dtype=torch.float64)]
        for top in (0, 4):
            for left in (0, 4):
                patch = image[:, top : top + 4, left : left + 4]
                places.append((w["patches.weight"] * patch).sum((1, 2, 3)) + w["patches.bias"])
        x = through(w, config, torch.stack(places) + w["positions"], "out_proj", False)
        x = x[0] if config.pooling == "token" else x.mean(0)
        if config.representation:
            x = torch.tanh(w["representation.weight"] @ x + w["representation.bias"])
        expected = w["head.weight"] @ x + w["head.bias"]
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("preset", "millions"), [("b", 29), ("l", 40), ("h", 63)])
def test_published_parameters(preset, millions):
    """The paper gives whole millions, cut off: 29.69, 40.94 and 63.34."""
    with torch.device("meta"):
        model = zoo.create_model("widenet", preset=preset)
    assert model.num_parameters()["total"] // 10**6 == millions


def test_depths_are_told_apart():
    """A loss for each use of the router, under a name of its own."""
    model = build().eval()
    tokens = tokens_of(model, 2, 9)
    out = model.loss(tokens)
    names = [r.layer for r in out.routing]
    assert names == [f"blocks.0.ffn.depth.{i}" for i in range(3)]
    parts = [load_balancing_loss(r.routing.router_logits, r.routing.topk_ids) for r in out.routing]
    torch.testing.assert_close(out.aux_losses["load_balancing"], sum(parts))
    stats = ExpertLoadStats()
    for r in out.routing:
        stats.update(r.routing.topk_ids, 4, layer=r.layer)
    assert list(stats.layers) == names
    found = across_depths(out.routing)
    assert 0 <= found["kept"] <= 1 and 0 < found["divergence"] < math.log(3)
    same = across_depths([out.routing[0]] * 3)
    assert same["kept"] == 1 and same["divergence"] == pytest.approx(0, abs=1e-12)


def test_vision_loss():
    model = build(trunk="vision").eval()
    images, labels = torch.randn(3, 2, 8, 8, dtype=torch.float64), torch.tensor([0, 4, 2])
    out = model.loss(images, labels, label_smoothing=0.1)
    smoothed = F.cross_entropy(out.logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(out.loss, smoothed + 0.01 * out.aux_losses["load_balancing"])
    torch.testing.assert_close(out.cross_entropy, F.cross_entropy(model(images), labels).detach())
    out.loss.backward()
    assert all(bool((p.grad != 0).any()) for p in model.parameters())


@torch.no_grad()
def test_noise_and_capacity_are_of_training_alone():
    torch.manual_seed(0)
    router = NoisyRouter(8, 4, 2, noise=0.25, capacity_factor=None)
    x = torch.randn(4000, 8)
    noise = router.logits(x) - router.eval().logits(x)
    assert noise.std() == pytest.approx(0.25, rel=0.03) and abs(float(noise.mean())) < 0.01
    assert torch.equal(router(x).topk_ids, router(x).topk_ids)
    full = NoisyRouter(8, 4, 2, noise=0.0, capacity_factor=0.5).train()
    assert (full(x).topk_ids < 0).any() and (full.eval()(x).topk_ids >= 0).all()
    made = zoo.create_model("widenet", capacity_factor=1.2).blocks[0].ffn.router
    assert made.noise == 0.25 and made.capacity_factor == 1.2
    with pytest.raises(ValueError, match="noise must be at least 0"):
        NoisyRouter(8, 4, 2, noise=-1.0)


def test_is_a_language_model(tmp_path):
    check_language_model(build(), tmp_path)


def check_language_model(model: WideNetLM, tmp_path: Path) -> None:
    assert isinstance(model, CausalLM) and len(model.new_cache()) == 3
    common.check_cache(model)
    common.check_gradients_flow(model)
    common.check_round_trip(model.float(), tmp_path, a_key="layers.0.attention_norm.bias")


def test_generates_and_compiles():
    model = build(num_layers=2)
    common.check_generate(model)
    tokens = tokens_of(model)
    compiled = torch.compile(model.eval(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))


def test_vision_checkpoints(tmp_path):
    model = build(trunk="vision").float().eval()
    model.save_pretrained(tmp_path)
    assert "positions" in load_file(tmp_path / "model.safetensors")
    again = WideNetViT.from_pretrained(tmp_path)
    assert again.config == model.config and not again.training
    images = torch.randn(2, 2, 8, 8)
    assert torch.equal(again(images), model(images))
    with pytest.raises(ValueError, match="trunk must be one of language, got 'vision'"):
        WideNetLM.from_pretrained(tmp_path)


def test_counts_parameters():
    """Three uses of a block with two experts each can use all four."""
    shared = build().num_parameters()
    assert shared["active"] == shared["total"]
    bank = 4 * (2 * 16 * 12 + 12 + 16)
    once = build(num_layers=1).num_parameters()
    assert once["total"] - once["active"] == bank // 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build(trunk="audio"), "trunk must be one of language, vision, got 'audio'"),
        (lambda: build(pooling="max"), "pooling must be one of mean, token"),
        (lambda: build(patch_size=3), "patch_size must divide image_size = 8, got 3"),
        (lambda: build(num_heads=3), "num_heads must divide hidden_size / 2 = 8, got 3"),
        (lambda: build(trunk="vision", num_heads=3), "num_heads must divide hidden_size = 16"),
        (lambda: build(trunk="vision")(torch.ones(1, 2, 8, 9).double()), r"must be \[B, 2, 8, 8\]"),
        (lambda: across_depths([]), "two depths or more, got 0"),
    ],
)
def test_says_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call()
