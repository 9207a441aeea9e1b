"""Checkpoints that others quantised, through from_pretrained, in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_ops.hf
from moe_ops.layers import QuantizedExperts

from .published_checkpoints import write

# (model type, method, zero points) -> format of the experts, and how far logits may be off: fp32
# sums, tokens that become integers of 8 bits, or fp8.
CASES = {
    ("mixtral", "gptq", True): ("int4 g64 float16 zero", 1e-4),
    ("qwen3_moe", "awq", True): ("int4 g64 float16 zero", 1e-4),
    ("qwen3_moe", "compressed-tensors", False): ("int4 g64", 0.08),
    ("qwen3_moe", "fp8", False): ("fp8", 0.08),
    ("gpt_oss", "mxfp4", False): ("mxfp4", 1e-4),
}
LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
import moe_ops.hf

torch.set_num_threads(1)
results = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="moe_ops", attn_implementation="eager", dtype=torch.float32
    )
    ids = torch.load(folder + "/ids.pt")
    with torch.no_grad():
        torch.save(model(ids).logits, folder + "/logits.pt")
    buffers = [m for m in model.modules() if isinstance(m, moe_ops.layers.QuantizedExperts)]
    results[folder] = {
        "status": moe_ops.hf.status(model),
        "bytes": sum(b.num_bytes for b in buffers),
        "meta": [n for n, t in model.state_dict().items() if t.is_meta],
    }
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What one fresh process says of all checkpoints."""
    ids = torch.randint(1, 64, (1, 6), generator=torch.Generator().manual_seed(0))
    folders, references, stored = {}, {}, {}
    for case in CASES:
        folder = tmp_path_factory.mktemp("-".join(map(str, case)))
        references[case], stored[case] = write(folder, *case)
        torch.save(ids, folder / "ids.pt")
        folders[case] = folder
    run = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, folders.values())],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    said = json.loads(run.stdout.strip().splitlines()[-1])
    return ids, {
        c: (f, said[str(f)], references[c], stored[c], run.stderr) for c, f in folders.items()
    }


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


def test_what_is_refused(tmp_path):
    write(tmp_path, "qwen3_moe", "gptq")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["bits"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"bits of a gptq checkpoint must be 4 or 8"):
        AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moe_ops")


def test_adapters_train_and_it_is_not_saved(tmp_path):
    write(tmp_path, "qwen3_moe", "awq", True)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="moe_ops", dtype=torch.float32
    )
    assert model.hf_quantizer.is_trainable
    ids = torch.randint(1, 64, (2, 8))
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad.any()
    assert any(isinstance(m, QuantizedExperts) for m in model.modules())
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")


def test_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    from .gguf_file import write_gguf

    reference, kinds = write_gguf(gguf, tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", experts_implementation="moe_ops", dtype=torch.float32
    )
    assert list(moe_ops.hf.status(model).values()) == [f"moe_ops ({kind})" for kind in kinds]
    ids = torch.randint(1, 64, (1, 6))
    with torch.no_grad():
        got, wanted = model(ids).logits, reference(ids).logits
    assert (got - wanted).norm() <= 1e-4 * wanted.norm()
    assert Path(tmp_path / "model.gguf").exists()
