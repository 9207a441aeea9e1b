"""Models in the formats of other programs: GGUF, compressed-tensors and GPTQ."""

from __future__ import annotations

import importlib.util
import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import moe_ops.hf
from moe_ops.cli.app import app
from moe_ops.hf.checkpoints.export.gguf import ARCHITECTURES
from moe_ops.quant import published, to_published
from moe_ops.quant.importance import collect_importance
from moe_ops.quant.stored_linear import StoredLinear

from . import llama_cpp_greedy

gguf = pytest.importorskip("gguf")

INT4, INT8 = moe_ops.Int4WeightConfig(64), moe_ops.Int8WeightConfig()
COMMON = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
DEEPSEEK = {
    **COMMON,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
CONFIGS = {
    "qwen3_moe": {**COMMON, **EXPERTS, "head_dim": 64, "norm_topk_prob": True},
    "qwen2_moe": {**COMMON, **EXPERTS, "shared_expert_intermediate_size": 256},
    "olmoe": {**COMMON, **EXPERTS, "num_key_value_heads": 4, "norm_topk_prob": False},
    "mixtral": {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        **COMMON,
        "head_dim": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
    "deepseek_v2": {**DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": {**DEEPSEEK, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
}
PROMPT = list(range(3, 15))


def build(model_type):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.normal_(1.0, 0.1)
            elif "embed" in name:
                p.normal_()
            else:
                p.normal_(0.0, 0.1 if p.dim() == 1 or "bias" in name else p.shape[-1] ** -0.5)
    return model


def load(folder, **options):
    options = {"dtype": torch.float32, "attn_implementation": "eager", **options}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def tensors_of(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}


def greedy(model, steps=8):
    ids = torch.tensor([PROMPT])
    return model.generate(ids, max_new_tokens=steps, do_sample=False)[0, len(PROMPT) :].tolist()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(model_type):
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(model_type)
            build(model_type).save_pretrained(made[model_type])
        return made[model_type]

    return folder


# ---------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_weight_is_written_once(folders, tmp_path, model_type):
    """A folder, which is read tensor by tensor, gives the file of the model in memory."""
    model = load(folders(model_type))
    report = moe_ops.hf.export(model, tmp_path / "model.gguf", format="gguf")
    assert report == moe_ops.hf.export(folders(model_type), tmp_path / "files.gguf", format="gguf")
    written = tensors_of(tmp_path / "model.gguf")
    assert sum(int(t.n_elements) for t in written.values()) == sum(
        t.numel() for n, t in model.state_dict().items() if "inv_freq" not in n
    )
    for name, other in tensors_of(tmp_path / "files.gguf").items():
        assert (written[name].data == other.data).all(), name


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_llama_cpp_says_the_same(folders, tmp_path, model_type):
    if llama_cpp_greedy.interpreter() is None:
        pytest.skip("needs llama-cpp-python, here or in MOE_OPS_LLAMA_PYTHON")
    source, wanted = folders(model_type), {}

    def export(name, what, **options):
        moe_ops.hf.export(what, tmp_path / name, **options)
        return tmp_path / name

    files = [export("float.gguf", source, format="gguf:f32")]
    wanted["float.gguf"] = greedy(load(source))
    for name, config in (("int4.gguf", {"dense": INT8}), ("int8.gguf", {})):
        model = load(source)
        moe_ops.quantize(model, INT4 if name == "int4.gguf" else INT8, **config)
        wanted[name] = greedy(model)
        files.append(export(name, model, format="gguf"))
    # Of others it is only known that they run: in 4 bits a token may turn to another.
    for kind in ("q8_0", "q4_0", "q4_k", "mxfp4", "bf16", "f16"):
        files.append(export(f"{kind}.gguf", source, format=f"gguf:{kind}"))
    said = llama_cpp_greedy.generate(files, PROMPT, 8)
    assert {name: said[name] for name in wanted} == wanted
    assert all(0 <= token < 96 for tokens in said.values() for token in tokens)


CODES = {
    "int8": INT8,
    "int4 g32": moe_ops.Int4WeightConfig(32),
    "int4 g128": moe_ops.Int4WeightConfig(128),
}


@pytest.mark.parametrize("label", CODES)
def test_gguf_keeps_codes(folders, tmp_path, label):
    model = load(folders("mixtral"))
    moe_ops.quantize(model, CODES[label], modules="all")
    moe_ops.hf.export(model, tmp_path / "model.gguf", format="gguf")
    written = tensors_of(tmp_path / "model.gguf")
    bank = model.model.layers[1].mlp.experts
    down = written["blk.1.ffn_down_exps.weight"]
    assert down.tensor_type.name == ("Q8_0" if label == "int8" else "Q4_0")
    meant = torch.from_numpy(gguf.dequantize(down.data, down.tensor_type))
    for e in range(4):  # Scales are rounded to float16.
        want = bank.weight_of("w_down", e)
        torch.testing.assert_close(meant[e], want, rtol=6e-4, atol=1e-6)
    # Queries go in another order, and their scales with them.
    query = written["blk.0.attn_q.weight"]
    meant = torch.from_numpy(gguf.dequantize(query.data, query.tensor_type)).view(4, 32, 2, 256)
    want = model.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(meant.transpose(1, 2).reshape(256, 256), want, rtol=6e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "Q4_0"])
def test_what_is_read_of_gguf_is_written_as_it_was(folders, tmp_path, kind):
    moe_ops.hf.export(folders("qwen3_moe"), tmp_path / "a.gguf", format=f"gguf:{kind.lower()}")
    tensors = [t for t in tensors_of(tmp_path / "a.gguf").values() if t.tensor_type.name == kind]
    assert tensors
    for tensor in tensors:
        data = torch.from_numpy(tensor.data.copy())
        assert torch.equal(to_published.to_ggml(published.from_ggml(data, kind)), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "gguf:q9"}, "format must have one of the types f32, .* got 'q9'"),
        ({"format": "gguf:q4_0", "dense": "int8"}, "dense must have one of the types"),
        ({"format": "onnx"}, "format must begin with one of gguf, compressed-tensors, gptq"),
        ({"format": "gptq:int8"}, "format must be int4, .* for gptq, got 'int8'"),
        ({"format": "gptq:int4", "dense": "int4 g32"}, "dense must be int4 or none for GPTQ"),
        ({"format": "compressed-tensors:int4 g48"}, "format must be int4, int4 g32"),
    ],
)
def test_what_is_refused(folders, tmp_path, options, message):
    with pytest.raises(ValueError, match=f"export: {message}"):
        moe_ops.hf.export(folders("qwen3_moe"), tmp_path / "target", **options)
    assert not list(tmp_path.glob("target*"))


