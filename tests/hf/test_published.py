"""Checkpoints that others quantized, through from_pretrained, in a fresh process."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from types import ModuleType

import pytest
import torch
from tests.helpers.fresh_python import run_python

import moe_ops.hf
from moe_ops.quant import QuantizedExperts

from . import published_checkpoints
from .published_checkpoints import load, write

# (model type, method, zero points) -> format of the experts, and how far logits may be off: fp32
# sums, tokens that become integers of 8 bits, or fp8.
CASES = {
    ("mixtral", "gptq", True): ("int4 g64 float16 zero", 0.08),
    ("qwen3_moe", "awq", True): ("int4 g64 float16 zero", 0.08),
    ("qwen3_moe", "compressed-tensors", False): ("int4 g64", 0.08),
    ("qwen3_moe", "fp8", False): ("fp8", 0.08),
    ("qwen3_moe", "fp8-channel", False): ("e4m3", 1e-4),
    ("qwen3_moe", "fp8-block", False): ("fp8", 0.08),
    ("mixtral", "fp8-tensor", False): ("e4m3", 1e-4),
    ("mixtral", "autofp8", False): ("e4m3", 1e-4),
    ("qwen3_moe", "packed-int8", False): ("int8 g64 bfloat16", 0.02),
    ("gpt_oss", "mxfp4", False): ("mxfp4", 0.08),
    ("qwen3_moe", "nvfp4", False): ("nvfp4", 0.08),
    ("mixtral", "modelopt", False): ("nvfp4", 0.08),
}
LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
import moe_ops.hf

torch.set_num_threads(1)
results = {}
for folder in sys.argv[1:]:
    asked = {} if folder.endswith("again") else {"experts_implementation": "moe_ops"}
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, **asked
    )
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # Of a mapped file, they begin anywhere.
    ids = torch.load(folder.removesuffix("/again") + "/ids.pt")
    with torch.no_grad():
        torch.save(model(ids).logits, folder + "/logits.pt")
    buffers = [m for m in model.modules() if isinstance(m, moe_ops.quant.QuantizedExperts)]
    results[folder] = {
        "status": moe_ops.hf.status(model),
        "bytes": sum(b.num_bytes for b in buffers),
        "meta": [n for n, t in model.state_dict().items() if t.is_meta],
    }
print(json.dumps(results))
"""


