"""Tests of what `make demo` adds to the demo of the package."""

from __future__ import annotations

import json

import pytest
import torch
from bench.demo.__main__ import main
from bench.demo.routing import entropies, max_violation

from moe_ops.demo import data


def test_entropies_by_hand():
    def corpus(train: bytes, heldout: bytes) -> data.Corpus:
        return data.Corpus(
            torch.tensor(list(train), dtype=torch.uint8),
            torch.tensor(list(heldout), dtype=torch.uint8),
            "test",
            "",
        )

    result = entropies(corpus(b"aabb" * 5000, b"abba"))
    assert result["unigram"] == pytest.approx(1.0, abs=1e-3)
    # In the training text a and b follow each other and themselves equally often.
    assert result["bigram"] == pytest.approx(1.0, abs=1e-2)
    result = entropies(corpus(b"ab" * 5000, b"abab"))
    assert result["unigram"] == pytest.approx(1.0, abs=1e-3)
    assert result["bigram"] == pytest.approx(0.0, abs=1e-2)


def test_max_violation():
    load = [[[4, 4, 4, 4], [16, 0, 0, 0]]]
    assert max_violation(load) == [0.0, 3.0]


def test_the_whole_demo(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["--smoke", "--no-hf", "--threads", "1", "--out", str(out)]) == 0
    assert "bigram entropy" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["hugging_face"] is None
    assert len(summary["information_bits_by_layer"]) == 2
    assert summary["entropy_bits_per_byte"]["bigram"] < summary["heldout_bits_per_byte"]
    if (out / "token_experts.png").exists():
        assert (out / "loss.png").stat().st_size > 3000


def test_hugging_face_part():
    pytest.importorskip("transformers")
    from bench.demo.hf_compare import compare

    results = compare(smoke=True, budget_s=0.05)
    assert [result["model"] for result in results] == ["Qwen3-MoE", "Mixtral"]
    for result in results:
        assert result["passed"], result["errors"]
        assert set(result["forward"]["seconds"]) == {"eager", "grouped_mm", "moe_ops"}
        for measured in (result["forward"], result["forward_backward"]):
            seconds = measured["seconds"]
            for other, ratio in measured["speedup"].items():  # What is printed beside each other.
                assert ratio == seconds[other] / seconds["moe_ops"]


def test_hugging_face_part_with_an_old_transformers(monkeypatch):
    pytest.importorskip("transformers")
    from bench.demo import hf_compare

    assert hf_compare.missing() is None
    monkeypatch.setattr(hf_compare.importlib.metadata, "version", lambda name: "5.6.2")
    assert 'or newer and found 5.6.2, pip install --upgrade "transformers>=' in hf_compare.missing()
