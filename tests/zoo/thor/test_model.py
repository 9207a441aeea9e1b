"""THOR against its equations on tensors with published names; its loss."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from moe_ops import zoo
from moe_ops.zoo.thor import Thor, symmetric_kl
from moe_ops.zoo.thor.model import EOS, PAD

from ..lm.common import published_tensors, sharpen

SMALL = {
    "vocab_size": 12, "hidden_size": 16, "intermediate_size": 12, "num_layers": 3, "dropout": 0.0,
    "num_experts": 3,
}  # fmt: skip
FORMS = {
    "encoder and decoder": {},
    "decoder": {"num_encoder_layers": 0},
    "one expert": {"num_experts": 1},
}


def build(seed: int = 0, **changes) -> Thor:
    torch.manual_seed(seed)
    model = zoo.create_model("thor", **{**SMALL, **changes})
    sharpen(model)
    return model.double()


def rows(*lengths: int, seed: int = 0) -> Tensor:
    """Sequences of these lengths, `EOS` included."""
    draw = torch.Generator().manual_seed(seed)
    out = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in zip(out, lengths, strict=True):
        row[:length] = torch.randint(4, 12, (length,), generator=draw)
        row[length - 1] = EOS
    return out


# ---------------------------------------------------------------- the equations, token by token


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w, name, x):
    centered = x - x.mean(-1, keepdim=True)
    scale = (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centered / scale * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(w, name, x, other, heads, causal):
    """Computes attention of one sequence [S, H] with another one [S', H], head by head."""
    q = linear(w, f"{name}.q_proj", x).chunk(heads, -1)
    k = linear(w, f"{name}.k_proj", other).chunk(heads, -1)
    v = linear(w, f"{name}.v_proj", other).chunk(heads, -1)
    parts = []
    for a, b, c in zip(q, k, v, strict=True):
        scores = a @ b.T / math.sqrt(a.shape[-1])
        if causal:
            later = torch.arange(len(other))[None] > torch.arange(len(x))[:, None]
            scores = scores.masked_fill(later, -torch.inf)
        parts.append(scores.softmax(-1) @ c)
    return linear(w, f"{name}.out_proj", torch.cat(parts, -1))


def network(w, name, x, expert):
    own = "" if expert is None else f".{expert}"
    return linear(w, f"{name}.fc2{own}", linear(w, f"{name}.fc1{own}", x).relu())


def by_hand(w, config, tokens, side, experts, memory=None):
    """Hidden states [S, H] of one sequence without padding; experts: a number per layer, "mean", or
    "best" by a router, times its probability."""
    hidden = config.hidden_size
    rates = [10_000 ** (-i / (hidden // 2 - 1)) for i in range(hidden // 2)]
    places = torch.tensor(
        [[f((t + 2) * r) for f in (math.sin, math.cos) for r in rates] for t in range(len(tokens))],
        dtype=torch.float64,
    )
    x = w["encoder.embed_tokens.weight"][tokens] * math.sqrt(hidden) + places
    for i in range(config.num_layers if side == "decoder" else config.num_encoder_layers):
        p = f"{side}.layers.{i}"
        y = attention(w, f"{p}.self_attn", x, x, config.num_heads, side == "decoder")
        x = norm(w, f"{p}.self_attn_layer_norm", x + y)
        if memory is not None:
            y = attention(w, f"{p}.encoder_attn", x, memory, config.num_heads, False)
            x = norm(w, f"{p}.encoder_attn_layer_norm", x + y)
        if i % 2 or config.num_experts == 1:
            y = network(w, p, x, None)
        elif experts == "best":
            share = (x @ w[f"{p}.router.weight"].T).softmax(-1)
            best = [int(row.argmax()) for row in share]
            outs = [share[t, e] * network(w, p, x[t], e) for t, e in enumerate(best)]
            y = torch.stack(outs)
        elif experts == "mean":
            every = range(config.num_experts)
            y = sum(network(w, p, x, e) for e in every) / config.num_experts
        else:
            outs = [network(w, p, x[t], int(experts[i // 2][t])) for t in range(len(x))]
            y = torch.stack(outs)
        x = norm(w, f"{p}.final_layer_norm", x + y)
    return x


DRAWN = [(f, level) for f in FORMS for level in (None, "sentence", "token")]


@pytest.mark.parametrize(("form", "level"), DRAWN)
def test_equals_its_equations(form, level):
    check_equations(build(**FORMS[form]).eval(), level)


def check_equations(model: Thor, level: str | None, undrawn: str = "mean") -> None:
    """undrawn: the experts of `by_hand` if none are drawn."""
    config = model.config
    w = {key: t.detach() for key, t in published_tensors(model).items()}
    source, target = rows(5, 3), rows(4, 6, seed=1)
    encoder = len(model.encoder_layers) > 0
    drawn = {}
    for side, tokens in (("encoder", source), ("decoder", target)):
        if level is not None and (encoder or side == "decoder"):
            drawn[side] = model.draw_experts(level, side, 2, tokens.shape[1])
    memory = model.encode(source, drawn.get("encoder")) if encoder else None
    logits = model(target, memory, drawn.get("decoder"))

    def of_row(side, b, length):
        if level is None:
            return undrawn
        ids = drawn[side][:, b]
        return ids if level == "token" else ids[:, None].expand(-1, length)

    for b in range(2):
        plain = {"encoder": source[b], "decoder": target[b]}
        plain = {side: tokens[tokens != PAD] for side, tokens in plain.items()}
        read = None
        if encoder:
            tokens = plain["encoder"]
            read = by_hand(w, config, tokens, "encoder", of_row("encoder", b, len(tokens)))
        tokens = plain["decoder"]
        x = by_hand(w, config, tokens, "decoder", of_row("decoder", b, len(tokens)), read)
        expected = x @ w["encoder.embed_tokens.weight"].T
        torch.testing.assert_close(logits[b, : len(tokens)], expected, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------- the loss


def two_passes(model, target, source, draws):
    """Cross-entropies and logits of counted tokens of two forwards with these experts."""
    read = torch.cat([torch.full((len(target), 1), EOS), target[:, :-1]], 1)
    losses, logits = [], []
    for encoder, decoder in draws:
        out = model(read, model.encode(source, encoder), decoder)[target != PAD]
        losses.append(F.cross_entropy(out, target[target != PAD], label_smoothing=0.1))
        logits.append(out)
    return losses, logits


@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_loss_is_of_two_passes(alpha):
    model = build(consistency=alpha).train()
    source, target = rows(5, 3), rows(4, 6, seed=1)
    draw = torch.Generator().manual_seed(3)
    out = model.loss(target, source, generator=draw)
    ours = torch.autograd.grad(out.loss, list(model.parameters()))
    draw.manual_seed(3)
    sides = [[model.draw_experts("batch", side, 2, generator=draw) for _ in range(2)]
             for side in ("encoder", "decoder")]  # fmt: skip
    draws = list(zip(*sides, strict=True))
    assert not torch.equal(sides[0][0], sides[0][1]), "the draws are alike: choose another seed"
    losses, (a, b) = two_passes(model, target, source, draws)
    p, q = a.softmax(-1), b.softmax(-1)
    consistency = ((p - q) * (p.log() - q.log())).sum() / 2 / len(p)
    torch.testing.assert_close(out.consistency, consistency, rtol=1e-6, atol=1e-7)
    expected = losses[0] + losses[1] + (alpha * consistency if alpha else 0.0)
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=1e-7)
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    # Experts that were drawn in no pass have no gradient.
    bank = model.encoder_layers[0].ffn.experts.w_down
    (grad,) = (g for g, p in zip(ours, model.parameters(), strict=True) if p is bank)
    used = {int(draw[0, 0]) for draw in sides[0]}
    assert [bool((g != 0).any()) for g in grad] == [e in used for e in range(3)]


def test_symmetric_kl_is_the_mean_of_both_directions():
    a, b = torch.randn(2, 5, 7, dtype=torch.float64)
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    both = sum(F.kl_div(x, y, log_target=True, reduction="batchmean") for x, y in ((p, q), (q, p)))
    torch.testing.assert_close(symmetric_kl(a, b), both / 2)
    assert symmetric_kl(a, a) == 0


def test_one_expert_is_r_drop():
    """Only dropout makes its passes differ; without it they are one."""
    source, target = rows(5, 3), rows(4, 6, seed=1)
    plain = build(num_experts=1).train()
    out = plain.loss(target, source)
    assert out.consistency.abs() < 1e-12
    alone = plain.loss(target, source, passes=1)
    torch.testing.assert_close(out.loss, 2 * alone.loss)
    dropped = build(num_experts=1, dropout=0.3).train()
    assert dropped.loss(target, source).consistency > 0
    assert plain.draw_experts("token", "encoder", 2, 5).eq(0).all()


def test_padding_and_one_pass_change_nothing_that_counts():
    model = build().eval()
    source, target = rows(5, 3), rows(4, 6, seed=1)
    longer = [F.pad(t, (0, 3), value=PAD) for t in (target, source)]
    a, b = model.loss(target, source), model.loss(*longer)
    torch.testing.assert_close(a.loss, b.loss)
    assert a.consistency == 0  # The mean of experts, twice.
    torch.testing.assert_close(a.cross_entropy, model.loss(target, source, passes=1).cross_entropy)


def test_a_decoder_alone_counts_the_target():
    model = build(num_encoder_layers=0).eval()
    source, target = rows(5, 3), rows(4, 6, seed=1)
    total, count = 0.0, 0
    for s, t in zip(source, target, strict=True):
        s, t = s[s != PAD], t[t != PAD]
        line = torch.cat([torch.tensor([EOS]), s, t])
        logits = model(line[None, :-1])[0, len(s) :]
        total += F.cross_entropy(logits, t, reduction="sum")
        count += len(t)
    out = model.loss(target, source)
    torch.testing.assert_close(out.cross_entropy, (total / count).detach())
    assert torch.isfinite(model.loss(target).loss)


# ------------------------------------------------------------------------------------ the search


@pytest.mark.parametrize(("form", "level"), DRAWN[:6])
def test_steps_with_a_cache_equal_the_whole(form, level):
    check_steps(build(**FORMS[form]).eval(), level)


def check_steps(model: Thor, level: str | None) -> None:
    tokens = rows(7, 7, seed=2)
    memory = model.encode(rows(5, 3)) if len(model.encoder_layers) else None
    drawn = None if level is None else model.draw_experts(level, "decoder", 2, 7)
    whole, cache, start = model(tokens, memory, drawn), model.new_cache(), 0
    parts = []
    for length in (3, 1, 1, 2):
        part = drawn[:, :, start : start + length] if level == "token" else drawn
        parts.append(model(tokens[:, start : start + length], memory, part, cache=cache))
        start += length
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------- and the rest


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints(form, tmp_path):
    check_checkpoint(build(**FORMS[form]).float().eval(), tmp_path)


def check_checkpoint(model: Thor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    own = "" if model.config.num_experts == 1 else ".0"
    assert f"decoder.layers.2.fc1{own}.weight" in kept and "decoder.layers.1.fc1.weight" in kept
    assert {e.name for e in model.entries()} == set(model.state_dict())
    again = type(model).from_pretrained(tmp_path)
    assert again.config == model.config and not again.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_counts_parameters():
    counts = build().num_parameters()
    bank = 3 * (2 * 16 * 12 + 16 + 12)
    layers = 1 + 2  # Of the encoder's two blocks one has experts, of the decoder's three two.
    assert counts["total"] - counts["active"] == layers * bank * 2 // 3
    with torch.device("meta"):
        large = zoo.create_model("thor", preset="iwslt")
    # Two experts in half of the blocks of a transformer of 36.7 million.
    assert round(large.num_parameters()["total"] / 1e6) == 43


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build(passes=3), "passes must be 1 or 2, got 3"),
        (lambda: build(num_heads=3), "num_heads must divide hidden_size = 16, got 3"),
        (lambda: build(hidden_size=5, num_heads=1), "hidden_size must be even"),
        (lambda: build()(rows(3)), "memory must be what encode gives"),
        (lambda: build(num_encoder_layers=0).encode(rows(3)), "num_encoder_layers must be above 0"),
        (lambda: build().draw_experts("layer", "encoder", 2), "level must be one of batch"),
    ],
)
def test_says_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call()