def in_a_fresh_process(folders):
    """Returns what a process without any of this one's state says of checkpoints, and its
    warnings."""
    run = run_python("-c", LOAD, *map(str, folders), transformers=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.strip().splitlines()[-1]), run.stderr


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Returns what one fresh process says of all checkpoints, and of what was saved of each
    here."""
    ids = torch.randint(1, 64, (1, 6), generator=torch.Generator().manual_seed(0))
    folders, references, stored = {}, {}, {}
    for case in CASES:
        folder = tmp_path_factory.mktemp("-".join(map(str, case)))
        references[case], stored[case] = write(folder, *case)
        torch.save(ids, folder / "ids.pt")
        load(folder).save_pretrained(folder / "again")
        folders[case] = folder
    both = [folder / name for folder in folders.values() for name in ("", "again")]
    said, stderr = in_a_fresh_process(both)
    return ids, {c: (f, said[str(f)], references[c], stored[c], stderr) for c, f in folders.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{'zero' * c[2]}")
def test_a_fresh_process_reads_it(case, loaded):
    ids, results = loaded
    folder, said, reference, stored, stderr = results[case]
    format, tolerance = CASES[case]
    assert set(said["status"].values()) == {f"moe_ops ({format})"} and not said["meta"]
    with torch.no_grad():
        wanted = reference(ids).logits
    got = torch.load(folder / "logits.pt")
    assert (got - wanted).norm() <= tolerance * wanted.norm()
    # As stored: scales of symmetric groups of 64 become float32, indices of groups go.
    experts = {n: t for n, t in stored.items() if ".experts." in n}
    on_disk = sum(t.nbytes for n, t in experts.items() if not n.endswith(("g_idx", "_shape")))
    assert said["bytes"] <= 1.06 * on_disk
    assert "newly initialized" not in stderr and "UNEXPECTED" not in stderr


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{'zero' * c[2]}")
def test_saved_and_read_again(case, loaded):
    _, results = loaded
    folder, said, *_ = results[case]
    config = json.loads((folder / "again" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "moe_ops"
    kinds = {name: text.removeprefix("moe_ops (")[:-1] for name, text in said["status"].items()}
    assert config["layers"].items() >= kinds.items()
    dense = [name for name in config["layers"] if name.endswith("proj")]
    assert len(dense) == (0 if case[1] == "mxfp4" else 4)
    logits = [torch.load(path / "logits.pt") for path in (folder, folder / "again")]
    assert torch.equal(*logits)


def test_what_is_refused(tmp_path):
    write(tmp_path, "qwen3_moe", "gptq")
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["bits"] = 3
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"bits of a gptq checkpoint must be 4 or 8"):
        load(tmp_path)
    for layers, message in (
        ({"model.norm": "int8"}, "must be banks of experts and dense layers"),
        ({"model.layers.0.mlp.experts": "int4 h64"}, "group_size must be given for int4"),
        ([3], "layers must be formats by name"),
    ):
        config["quantization_config"] = {"quant_method": "moe_ops", "layers": layers}
        file.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_adapters_train_and_do_not_merge(tmp_path):
    write(tmp_path, "qwen3_moe", "awq", True)
    model = load(tmp_path)
    assert model.hf_quantizer.is_trainable
    ids = torch.randint(1, 64, (2, 8))
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad.any()
    assert any(isinstance(m, QuantizedExperts) for m in model.modules())
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert type(weight + 1) is torch.Tensor
    with pytest.raises(ValueError, match="merge adapters into the float model"):
        weight.data += 1


def auto_gptq(monkeypatch):
    """AutoGPTQ's quantizer and its layer, which packs what that finds. The package itself imports
    models of a transformers of long ago."""
    spec = importlib.util.find_spec("auto_gptq")
    if spec is None:
        pytest.skip("auto_gptq is not installed (pip install --no-deps auto-gptq).")
    package = ModuleType("auto_gptq")
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "auto_gptq", package)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    layers = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda_old")
    return importlib.import_module("auto_gptq.quantization.gptq").GPTQ, layers.QuantLinear


@pytest.mark.parametrize("zeros", [False, True])
def test_a_file_of_auto_gptq(zeros, tmp_path, monkeypatch):
    quantizer, layer = auto_gptq(monkeypatch)

    def quantize(_, weight, zeros):
        rows, depth = weight.shape
        linear = torch.nn.Linear(depth, rows, bias=False).requires_grad_(False)
        linear.weight.copy_(weight)
        gptq = quantizer(linear)
        gptq.quantizer.configure(4, perchannel=True, sym=not zeros)
        x = torch.randn(1, 256, depth)
        gptq.add_batch(x, linear(x))
        found = gptq.fasterquant(group_size=published_checkpoints.GROUP)
        meaning = linear.weight.clone()
        packed = layer(4, published_checkpoints.GROUP, depth, rows, bias=False)
        packed.pack(linear.half(), *found)
        return packed.state_dict(), meaning

    monkeypatch.setattr(published_checkpoints, "quantize", quantize)
    reference, _ = write(tmp_path, "qwen3_moe", "gptq", zeros)
    model = load(tmp_path)
    kind = "int4 g64 float16 zero" if zeros else "int4 g64"
    assert set(moe_ops.hf.status(model).values()) == {f"moe_ops ({kind})"}
    ids = torch.randint(1, 64, (1, 6))
    with torch.no_grad():
        got, wanted = model(ids).logits, reference(ids).logits
    # Scales are rounded to 16 bits, and tokens to 8 without zero points.
    assert (got - wanted).norm() <= (2e-3 if zeros else 0.08) * wanted.norm()


def test_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    from .gguf_file import write_gguf

    reference, kinds = write_gguf(gguf, tmp_path / "model.gguf")
    model = load(tmp_path, gguf_file="model.gguf")
    assert list(moe_ops.hf.status(model).values()) == [f"moe_ops ({kind})" for kind in kinds]
    ids = torch.randint(1, 64, (1, 6))
    with torch.no_grad():
        got, wanted = model(ids).logits, reference(ids).logits
    assert (got - wanted).norm() <= 1e-4 * wanted.norm()
    again = tmp_path / "again"
    model.save_pretrained(again)
    torch.save(ids, tmp_path / "ids.pt")
    said, _ = in_a_fresh_process([again])
    assert said[str(again)]["status"] == moe_ops.hf.status(model)
    assert (torch.load(again / "logits.pt") - got).norm() <= 1e-6 * got.norm()