def test_models_that_are_refused(folders, tmp_path):
    model = build("qwen3_moe")
    model.config.norm_topk_prob = False
    with pytest.raises(ValueError, match=r"norm_topk_prob of a qwen3_moe model must be True"):
        moe_ops.hf.export(model, tmp_path / "a.gguf", format="gguf")
    model.config.model_type = "granitemoe"
    with pytest.raises(ValueError, match=r"the model must be of one of qwen3_moe, .* got granite"):
        moe_ops.hf.export(model, tmp_path / "a.gguf", format="gguf")
    with pytest.raises(ValueError, match=r"experts must be one tensor each for gptq, got gpt_oss"):
        moe_ops.hf.export(folders("gpt_oss"), tmp_path / "b", format="gptq:int4")
    with pytest.raises(ValueError, match=r"source must be a model or a folder with a config.json"):
        moe_ops.hf.export(tmp_path / "nothing", tmp_path / "b", format="gguf")
    quantized = load(folders("qwen3_moe"))
    moe_ops.quantize(quantized, moe_ops.quant.Fp8WeightConfig())
    with pytest.raises(ValueError, match=r"format must name a type, as gguf:q8_0 does, .* fp8"):
        moe_ops.hf.export(quantized, tmp_path / "a.gguf", format="gguf")
    assert moe_ops.hf.export(quantized, tmp_path / "a.gguf", format="gguf:q8_0")


