"""THOR's search against whole forwards."""

from __future__ import annotations

import itertools

import pytest
import torch
from bench.studies.thor.decoding import translate
from tests.zoo.thor.test_model import FORMS, build, rows

from moe_ops.zoo.thor.model import EOS, PAD


def greedy(model, source, count, experts=(None, None)):
    """One sentence by whole forwards."""
    memory = model.encode(source[None], experts[0]) if len(model.encoder_layers) else None
    start = torch.tensor([EOS]) if memory is not None else torch.cat([torch.tensor([EOS]), source])
    found = []
    for _ in range(count):
        line = torch.cat([start, torch.tensor(found, dtype=torch.long)])
        logits = model(line[None], memory, experts[1])[0, -1]
        logits[PAD] = -torch.inf
        found.append(int(logits.argmax()))
        if found[-1] == EOS:
            break
    return found


@pytest.mark.parametrize("form", ["encoder and decoder", "decoder"])
def test_greedy_search_is_the_argmax_of_whole_forwards(form):
    model = build(4, **FORMS[form]).train()
    source = rows(5, 3, 5)
    found = translate(model, source, 6)
    assert model.training
    model.eval()
    for row, tokens in zip(found, source, strict=True):
        expected = greedy(model, tokens[tokens != PAD], 6)
        assert row[row != PAD].tolist() == expected


def test_drawn_experts_stay_for_a_translation():
    model = build(4).eval()
    source = rows(5)
    made = translate(model, source, 6, level="sentence", generator=torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(1)
    sides = [
        model.draw_experts("sentence", side, 1, generator=draw) for side in ("encoder", "decoder")
    ]
    assert made[0].tolist() == greedy(model, source[0], 6, sides)
    for level in ("batch", "token"):
        seeds = [torch.Generator().manual_seed(s) for s in (0, 0, 1)]
        a, b, _ = (translate(model, source, 6, level=level, generator=g) for g in seeds)
        assert torch.equal(a, b)


@torch.no_grad()
def test_a_wide_beam_is_exhaustive():
    model = build(1, vocab_size=6).eval()
    source = torch.tensor([[4, 5, 4, EOS], [5, EOS, PAD, PAD]])
    every = [line for n in (1, 2, 3) for line in itertools.product((0, 2, 3, 4, 5), repeat=n)
             if EOS not in line[:-1] and (line[-1] == EOS or n == 3)]  # fmt: skip
    found = translate(model, source, 3, beam=60)
    for tokens, ours in zip(source, found, strict=True):
        memory = model.encode(tokens[tokens != PAD][None])

        def score(line, memory=memory):
            read = torch.tensor([[EOS, *line[:-1]]])
            logits = model(read, memory)[0]
            logits[:, PAD] = -torch.inf
            return float(logits.log_softmax(-1).gather(1, torch.tensor(line)[:, None]).mean())

        assert tuple(ours[ours != PAD].tolist()) == max(every, key=score)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: translate(build(), rows(3), 0), "must be at least 1, got 1 and 0"),
        (lambda: translate(build(), rows(3), 2, level="layer"), "level must be one of batch"),
    ],
)
def test_says_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call()
