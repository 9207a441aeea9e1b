"""The timeline of a placed model: its spans are in a stream's order, and its values the model's."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers")
timeline = pytest.importorskip("bench.cpu.timeline")

TINY = {
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def test_spans_and_picture(tmp_path):
    model = timeline.make_model(**TINY)
    spans, logits = timeline.record(model, 5)
    ids = torch.randint(256, (1, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, logits)
    lanes = {lane: [s for s in spans if s.lane == lane] for lane in timeline.LANES}
    assert [s.name for s in lanes[timeline.HOST]] == ["routed experts"] * 3
    names = [s.name for s in lanes[timeline.STREAM]]
    layer = [timeline.DENSE] * 4 + ["copies", "shared experts", "copies"]
    assert names == [*layer * 3, timeline.DENSE]  # The last is the norm before the head.
    for lane in lanes.values():
        assert all(a.end <= b.start for a, b in pairwise(lane))
    down, up = (
        [s for s in lanes[timeline.STREAM] if s.name == "copies"][first::2] for first in (0, 1)
    )
    for before, experts, after in zip(down, lanes[timeline.HOST], up, strict=True):
        assert before.end <= experts.start and experts.end <= after.start
    assert 0 <= timeline.overlap(spans) <= 1
    timeline.draw({5: spans}, tmp_path / "timeline.svg", "a test")
    drawn = (tmp_path / "timeline.svg").read_text()
    assert all(name in drawn for name in timeline.COLORS)


def test_overlap():
    def span(name, start, end):
        return timeline.Span("lane", f"{name} experts", start, end)

    assert (
        timeline.overlap([span("shared", 0, 4), span("routed", 1, 2), span("routed", 3, 9)]) == 0.5
    )
