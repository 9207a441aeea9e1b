"""Whole models in the batch-invariant mode: a token's log-probabilities are bitwise those that it
has in its sequence alone, in training's forward, whatever the batch, padding and way to compute."""

from __future__ import annotations

import functools
import random

import pytest
import torch

import moe_ops
import moe_ops.hf
from moe_ops.hf.decode.attention import attention_forward
from moe_ops.hf.decode.step import reason_of
from moe_ops.quant import Int4WeightConfig, Int8WeightConfig

from . import families
from .models import CACHE, VOCAB

# Grouped queries with norms of heads, a sliding window, and latent attention with shared experts.
FAMILIES = {"qwen3_moe": {}, "mixtral": {"sliding_window": 12}, "deepseek_v3": {}}
WIDE = {"hidden_size": 64, "intermediate_size": 96}  # Groups of 32 divide them.
KINDS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "int8": (torch.float32, Int8WeightConfig()),
    "int8 in bf16": (torch.bfloat16, Int8WeightConfig()),
    "int4": (torch.float32, Int4WeightConfig(group_size=32)),
}
LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 130)


@pytest.fixture(autouse=True)
def invariant():
    with moe_ops.batch_invariant():
        yield


@functools.cache
def model_and_sequences(family: str, kind: str):
    """Returns a model, sequences, and the log-probabilities of each in training's forward."""
    dtype, quantization = KINDS[kind]
    sizes = {} if quantization is None else WIDE
    if quantization is not None and family != "mixtral":
        sizes = sizes | {"moe_intermediate_size": 64}
    model = families.build(family, **FAMILIES[family], max_position_embeddings=256, **sizes)
    model = model.to(dtype)
    moe_ops.hf.optimize(model, quantization=quantization)
    model.set_attn_implementation("moe_ops")
    generator = torch.Generator().manual_seed(1)
    draw = functools.partial(torch.randint, 1, VOCAB, generator=generator)
    sequences = [draw((length,)) for length in LENGTHS]
    model.train()
    alone = [log_probs(model(ids[None]).logits)[0] for ids in sequences]
    assert all(found.requires_grad for found in alone)
    return model, sequences, [found.detach() for found in alone]


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1)


