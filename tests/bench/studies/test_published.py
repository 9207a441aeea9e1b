"""Methods for trained models on a checkpoint by name: a tiny one in the published layout."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

from bench.studies import published
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
    "moe_intermediate_size": 24,
}  # fmt: skip
EXPERTS = {
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "head_dim": 8},
    "qwen2_moe": {
        "num_experts": 8, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 24,
    },
}  # fmt: skip
KEYS = {
    "olmoe": "model.layers.0.mlp.experts.7.gate_proj.weight",
    "mixtral": "model.layers.0.block_sparse_moe.experts.7.w1.weight",
    "qwen3_moe": "model.layers.0.mlp.experts.7.gate_proj.weight",
    "qwen2_moe": "model.layers.0.mlp.experts.7.gate_proj.weight",
}
WORDS = 64


@pytest.fixture(params=EXPERTS)
def checkpoint(request, tmp_path):
    kind = request.param
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **EXPERTS[kind])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path, max_shard_size="20KB")
    words = {f"w{i}": i for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    draws = torch.randint(WORDS, (200,), generator=torch.Generator().manual_seed(1))
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in draws.tolist()), "utf-8")
    return kind, tmp_path


def test_all_methods_run_on_a_folder(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(published, "PREDICTOR_STEPS", 20)
    kind, folder = checkpoint
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    keys = {key for shard in shards for key in safe_open(shard, "pt").keys()}
    assert KEYS[kind] in keys

    arguments = ["--model", str(folder), "--text", str(folder / "text.txt"), "--rows", "4"]
    arguments += ["--length", "20", "--dtype", "float32", "--json", str(folder / "found.json")]
    assert published.main(arguments) == 0
    assert "Nothing was run" in capsys.readouterr().out
    assert not (folder / "found.json").exists()

    assert published.main([*arguments, "--yes"]) == 0
    found = json.loads((folder / "found.json").read_text("utf-8"))
    assert list(found) == ["super_experts", "scmoe", "premoe", "expertflow", "uncurl"]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    text = (folder / "text.txt").read_text("utf-8")
    _, tested = published.batches_of(AutoTokenizer.from_pretrained(folder), text, 4, 20)
    tokens = torch.cat(tested)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert found["super_experts"]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    right = (logits.argmax(-1) == tokens[:, 1:]).float().mean().item()
    assert found["scmoe"]["accuracy, model"] == pytest.approx(right)
    rates = found["expertflow"]
    assert 0 < rates["LRU"] <= rates["optimum"] <= 1


def test_cost_counts_active_parameters(checkpoint):
    _, folder = checkpoint
    found = published.cost_of(str(folder), 4, 20, torch.float32)
    config = AutoConfig.from_pretrained(folder)
    total = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    unused = 2 * 6 * 3 * 32 * 24  # Layers, unused experts, matrices, H, I.
    assert found.active == total - unused
    assert found.memory == 4 * total
    assert found.download == 0


def test_rejects_short_texts(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint[1])
    with pytest.raises(ValueError, match="--text must have 160 tokens, got 2"):
        published.batches_of(tokenizer, "w1 w2", 4, 20)


def test_transformers_reads_the_known_architectures():
    assert set(published.MODELS.values()) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(EXPERTS) <= set(published.MODELS.values())
