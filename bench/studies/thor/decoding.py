"""Translation with THOR: beam search, with random experts or the mean of all.

Letters: B sources, S' tokens of each, W hypotheses kept of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops._fields import check_choice
from moe_ops.zoo.thor.model import EOS, LEVELS, PAD, Memory, Thor


@torch.no_grad()
def translate(
    model: Thor,
    source: Tensor,
    num_tokens: int,
    *,
    beam: int = 1,
    length_penalty: float = 1.0,
    level: str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The most likely targets that beam search finds, without dropout.

    Args:
        source: [B, S'], each row ended by `EOS` and filled up with `PAD`.
        num_tokens: of a target at most, `EOS` included.
        beam: W; 1 is greedy.
        length_penalty: hypotheses are compared by their log-probability over length to this power.
        level: "sentence" or "token": experts are drawn once for the whole translation, on both
            sides ("batch": the same for all sources); None: the mean of all experts.
        generator: of the draws.

    Returns:
        [B, S], S <= num_tokens: targets with their `EOS`, filled up with `PAD`.

    Raises:
        ValueError: an unknown level, or numbers below 1.
    """
    if beam < 1 or num_tokens < 1:
        raise ValueError(
            f"translate: beam and num_tokens must be at least 1, got {beam} and {num_tokens}."
        )
    if level is not None:
        check_choice("translate", "level", level, LEVELS)
    before = model.training
    model.eval()
    try:
        if len(model.encoder_layers):
            return _search(model, source, num_tokens, beam, length_penalty, level, generator)
        # A decoder alone reads sources of one length at a time, since nothing masks padding there.
        lengths = (source != PAD).sum(1)
        out = source.new_full((len(source), num_tokens), PAD)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().flatten()
            part = source[rows, :length]
            found = _search(model, part, num_tokens, beam, length_penalty, level, generator)
            out[rows, : found.shape[1]] = found
        return out[:, : int((out != PAD).sum(1).max())]
    finally:
        model.train(before)


def of_rows(memory: Memory, rows: Tensor) -> Memory:
    """Returns what is known of these sources, int64, of which some may repeat."""
    return Memory([(k[rows], v[rows]) for k, v in memory.keys_values], memory.seen[rows])


def _search(
    model: Thor,
    source: Tensor,
    num_tokens: int,
    beam: int,
    length_penalty: float,
    level: str | None,
    generator: torch.Generator | None,
) -> Tensor:
    batch, length = source.shape
    memory: Memory | None = None
    first = source.new_full((batch, 1), EOS)
    drawn = None
    if len(model.encoder_layers):
        if level is not None:
            drawn = model.draw_experts(level, "encoder", batch, length, generator)
        memory = model.encode(source, drawn)
    else:
        first = torch.cat([first, source], dim=1)
    if level is not None:
        total = first.shape[1] + num_tokens
        drawn = model.draw_experts(level, "decoder", batch, total, generator)
    # Of each source the first hypothesis alone counts at first: they are all the same.
    rows = torch.arange(batch, device=source.device).repeat_interleave(beam)
    memory = None if memory is None else of_rows(memory, rows)
    drawn = None if drawn is None else drawn[:, rows]
    scores = torch.full((batch, beam), -torch.inf, device=source.device)
    scores[:, 0] = 0
    new, cache = first[rows], model.new_cache()
    tokens = source.new_empty((batch * beam, 0))
    done = torch.zeros(batch * beam, dtype=torch.bool, device=source.device)
    lengths = torch.zeros(batch * beam, device=source.device)
    for _ in range(num_tokens):
        start = cache[0].length
        chosen = drawn
        if drawn is not None and drawn.dim() == 3:
            chosen = drawn[:, :, start : start + new.shape[1]]
        logits = model(new, memory, chosen, cache=cache)[:, -1].float()
        logits[:, PAD] = -torch.inf
        following = logits.log_softmax(-1)
        # A hypothesis that has ended goes on with padding, which costs nothing.
        following[done] = -torch.inf
        following[done, PAD] = 0
        both = scores.flatten()[:, None] + following
        vocab = both.shape[1]
        scores, best = both.view(batch, beam * vocab).topk(beam, dim=1)
        parent = best.div(vocab, rounding_mode="floor")
        parent = (parent + beam * torch.arange(batch, device=best.device)[:, None]).flatten()
        new = (best % vocab).view(-1, 1)
        tokens = torch.cat([tokens[parent], new], dim=1)
        lengths = lengths[parent] + ~done[parent]
        done = done[parent] | (new[:, 0] == EOS)
        for held in cache:
            held.select(parent)
        if bool(done.all()):
            break
    final = scores / lengths.view(batch, beam).clamp(min=1) ** length_penalty
    best = final.argmax(1) + beam * torch.arange(batch, device=source.device)
    found = tokens[best]
    return found[:, : max(int((found != PAD).sum(1).max()), 1)]