def pad(parts: list[torch.Tensor], width: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns tokens [B, width] and their mask; padding is an arbitrary token."""
    tokens = torch.full((len(parts), width), 7)
    mask = torch.zeros(len(parts), width, dtype=torch.long)
    for row, seen, ids in zip(tokens, mask, parts, strict=True):
        where = slice(width - len(ids), width) if side == "left" else slice(len(ids))
        row[where], seen[where] = ids, 1
    return tokens, mask


def in_chunks(model, tokens, mask, positions, ends):
    """Returns the logits of calls that extend a cache to each of `ends`."""
    cache, start, found = None, 0, []
    for end in ends:
        inputs = {"position_ids": positions[:, start:end], CACHE: cache, "use_cache": True}
        found.append(model(tokens[:, start:end], attention_mask=mask[:, :end], **inputs))
        cache, start = found[-1][CACHE], end
    return torch.cat([out.logits for out in found], 1)


def check_random_batch(family: str, kind: str, rng: random.Random) -> None:
    model, sequences, alone = model_and_sequences(family, kind)
    chosen = [rng.randrange(len(sequences)) for _ in range(rng.randint(1, 6))]
    parts = [sequences[i][: rng.randint(1, len(sequences[i]))] for i in chosen]
    width = max(map(len, parts)) + rng.choice((0, 0, 1, 5, 40))
    way = rng.choice(("training", "inference", "cache"))
    side = "left" if way == "cache" else rng.choice(("left", "right"))
    tokens, mask = pad(parts, width, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model.train(way == "training")
    with torch.set_grad_enabled(way == "training"):
        if way == "cache":
            first = rng.randint(1, width)
            steps = range(first, min(first + 4, width))
            logits = in_chunks(model, tokens, mask, positions, sorted({*steps, width}))
        else:
            logits = model(tokens, attention_mask=mask, position_ids=positions).logits
    for row, seen, part, i in zip(log_probs(logits), mask.bool(), parts, chosen, strict=True):
        assert torch.equal(row[seen], alone[i][: len(part)]), (way, side, width, len(part))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [14, pytest.param(400, marks=pytest.mark.full)])
def test_random_batches(family, kind, count):
    rng = random.Random(f"{family} {kind} {count}")
    for _ in range(count):
        check_random_batch(family, kind, rng)


OTHERS = """
    aria deepseek_ocr2 deepseek_v2 dots1 exaone_moe flex_olmo gemma4 glm4_moe glm4_moe_lite
    glm4v_moe granitemoe granitemoeshared jetmoe mellum mistral4 olmoe qwen3_omni_moe
    qwen3_vl_moe solar_open zaya
""".split()


@pytest.mark.full
@pytest.mark.parametrize("family", OTHERS)
def test_other_families(family):
    """Padded batches, and training's forward, against each sequence alone."""
    model = families.build(family)
    moe_ops.hf.optimize(model)
    model.set_attn_implementation("moe_ops")
    parts = [torch.arange(1, length) for length in (5, 13, 22)]
    with torch.no_grad():
        alone = [log_probs(model(ids[None]).logits)[0] for ids in parts]
        for side in ("left", "right"):
            tokens, mask = pad(parts, 24, side)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(tokens, attention_mask=mask, position_ids=positions).logits
            for row, seen, expected in zip(log_probs(logits), mask.bool(), alone, strict=True):
                assert torch.equal(row[seen], expected)
    trained = model.train()(parts[1][None]).logits
    assert torch.equal(log_probs(trained)[0].detach(), alone[1])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rollouts(family, kind, cache):
    """The log-probabilities of `generate` are those of training's forward."""
    model, sequences, _ = model_and_sequences(family, kind)
    prompts, mask = pad([sequences[i][:30] for i in (3, 6, 8, 1)], 32, "left")
    model.eval()
    found = model.generate(
        prompts,
        attention_mask=mask,
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=True,
        top_k=0,
        cache_implementation=cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    sampled = log_probs(torch.stack(found.logits, 1))
    model.train()
    for tokens, seen, rollout in zip(found.sequences, mask, sampled, strict=True):
        ids = tokens[32 - int(seen.sum()) :]
        trained = log_probs(model(ids[None]).logits)[0]
        assert torch.equal(rollout, trained[-13:-1])


def test_without_the_mode():
    """The tests above compare what differs otherwise."""
    model, sequences, alone = model_and_sequences("qwen3_moe", "int8")
    tokens, mask = pad([sequences[7], sequences[9]], 100, "right")
    with moe_ops.batch_invariant(False):
        found = log_probs(model.eval()(tokens, attention_mask=mask).logits)
    assert not torch.equal(found[0, :34], alone[7])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(family):
    """The mode changes gradients by rounding alone."""
    model = families.build(family, **FAMILIES[family])
    tokens, mask = pad([torch.arange(1, 20), torch.arange(3, 40)], 40, "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = []
    for own in (True, False):
        if not own:
            moe_ops.hf.optimize(model)
            model.set_attn_implementation("moe_ops")
        model.zero_grad()
        logits = model.train()(tokens, attention_mask=mask, position_ids=positions).logits
        (log_probs(logits)[..., 3] * mask).sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert (found[1][name] - expected).norm() <= 1e-4 * expected.norm() + 1e-6, name


def test_layers_call_their_parts():
    model, sequences, _ = model_and_sequences("qwen3_moe", "fp32")
    with torch.no_grad():
        model.eval()(sequences[2][None])
    assert "batch-invariant" in reason_of(model.model.layers[0])


def refused(message: str, **inputs) -> None:
    model, sequences, _ = model_and_sequences("qwen3_moe", "fp32")
    with pytest.raises(ValueError, match=message), torch.no_grad():
        model.eval()(sequences[5][None], **inputs)


def test_refusals():
    mask = torch.ones(1, 13, dtype=torch.long)
    mask[0, 4] = 0
    refused("got padding between tokens", attention_mask=mask)
    packed = torch.tensor([[*range(6), *range(7)]])
    refused(
        "causal, with or without a window, got another mask", position_ids=packed, use_cache=False
    )
    whole = torch.ones(1, 1, 13, 13, dtype=torch.bool)
    refused("with the masks that transformers makes", attention_mask=whole)
    q = torch.zeros(1, 2, 3, 8)
    for message, given in (
        (r"dropout must be 0.*got 0\.1", {"dropout": 0.1}),
        ("no position bias.*got one of Identity", {"position_bias": q}),
        ("got attention sinks of Identity", {"s_aux": q}),
    ):
        with pytest.raises(ValueError, match=message):
            attention_forward(torch.nn.Identity(), q, q, q, None, **given)


@pytest.mark.parametrize("family", ["deepseek_v32", "dots3_note", "qwen4_exp", "hy_v4_vl"])
def test_chosen_keys_are_refused(family):
    model = families.build(family).eval()
    model.set_attn_implementation("moe_ops")
    with moe_ops.batch_invariant(), pytest.raises(ValueError, match="got an indexer that chooses"):
        families.logits(model, torch.arange(1, 14)[None])