# -------------------------------------------------------------------------------- vocabularies


def test_a_vocabulary(folders, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    source = tmp_path / "source"
    model = load(folders("qwen3_moe"))
    model.save_pretrained(source)
    letters = {chr(ord("a") + i): i for i in range(26)} | {"ab": 26, "<end>": 27}
    words = Tokenizer(models.BPE(letters, [("a", "b")]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(source)
    moe_ops.hf.export(source, tmp_path / "a.gguf", format="gguf:q8_0")
    reader = gguf.GGUFReader(str(tmp_path / "a.gguf"))
    read = {name: field.contents() for name, field in reader.fields.items()}
    assert read["tokenizer.ggml.model"] == "gpt2" and read["tokenizer.ggml.pre"] == "gpt-2"
    tokens = read["tokenizer.ggml.tokens"]
    assert len(tokens) == 96 and tokens[26:29] == ["ab", "<end>", "[PAD28]"]
    assert read["tokenizer.ggml.merges"] == ["a b"]
    assert read["tokenizer.ggml.token_type"][27] == gguf.TokenType.CONTROL
    assert read["tokenizer.ggml.eos_token_id"] == 27
    # Another kind of tokenizer is named, and the file has none.
    file = source / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="must be byte-level BPE to be written to a GGUF file"):
        moe_ops.hf.export(source, tmp_path / "b.gguf", format="gguf:q8_0")


def test_a_vocabulary_of_sentencepiece(folders, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    source = tmp_path / "source"
    config = AutoConfig.for_model("mixtral", **CONFIGS["mixtral"] | {"vocab_size": 320})
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a rat sat there"] * 20),
        model_prefix=str(source / "tokenizer"),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    moe_ops.hf.export(source, tmp_path / "a.gguf", format="gguf:q8_0")
    reader = gguf.GGUFReader(str(tmp_path / "a.gguf"))
    read = {name: field.contents() for name, field in reader.fields.items()}
    assert read["tokenizer.ggml.model"] == "llama"
    tokens, types = read["tokenizer.ggml.tokens"], read["tokenizer.ggml.token_type"]
    assert tokens[:290] == [pieces.id_to_piece(i) for i in range(290)]
    assert tokens[290:] == [f"[PAD{i}]" for i in range(290, 320)]
    scores = torch.tensor(read["tokenizer.ggml.scores"])
    torch.testing.assert_close(
        scores[:290], torch.tensor([pieces.get_score(i) for i in range(290)])
    )
    kind = gguf.TokenType
    assert types[:3] == [kind.UNKNOWN, kind.CONTROL, kind.CONTROL]
    assert types[3:259] == [kind.BYTE] * 256 and set(types[259:290]) == {kind.NORMAL}
    assert set(types[290:]) == {kind.UNUSED} and set(scores[290:].tolist()) == {-10000.0}


def test_a_vocabulary_without_its_package(folders, tmp_path, monkeypatch):
    source = tmp_path / "source"
    load(folders("mixtral")).save_pretrained(source)
    (source / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"tokenizer.model needs the package sentencepiece"):
        moe_ops.hf.export(source, tmp_path / "a.gguf", format="gguf:q8_0")
    assert not (tmp_path / "a.gguf").exists()


# ----------------------------------------------------------------- compressed-tensors and GPTQ

PACKED = [
    ("compressed-tensors:int4", None, "int4 g128", 0.4),
    ("compressed-tensors:int4 g32", "int8", "int4 g32", 0.3),
    ("compressed-tensors:int8", None, "int8", 0.05),
    ("compressed-tensors:int8", "none", "int8", 0.05),
    ("gptq:int4 g64", None, "int4 g64", 0.4),
    ("gptq:int4", "none", "int4 g128", 0.3),
]


@pytest.mark.parametrize(("format", "dense", "experts", "most"), PACKED)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_folders_are_read_again(folders, tmp_path, model_type, format, dense, experts, most):
    source = folders(model_type)
    report = moe_ops.hf.export(source, tmp_path, format=format, dense=dense)
    assert experts in report.values()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(tmp_path, experts_implementation="moe_ops")
    found = moe_ops.hf.status(loaded)
    assert all(how.startswith(f"moe_ops ({experts}") for how in found.values()), found
    q_proj = loaded.model.layers[0].self_attn.o_proj
    assert isinstance(q_proj, StoredLinear) == (dense != "none")
    assert 0 < relative(logits(loaded), logits(load(source))) < most


@pytest.mark.parametrize("method", ["compressed-tensors", "gptq"])
def test_folders_keep_codes(folders, tmp_path, method):
    model = load(folders("qwen3_moe"))
    moe_ops.quantize(model, INT4, modules="all")
    moe_ops.hf.export(model, tmp_path, format=f"{method}:int4 g32")
    loaded = load(tmp_path, experts_implementation="moe_ops")
    for name in ("mlp.experts", "self_attn.q_proj"):
        ours = model.model.layers[0].get_submodule(name)
        theirs = loaded.model.layers[0].get_submodule(name)
        pairs = [(getattr(ours, "w_down", None), getattr(theirs, "w_down", None))]
        pairs = pairs if name == "mlp.experts" else [(ours.q, theirs.codes)]
        assert all(torch.equal(a, b) for a, b in pairs)
    # Scales of compressed-tensors stay float32, those of GPTQ become float16.
    bank, exact = loaded.model.layers[1].mlp.experts, method == "compressed-tensors"
    want = model.model.layers[1].mlp.experts.weight_of("w_gate_up", 2)
    got = bank.weight_of("w_gate_up", 2)
    torch.testing.assert_close(got, want, rtol=0 if exact else 6e-4, atol=0 if exact else 1e-6)


def test_files_of_many_shards(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("moe_ops.hf.checkpoints.export.packed._SHARD_BYTES", 2**18)
    moe_ops.hf.export(folders("qwen3_moe"), tmp_path, format="compressed-tensors:int4")
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    held = {name: file for file in files for name in load_file(tmp_path / file)}
    assert index["weight_map"] == held
    assert load(tmp_path, experts_implementation="moe_ops")


def test_the_package_compressed_tensors_reads_it(folders, tmp_path):
    if importlib.util.find_spec("compressed_tensors") is None:
        pytest.skip("needs the package compressed-tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    moe_ops.hf.export(folders("qwen3_moe"), tmp_path, format="compressed-tensors:int4")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    held = load_file(tmp_path / "model.safetensors")
    module = "model.layers.0.mlp.experts.0.down_proj"
    parts = {n.removeprefix(f"{module}."): t for n, t in held.items() if n.startswith(module)}
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    weight = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    ours = load(tmp_path, experts_implementation="moe_ops").model.layers[0].mlp.experts
    torch.testing.assert_close(weight.float(), ours.weight_of("w_down", 0))


# ---------------------------------------------------------------------------- importance


def test_importance_lowers_the_error_that_counts(folders, tmp_path):
    model = load(folders("qwen3_moe"))
    batches = [torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))]
    importance = collect_importance(model, batches)
    bank = importance.experts["model.layers.0.mlp.experts"]
    assert bank["gate"].shape == (4, 256) and bank["gate"] is bank["up"]
    q_proj = importance.linears["model.layers.0.self_attn.q_proj"]
    for kind, ggml in (("q4_0", "Q4_0"), ("q4_k", "Q4_K")):
        errors = []
        for calibration in (None, importance):
            path = tmp_path / f"{kind}.gguf"
            moe_ops.hf.export(model, path, format=f"gguf:{kind}", calibration=calibration)
            tensor = tensors_of(path)["blk.0.attn_q.weight"]
            assert tensor.tensor_type.name == ggml
            meant = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
            error = meant - model.model.layers[0].self_attn.q_proj.weight
            errors.append(float((error.double().square() * q_proj).sum()))
        assert errors[1] < (0.99 if kind == "q4_k" else 0.92) * errors[0]


def test_importance_is_the_sum_of_squares(folders):
    """The sums equal those of the recorded inputs of the first layer's experts."""
    model = load(folders("mixtral"))
    ids = torch.tensor([PROMPT])
    seen = {}
    block = model.model.layers[0].mlp
    handle = block.experts.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(zip("xiw", args, strict=False)), with_kwargs=True
    )
    sums = collect_importance(model, [ids]).experts["model.layers.0.mlp.experts"]
    handle.remove()
    for e in range(4):
        weight = torch.where(seen["i"] == e, seen["w"], 0).sum(-1, keepdim=True)
        want = (seen["x"] * weight).double().square().sum(0)
        torch.testing.assert_close(sums["gate"][e], want, rtol=1e-4, atol=1e-9)
        gate_up = seen["x"] @ block.experts.gate_up_proj[e].T
        h = torch.nn.functional.silu(gate_up[:, :256]) * gate_up[:, 256:]
        want = (h * weight).double().square().sum(0)
        torch.testing.assert_close(sums["down"][e], want, rtol=1e-4, atol=1e-9)


# ------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def pruned(folders, tmp_path_factory):
    """A folder written by `moe-ops prune`, with a tokenizer of words."""
    from rich.console import Console
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from moe_ops.cli.prune import PruneOptions, run

    folder = tmp_path_factory.mktemp("pruned")
    load(folders("qwen3_moe")).save_pretrained(folder / "whole")
    vocabulary = {"<unk>": 0} | {f"w{i}": i for i in range(1, 96)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(
        folder / "whole"
    )
    ids = torch.randint(1, 96, (300,), generator=torch.Generator().manual_seed(0))
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in ids.tolist()))
    options = PruneOptions(
        folder / "whole", folder / "half", folder / "text.txt", 0.5, tokens=100, context=20
    )
    run(options, Console(quiet=True))
    return folder / "half"


def test_a_pruned_folder_as_gguf(pruned, tmp_path):
    with pytest.warns(UserWarning, match="must be byte-level BPE"):
        moe_ops.hf.export(pruned, tmp_path / "a.gguf", format="gguf:q8_0")
    loaded = load(tmp_path, gguf_file="a.gguf", experts_implementation="moe_ops")
    assert loaded.config.num_experts == 2
    assert 0 < relative(logits(loaded), logits(load(pruned))) < 0.05


def test_a_pruned_folder_as_compressed_tensors(pruned, tmp_path):
    moe_ops.hf.export(pruned, tmp_path, format="compressed-tensors:int8")
    loaded = load(tmp_path, experts_implementation="moe_ops")
    assert loaded.config.num_experts == 2
    assert 0 < relative(logits(loaded), logits(load(pruned))) < 0.05


def test_command(folders, tmp_path):
    def invoke(*words):
        return CliRunner().invoke(app, ["export", str(folders("qwen3_moe")), *map(str, words)])

    result = invoke(tmp_path / "a.gguf", "--format", "gguf:q4_k", "--dense", "q8_0", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.output[result.output.index("{") :])
    assert report["bytes"] == (tmp_path / "a.gguf").stat().st_size
    assert report["tensors"]["blk.0.ffn_up_exps.weight"] == "Q4_K"
    assert report["tensors"]["blk.0.attn_q.weight"] == "Q8_0"
    result = invoke(tmp_path / "a.gguf", "--format", "gguf:q4_0")
    assert result.exit_code == 1 and "must be new without --overwrite" in result.output
    result = invoke(tmp_path / "out", "--format", "compressed-tensors:int4", "--dense", "int8")
    assert result.exit_code == 0, result.output
    assert re.search(
        r"MiB in .* s; tensors by type: float32 \d+, int4 g128 24, int8 8", result.output
    )
    result = invoke(tmp_path / "b", "--format", "gguf:q4_0", "--text", "nowhere.txt")
    assert result.exit_code == 1 and "--text must be a file" in result.output
