"""Dense models of transformers upcycled, in memory and by `moe-ops upcycle`."""

from __future__ import annotations

import json

import pytest
import torch
from tests.helpers.fresh_python import run_python

from moe_ops import upcycle
from moe_ops.layers import TopKRouter

transformers = pytest.importorskip("transformers")

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 5,
    "rms_norm_eps": 1e-3,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "llama": {"rope_parameters": _LLAMA3},
    "mistral": {"sliding_window": 8},
    "qwen3": {"attention_bias": True, "tie_word_embeddings": True},
}
RESULTS = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}


def build(kind: str = "llama", seed: int = 0, **changes):
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **{**_COMMON, **CONFIGS[kind], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.dim() > 1 and "embed" not in name else 0.1))
    return model


def logits(model, tokens):
    model.set_experts_implementation("eager")
    with torch.no_grad():
        return model(input_ids=tokens).logits


TOKENS = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 4, "top_k": 2},
        {"num_experts": 8, "top_k": 4, "num_slices": 4},
        {"num_experts": 3, "top_k": 3, "num_slices": 3, "clusters": "k_means"},
        {"num_experts": 4, "top_k": 2, "num_slices": 2, "clusters": "coactivation"},
    ],
    ids=["copies", "copies in slices", "k-means", "co-activation"],
)
def test_starts_as_the_dense_model(kind, options):
    dense = build(kind)
    state = {name: t.clone() for name, t in dense.state_dict().items()}
    model = upcycle.upcycle_model(dense, batches=[TOKENS], router_std=0.5, **options)
    assert model.config.model_type == RESULTS[kind] and not model.training
    assert model.config.num_experts_per_tok == options["top_k"]
    assert model.config.eos_token_id == 5 and model.config.rms_norm_eps == 1e-3
    assert model.config.tie_word_embeddings == dense.config.tie_word_embeddings
    expected = logits(dense, TOKENS)
    torch.testing.assert_close(logits(model, TOKENS), expected, rtol=1e-4, atol=1e-4)
    # The dense model is as before, and shares no memory with the result.
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert all(torch.equal(t, state[name]) for name, t in dense.state_dict().items())


def test_trains_and_can_be_switched_to_our_kernels():
    import moe_ops.hf

    model = upcycle.upcycle_model(build("qwen3"), 4, 2, seed=3)
    again = upcycle.upcycle_model(build("qwen3"), 4, 2, seed=3)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    expected = logits(model, TOKENS)
    model.set_experts_implementation("moe_ops")
    assert moe_ops.hf is not None
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_specialists_are_averaged_around_their_networks():
    several = [build("llama", seed) for seed in range(2)]
    model = upcycle.upcycle_model(several, 4, 1)
    for name in ("embed_tokens.weight", "layers.1.self_attn.q_proj.weight", "norm.weight"):
        parts = [s.model.get_parameter(name) for s in several]
        torch.testing.assert_close(model.model.get_parameter(name), sum(parts) / 2)
    experts = model.model.layers[1].mlp.experts
    for e in range(4):
        dense = several[e // 2].model.layers[1].mlp
        assert torch.equal(experts.down_proj[e], dense.down_proj.weight)
        both = torch.cat([dense.gate_proj.weight, dense.up_proj.weight])
        assert torch.equal(experts.gate_up_proj[e], both)
    same = upcycle.upcycle_model([several[0], build("llama", 0)], 4, 1)
    torch.testing.assert_close(
        logits(same, TOKENS), logits(several[0], TOKENS), rtol=1e-4, atol=1e-4
    )


def test_attention_experts_from_attention_of_transformers():

    model = build("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    attention = model.model.layers[0].self_attn
    layer = upcycle.upcycle_attention([attention] * 2, TopKRouter(32, 2, 1), rope_theta=500.0)
    x, mask = torch.randn(1, 9, 32), torch.full((9, 9), -1e9).triu(1)[None, None]
    angles = model.model.rotary_emb(x, torch.arange(9)[None])
    with torch.no_grad():
        expected = attention(x, position_embeddings=angles, attention_mask=mask)[0]
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no norms of queries, got Qwen3Attention"):
        attention = build("qwen3", attention_bias=False).model.layers[0].self_attn
        upcycle.upcycle_attention([attention], TopKRouter(32, 1, 1), rope_theta=500.0)


def test_half_precision_stays():
    model = upcycle.upcycle_model(build("mistral").bfloat16(), 4, 2, noise=0.1, ratio=0.5)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert bool(logits(model, TOKENS).isfinite().all())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: upcycle.upcycle_model([], 4, 2), "at least one model, got none"),
        (lambda: upcycle.upcycle_model(torch.nn.Linear(1, 1), 4, 2), "got Linear"),
        (
            lambda: upcycle.upcycle_model([build("llama"), build("mistral")], 4, 2),
            "got llama, mistral",
        ),
        (lambda: upcycle.upcycle_model(build(mlp_bias=True), 4, 2), "mixtral lacks, got mlp_bias"),
        (lambda: upcycle.upcycle_model(build(attention_bias=True), 4, 2), "attention_bias=True"),
        (
            lambda: upcycle.upcycle_model([build(), build(intermediate_size=20)], 4, 2),
            "one size, got several",
        ),
        (lambda: upcycle.upcycle_model(build(), 4, 2, clusters="best"), "clusters must be one of"),
        (
            lambda: upcycle.upcycle_model(build(), 4, 2, num_slices=2, clusters="coactivation"),
            "batches must be given",
        ),
        (lambda: upcycle.upcycle_model(build(), 5, 2, num_slices=5), "must divide"),
    ],
)
def test_says_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ------------------------------------------------------------------------------- the command

_LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
dense, model = (AutoModelForCausalLM.from_pretrained(folder) for folder in sys.argv[1:])
ids = torch.arange(40).view(2, 20)
with torch.no_grad():
    difference = (model(ids).logits - dense(ids).logits).abs().max()
assert "moe_ops" not in sys.modules
print(json.dumps([float(difference), type(model).__name__, model.config.num_local_experts]))
"""


def test_upcycled_by_the_command_and_loaded_without_it(tmp_path):
    pytest.importorskip("typer")
    dense, out = tmp_path / "dense", tmp_path / "out"
    build("qwen3").save_pretrained(dense)
    (dense / "tokenizer_config.json").write_text("{}")
    line = ["-m", "moe_ops.cli", "upcycle", str(dense), "--experts", "8", "--top-k", "2"]
    done = run_python(*line, "--slices", "2", "--out", str(out), "--json", transformers=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((out / "moe_ops_upcycling.json").read_text())
    assert report["starts_as_the_dense_model"] and report["logit_difference"] < 1e-4
    assert (out / "tokenizer_config.json").exists()
    loaded = run_python("-c", _LOAD, str(dense), str(out), transformers=True)
    assert loaded.returncode == 0, loaded.stderr
    difference, name, experts = json.loads(loaded.stdout.strip().splitlines()[-1])
    assert difference < 1e-3 and (name, experts) == ("Qwen3MoeForCausalLM", 8)


def test_several_models_by_the_command(tmp_path):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from moe_ops.cli.app import app

    folders = [tmp_path / str(seed) for seed in range(2)]
    for seed, folder in enumerate(folders):
        build("llama", seed).save_pretrained(folder)
    line = ["upcycle", *map(str, folders), "--experts", "2", "--top-k", "1", "--json"]
    result = CliRunner().invoke(app, [*line, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "moe_ops_upcycling.json").read_text())
    assert report["sources"] == ["0", "1"] and not report["starts_as_the_dense_model"]
    assert report["logit_difference"] > 0.1
    for extra, message in (
        (["--out", str(folders[1]), "--overwrite"], "another folder than SOURCE"),
        (["--out", str(tmp_path / "out")], "must be empty or new without --overwrite"),
        (["--out", str(tmp_path / "x"), "--experts", "3"], "the 2 networks, got 3"),
        (["--out", str(tmp_path / "x"), "--clusters", "coactivation"], "--text must be given"),
    ):
        result = CliRunner().invoke(app, [*line, *extra])
        assert result.exit_code == 1
        assert message in result.output.replace("\n", " ")
    assert not (tmp_path / "x").exists()


def test_co_activation_and_perplexity_of_a_text(tmp_path):
    pytest.importorskip("typer")
    from rich.console import Console
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    from moe_ops.cli.upcycle import UpcycleOptions
    from moe_ops.cli.upcycle import run as run_command

    dense, text = tmp_path / "dense", tmp_path / "text.txt"
    build("mistral").save_pretrained(dense)
    words = Tokenizer(WordLevel({"w0": 0} | {f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    tokenizer.save_pretrained(dense)
    text.write_text(" ".join(f"w{i}" for i in TOKENS.flatten().tolist() * 5))
    options = UpcycleOptions(
        (dense,), tmp_path / "out", experts=4, top_k=2, slices=2, clusters="coactivation",
        text=text, tokens=80, context=20,
    )  # fmt: skip
    report = run_command(options, Console(quiet=True))
    assert report["starts_as_the_dense_model"] and report["num_tokens"] == 80
    assert report["perplexity_after"] == pytest.approx(report["perplexity_before"][0], rel=1e-4)
    cut = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    whole = build("mistral").model.layers[0].mlp.up_proj.weight
    part = cut.model.layers[0].mlp.experts.gate_up_proj[0, 12:]
    # Neurons of a slice are neurons of the network, not the first ones.
    assert [int((whole == row).all(1).sum()) for row in part] == [1] * 12
    assert not torch.equal(part, whole[:12])


def test_a_half_precision_model_by_the_command(tmp_path):
    """The command writes the model whether two copies tie or not, and says the difference."""
    pytest.importorskip("typer")
    from rich.console import Console

    from moe_ops.cli.upcycle import UpcycleOptions
    from moe_ops.cli.upcycle import run as run_command

    dense = build("llama", intermediate_size=32)  # Grouped products of torch want 16-byte rows.
    dense.bfloat16().save_pretrained(tmp_path / "dense")
    for slices, out in ((1, tmp_path / "copies"), (2, tmp_path / "slices")):
        options = UpcycleOptions((tmp_path / "dense",), out, experts=4, top_k=2, slices=slices)
        report = run_command(options, Console(quiet=True))
        assert report["starts_as_the_dense_model"] and report["logit_difference"] < 0.5
        again = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert again.dtype == torch.bfloat16


def test_a_result_that_differs_is_not_written(tmp_path, monkeypatch):
    from rich.console import Console

    from moe_ops.cli.upcycle import UpcycleOptions
    from moe_ops.cli.upcycle import run as run_command

    build("llama").save_pretrained(tmp_path / "dense")
    whole = upcycle.upcycle_model

    def wrong(*args, **options):
        model = whole(*args, **options)
        with torch.no_grad():
            model.model.norm.weight.mul_(1.1)
        return model

    monkeypatch.setattr(upcycle, "upcycle_model", wrong)
    options = UpcycleOptions((tmp_path / "dense",), tmp_path / "out", experts=4, top_k=2)
    with pytest.raises(ValueError, match="must equal the dense model to rounding"):
        run_command(options, Console(quiet=True))
    assert not (tmp_path / "out").exists()
