"""Quantized experts in transformers' models: in place, saved, loaded, while loading, by command."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.quantized import weight_config
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import moe_ops.hf
from moe_ops import quant
from moe_ops.cli.app import app
from moe_ops.hf import MoeOpsConfig
from moe_ops.quant import QuantizedExperts

from .models import CONFIGS, DECORATED, MODEL_TYPES, NUM_BLOCKS, NUM_FFNS, VOCAB, build, tokens

# Sizes that groups of 32 divide.
WIDE = {
    name: {k: 32 for k in ("intermediate_size", "moe_intermediate_size") if k in CONFIGS[name]}
    for name in MODEL_TYPES
}
WIDE["dbrx"] = {"ffn_config": {**CONFIGS["dbrx"]["ffn_config"], "ffn_hidden_size": 32}}
FORMATS = [("int8", None), ("int4", 32)]


def make(model_type, **kwargs):
    return build(model_type, **WIDE[model_type], **kwargs)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def load(folder, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **kwargs)
    # Of a mapped file, tensors begin anywhere, and torch's own products are not the same bits then.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def banks(model):
    return [m for m in model.modules() if isinstance(m, QuantizedExperts)]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(("format", "group_size"), FORMATS)
def test_blocks_compute_what_they_did(model_type, format, group_size):
    """Each bank alone, on the inputs that it has in the model: routing cannot flip."""
    model = make(model_type)
    baseline = quant.collect_calibration(model, [tokens()])
    assert len(baseline.banks) == NUM_FFNS[model_type]
    before = moe_ops.hf.status(model)
    assert moe_ops.quantize(model, weight_config(format, group_size)) is model
    report = quant.compare_quality(model, baseline)
    assert [b.name for b in report.banks] == list(baseline.banks)
    for bank in report.banks:
        assert 0 < bank.error < (0.05 if format == "int8" else 0.2)
        assert bank.bytes_after < (0.5 if format == "int8" else 0.3) * bank.bytes_before
    assert len(banks(model)) == NUM_FFNS[model_type]
    want = "moe_ops (int8)" if format == "int8" else "moe_ops (int4 g32)"
    assert moe_ops.hf.status(model) == before | dict.fromkeys(baseline.banks, want)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_recorded_outputs_are_the_blocks(model_type):
    """The outputs that `collect_calibration` records are what the model adds up."""
    model = make(model_type)
    ids = tokens()
    want = logits(model, ids)
    baseline = quant.collect_calibration(model, [ids])
    with torch.no_grad():
        # Weights that 8 bits hold exactly: whole numbers of 1/127 of the largest.
        for name, _ in baseline.banks.items():
            for p in model.get_submodule(name).parameters():
                if p.dim() >= 2 and p.shape[0] > 1:
                    p.copy_((p * 8).round().clamp(-127, 127) / 8)
                    flat = p.flatten(0, -2)
                    flat[:, 0] = 127 / 8
                    if p.dim() == 3:
                        p[:, 0, :] = 127 / 8
    baseline = quant.collect_calibration(model, [ids])
    exact = logits(model, ids)
    assert not torch.equal(exact, want)
    moe_ops.quantize(model, moe_ops.Int8WeightConfig())
    for bank in quant.compare_quality(model, baseline).banks:
        assert bank.error < 0.03
    assert torch.isfinite(logits(model, ids)).all()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(("format", "group_size"), FORMATS)
def test_saved_and_loaded(tmp_path, model_type, format, group_size):
    model = make(model_type)
    ids = tokens()
    calibration = [ids] if format == "int4" else None
    moe_ops.quantize(model, weight_config(format, group_size), calibration=calibration)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    config = loaded.config.quantization_config
    assert config.config == weight_config(format, group_size)
    assert all((b.x_scale is not None) == (format == "int4") for b in banks(loaded))
    assert moe_ops.hf.status(loaded) == moe_ops.hf.status(model)
    # And once more, from what was loaded.
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), ids), logits(model, ids))


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text", "jetmoe", "dbrx"])
def test_half_precision(tmp_path, model_type):
    make(model_type).save_pretrained(tmp_path / "float")
    # Not .to(bfloat16), which would round the frequencies of the positions too.
    model = load(tmp_path / "float", dtype=torch.bfloat16)
    ids = tokens()
    moe_ops.quantize(model, moe_ops.Int4WeightConfig(32), calibration=[ids])
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for bank in banks(loaded):
        assert bank.w_down_scale.dtype == bank.x_scale.dtype == torch.float32
        assert bank.b_down is None or bank.b_down.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    moved = load(tmp_path, dtype=torch.float32)
    assert relative(logits(moved, ids), logits(model, ids)) < 0.5
    assert all(b.b_down is None or b.b_down.dtype == torch.float32 for b in banks(moved))


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text", "jetmoe", "dbrx"])
def test_while_loading(tmp_path, model_type):
    model = make(model_type)
    ids = tokens()
    model.save_pretrained(tmp_path / "float")
    config = MoeOpsConfig(moe_ops.Int4WeightConfig(32))
    loaded = load(tmp_path / "float", quantization_config=config)
    moe_ops.quantize(model, moe_ops.Int4WeightConfig(32))
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved"), ids), logits(model, ids))


@pytest.mark.parametrize("model_type", ["mixtral", "llama4_text", "jetmoe", "dbrx"])
def test_switched_models(model_type):
    """Blocks that already run on moe_ops give the same result."""
    ids = tokens()
    plain, switched = make(model_type), make(model_type)
    moe_ops.hf.enable(switched)
    for model in (plain, switched):
        moe_ops.quantize(model, moe_ops.Int4WeightConfig(32), calibration=[ids])
    for a, b in zip(banks(plain), banks(switched), strict=True):
        torch.testing.assert_close(a.x_scale, b.x_scale, rtol=1e-3, atol=1e-3)
    enabled = moe_ops.hf.enable(plain)
    attention = [name for name, how in enabled.items() if how == "forward"]
    assert set(enabled.values()) - {"forward"} == {"quantized"}
    assert len(attention) == NUM_BLOCKS[model_type] - NUM_FFNS[model_type]
    assert list(moe_ops.hf.disable(plain)) == attention
    with moe_ops.hf.assert_used(plain) as calls:
        logits(plain, ids)
    assert set(calls.values()) == {1}


def test_generate():
    model = make("mixtral")
    moe_ops.quantize(model, moe_ops.Int8WeightConfig())
    y = model.generate(tokens(), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert y.shape == (2, 18)


def test_pack_weights_skips():
    model = make("mixtral")
    moe_ops.quantize(model, moe_ops.Int8WeightConfig(), skip="*.0.*")
    moe_ops.hf.enable(model)
    with pytest.warns(UserWarning, match="skipped 1 bank of quantized experts"):
        assert moe_ops.pack_weights(model) > 0
    moe_ops.unpack_weights(model)


def test_skipped_blocks_stay_float_through_a_checkpoint(tmp_path):
    model = make("qwen3_moe")
    ids = tokens()
    moe_ops.quantize(model, moe_ops.Int8WeightConfig(), skip=["*layers.0.*"])
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, experts_implementation="eager")
    assert moe_ops.hf.status(loaded)["model.layers.0.mlp.experts"] != "moe_ops (int8)"
    assert moe_ops.hf.status(loaded)["model.layers.1.mlp.experts"] == "moe_ops (int8)"
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_one_block_or_one_bank():
    model = make("mixtral")
    bank = moe_ops.quantize(model.model.layers[0].mlp.experts, moe_ops.Int8WeightConfig())
    assert isinstance(bank, QuantizedExperts)
    layer = model.model.layers[1]
    assert moe_ops.quantize(layer, moe_ops.Int8WeightConfig()) is layer
    assert isinstance(layer.mlp.experts, QuantizedExperts)
    assert not hasattr(model, "hf_quantizer")


def test_gradients_pass_through():
    model = make("mixtral")
    moe_ops.quantize(model, moe_ops.Int8WeightConfig())
    before = dict(model.named_buffers())
    model(tokens(), labels=tokens()).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


@pytest.mark.parametrize("model_type", DECORATED)
def test_an_unknown_activation_is_named(model_type):
    model = make(model_type)
    name = next(iter(moe_ops.hf.status(model)))
    model.get_submodule(name)._apply_gate = lambda x: x
    with pytest.raises(ValueError, match=rf"quantize: {name} must have an activation"):
        moe_ops.quantize(model, moe_ops.Int8WeightConfig())
    if NUM_FFNS[model_type] > 1:
        moe_ops.quantize(model, moe_ops.Int8WeightConfig(), skip=[name])


def test_quantizing_twice():
    model = make("mixtral")
    moe_ops.quantize(model, moe_ops.Int8WeightConfig(), skip=["*layers.0.*"])
    with pytest.raises(ValueError, match=r"must be a float model, got one quantized by moe_ops"):
        moe_ops.quantize(model, moe_ops.Int4WeightConfig(32))


# --- checkpoints that do not fit


@pytest.fixture
def saved(tmp_path):
    model = make("mixtral")
    moe_ops.quantize(model, moe_ops.Int4WeightConfig(32))
    model.save_pretrained(tmp_path)
    return tmp_path


def change(folder, edit):
    path = folder / "model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path, metadata={"format": "pt"})


def key_of(state, suffix):
    return next(k for k in state if k.endswith(suffix))


def test_a_missing_scale(saved):
    change(saved, lambda s: s.pop(key_of(s, "layers.0.block_sparse_moe.experts.w_down_scale")))
    with pytest.raises(ValueError, match=r"must hold model.layers.0.mlp.experts.w_down_scale"):
        load(saved)


def test_another_shape(saved):
    def edit(state):
        key = key_of(state, "w_down_scale")
        state[key] = state[key][:, :-1].clone()

    change(saved, edit)
    with pytest.raises((RuntimeError, ValueError), match=r"w_down_scale|mismatch|size"):
        load(saved)


@pytest.mark.parametrize(
    ("suffix", "dtype", "message"),
    [
        ("w_down", torch.int8, r"w_down must be uint8 of shape .* got int8"),
        ("w_gate_up", torch.int32, r"w_gate_up must be uint8 of shape .* got int32"),
    ],
)
def test_another_type(saved, suffix, dtype, message):
    def edit(state):
        key = key_of(state, f"experts.{suffix}")
        state[key] = state[key].to(dtype)

    change(saved, edit)
    with pytest.raises(ValueError, match=message):
        load(saved)


def test_a_config_without_banks(saved):
    config = json.loads((saved / "config.json").read_text())
    from transformers import AutoConfig

    dense = AutoConfig.for_model(
        "llama",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        vocab_size=VOCAB,
        num_attention_heads=4,
    ).to_dict()
    dense["quantization_config"] = config["quantization_config"]
    dense["architectures"] = ["LlamaForCausalLM"]
    (saved / "config.json").write_text(json.dumps(dense))
    with pytest.raises(ValueError, match=r"of a model with banks of experts, got LlamaForCausalLM"):
        load(saved)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, r"format must be a name, got None"),
        ({"format": "q4_k"}, r"format must be one of fp8, int4 g128, .*, got 'q4_k'"),
        ({"format": "int4 g16"}, r"format must be one of .*, got 'int4 g16'"),
        ({"format": ["int4"]}, r"format must be a name, got a list of 1"),
        ({"format": "int8", "x_scale": "no"}, r"x_scale must be true or false, got 'no'"),
        ({"format": "int8", "skip": 5}, r"skip must be names, got 5"),
        ({"format": "int8", "skip": [5]}, r"skip must be names, got a list of 1"),
        ({"format": "int8", "bits": 4}, r"fields must be .*, got bits"),
    ],
)
def test_a_bad_config(kwargs, message):
    with pytest.raises(ValueError, match=rf"MoeOpsConfig: {message}"):
        MoeOpsConfig.from_dict(kwargs)


def test_what_config_json_holds():
    config = MoeOpsConfig(moe_ops.Int4WeightConfig(32), skip="*.0.*")
    held = config.to_dict()
    assert held["format"] == "int4 g32"
    assert MoeOpsConfig.from_dict(held).to_dict() == held
    with pytest.raises(ValueError, match=r"MoeOpsConfig: config must be an Int8WeightConf"):
        MoeOpsConfig("int8")


def test_scales_cannot_be_found_while_loading(tmp_path):
    make("mixtral").save_pretrained(tmp_path)
    config = MoeOpsConfig(moe_ops.Int4WeightConfig(32), x_scale=True)
    with pytest.raises(ValueError, match=r"must have x_scale=False for a float checkpoint"):
        load(tmp_path, quantization_config=config)


# --- the command

runner = CliRunner()


@pytest.fixture
def checkpoint(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    folder = tmp_path / "float"
    make("mixtral", dtype=torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(
        WordLevel({"<unk>": 0} | {f"w{i}": i for i in range(1, VOCAB)}, unk_token="<unk>")
    )
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    text = tmp_path / "text.txt"
    ids = torch.randint(1, VOCAB, (300,)).tolist()
    text.write_text(" ".join(f"w{i}" for i in ids))
    return folder, text


def test_command(tmp_path, checkpoint):
    folder, text = checkpoint
    target = tmp_path / "int4"
    arguments = ["quantize", str(folder), str(target), "--group-size", "32", "--text", str(text)]
    arguments += ["--scales", "--tokens", "100", "--context", "40"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.output and "int4 g32" in result.output
    model = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert all(b.x_scale is not None and b.format == "int4 g32" for b in banks(model))
    assert (target / "tokenizer.json").is_file()
    report = json.loads((target / "moe_ops_quantization.json").read_text())
    assert report["model_bytes_after"] < report["model_bytes_before"]
    quality = report["quality"]
    assert quality["num_tokens"] == 100 and len(quality["banks"]) == 2
    assert quality["perplexity_before"] != quality["perplexity_after"]
    # The perplexity is that of the saved model on the end of the text.
    words = [int(w[1:]) for w in text.read_text().split()][-100:]
    again = quant.perplexity(model, torch.tensor(words), context=40)
    assert again == pytest.approx(quality["perplexity_after"], rel=1e-3)


def test_command_without_a_text(tmp_path, checkpoint):
    target = tmp_path / "int8"
    arguments = ["quantize", str(checkpoint[0]), str(target), "--format", "int8", "--json"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.output[result.output.index("{") :])
    assert report["format"] == "int8" and "quality" not in report
    assert [b.format for b in banks(load(target))] == ["int8", "int8"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--format", "int3"], "--format must be int4, int8 or fp8, got 'int3'"),
        (["--scales"], "--scales must come with --text"),
        (["--group-size", "64"], "must be a multiple of 64 for int4 g64, got 32"),
        (["--format", "int8", "--group-size", "64"], "--group-size must come with int4"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (
            ["--skip", "*layers.0.*", "--skip", "*.mlp"],
            "--skip must match the name of a bank, got '*.mlp'; banks are model.layers.0.mlp.exp",
        ),
    ],
)
def test_command_says_what_is_wrong(tmp_path, checkpoint, extra, message):
    target = tmp_path / "out"
    result = runner.invoke(app, ["quantize", str(checkpoint[0]), str(target), *extra])
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " ")
    assert not target.exists()


def test_command_refuses_folders(tmp_path, checkpoint):
    folder, _ = checkpoint
    result = runner.invoke(app, ["quantize", str(tmp_path), str(tmp_path / "x")])
    assert result.exit_code == 1 and "a folder with a config.json" in result.output
    result = runner.invoke(app, ["quantize", str(folder), str(folder)])
    assert result.exit_code == 1 and "another folder than SOURCE" in result.output
    target = tmp_path / "full"
    target.mkdir()
    (target / "note").write_text("keep")
    arguments = ["quantize", str(folder), str(target), "--format", "int8"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1 and "empty or new without --overwrite" in result.output
    assert runner.invoke(app, [*arguments, "--overwrite"]).exit_code == 0


# --- checkpoints of strangers, targets that cannot be written


def test_command_takes_only_what_lies_in_the_folder(tmp_path, checkpoint):
    folder, _ = checkpoint
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    result = runner.invoke(app, ["quantize", str(folder), str(tmp_path / "int4")])
    assert result.exit_code == 1
    assert "which leads to" in result.output and "outside.safetensors" in result.output
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    result = runner.invoke(app, ["quantize", str(folder), str(tmp_path / "int4")])
    assert result.exit_code == 1
    assert "which leads to" in result.output and "outside.safetensors" in result.output


@pytest.mark.parametrize("damage", ["config", "type", "tensors", "index"])
def test_command_says_what_is_damaged(tmp_path, checkpoint, damage):
    folder, _ = checkpoint
    if damage == "config":
        (folder / "config.json").write_text('{"model_type": 5}')
    elif damage == "type":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "32"}))
    elif damage == "tensors":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[:-8])
    else:
        (folder / "model.safetensors.index.json").write_text('{"weight_map": 5}')
    result = runner.invoke(app, ["quantize", str(folder), str(tmp_path / "int4")])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert f"must be a checkpoint that transformers can load, got {folder}" in result.output
    assert not (tmp_path / "int4").exists()


def test_command_replaces_all_files_or_none(tmp_path, checkpoint, monkeypatch):
    folder, _ = checkpoint
    target = tmp_path / "quantized"
    line = ["quantize", str(folder), str(target), "--format", "int8", "--overwrite"]
    assert runner.invoke(app, line).exit_code == 0
    (target / "model-00001-of-00002.safetensors").write_text("of an earlier checkpoint")
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def fails(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        result = runner.invoke(app, [*line, "--format", "int4", "--group-size", "32"])
    assert result.exit_code == 1 and "cannot be written: No space left" in result.output
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert runner.invoke(app, [*line, "--format", "int4", "--group-size", "32"]).exit_code == 0
    after = {path.name for path in target.iterdir()}
    assert after == set(before) - {"model-00001-of-00002.safetensors"}
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int4 g32"
