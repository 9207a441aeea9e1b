"""Checkpoints with quantized experts, saved here and loaded in processes of their own: what an
earlier call in a process has cached can hide what loading lacks."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from tests.helpers.fresh_python import run_python
from tests.helpers.quantized import weight_config
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moe_ops.hf
from moe_ops.cli.app import app

from .models import CONFIGS, build, tokens

MODEL_TYPES = ("qwen3_moe", "mixtral", "gpt_oss", "olmoe", "deepseek_v3")
FORMATS = {"int8": (None, torch.float32), "int4": (32, torch.bfloat16)}
SIMULATED = "tests.cuda_torch.simulated"
CASES = [(m, f) for m in MODEL_TYPES for f in FORMATS]


def names_of(model_type: str) -> dict[str, str]:
    """Returns the names that moe_ops.hf registers, except the attention of gpt-oss, which has
    sinks."""
    attention = "eager" if model_type == "gpt_oss" else "moe_ops"
    return {"experts_implementation": "moe_ops", "attn_implementation": attention}


LOAD = """
import importlib, json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM

folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
for name in options["modules"]:
    importlib.import_module(name)
torch.set_default_device(options["device"])
if options["lines"]:
    exec(options["lines"])  # As a user types them, before anything else of moe_ops.
    model(torch.tensor([[1, 2, 3]]))
if options["import"]:
    import moe_ops.hf

ids = torch.load(folder / "ids.pt")
said = {}
for name in options["names"]:
    try:
        kwargs = {"attn_implementation": "eager", **options["kwargs"]}
        source, _, format = name.partition(" as ")
        if format:
            kwargs["quantization_config"] = moe_ops.hf.MoeOpsConfig(
                moe_ops.quant.config.config_named("", format)
            )
            name = source.replace("float", format)
        model = AutoModelForCausalLM.from_pretrained(folder / source, **kwargs)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()  # As where they were saved.
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        same = torch.equal(logits, torch.load(folder / name / "logits.pt"))
        said[name] = "same bits" if same else "other numbers"
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    ids = tokens()
    torch.save(ids, folder / "ids.pt")
    for model_type, format in CASES:
        sizes = ("intermediate_size", "moe_intermediate_size")
        wide = {k: 32 for k in sizes if k in CONFIGS[model_type]}
        float_folder = folder / f"{model_type}-float"
        if not float_folder.exists():
            build(model_type, **wide).save_pretrained(float_folder)
            model = AutoModelForCausalLM.from_pretrained(float_folder, **names_of(model_type))
            save_logits(model, ids, float_folder)
        group_size, dtype = FORMATS[format]
        model = AutoModelForCausalLM.from_pretrained(
            float_folder, attn_implementation="eager", dtype=dtype
        )
        moe_ops.quantize(model, weight_config(format, group_size))
        target = folder / f"{model_type}-{format}"
        model.save_pretrained(target)
        save_logits(model, ids, target)
    return folder


def save_logits(model, ids: torch.Tensor, folder: Path) -> None:
    # Of a mapped file, tensors begin anywhere, and torch's own products differ then.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    with torch.no_grad():
        torch.save(model(input_ids=ids, use_cache=False).logits, folder / "logits.pt")


def load_elsewhere(folder: Path, **changes) -> dict[str, str]:
    options = {
        "names": [f"{m}-{f}" for m, f in CASES],
        "kwargs": {},
        "import": True,
        "lines": "",
        "device": str(torch.get_default_device()),
        # What gives torch's kernels to a CUDA build without a card.
        "modules": [name for name in (SIMULATED,) if name in sys.modules],
    }
    arguments = (str(folder), json.dumps(options | changes))
    result = run_python("-c", LOAD, *arguments, timeout=300, transformers=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def printed(saved) -> str:
    """The lines that `moe-ops quantize` prints to load what it has written."""
    arguments = [
        "quantize",
        str(saved / "mixtral-float"),
        str(saved / "command"),
        "--format",
        "int8",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    _, _, after = result.output.partition("Load it with\n")
    lines = [line.removeprefix("  ") for line in after.splitlines() if line.startswith("  ")]
    assert lines[0] == "import moe_ops.hf" and "from_pretrained" in lines[-1]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def said(saved, printed) -> dict[str, str]:
    return load_elsewhere(saved, lines=printed)


@pytest.mark.parametrize("name", [f"{m}-{f}" for m, f in CASES])
def test_same_bits_in_another_process(said, name):
    assert said[name] == "same bits"


def test_refused_without_the_import(saved):
    """The experts would be random numbers, and only a report would say so."""
    names = ["mixtral-int8", "gpt_oss-int4"]
    for name, message in load_elsewhere(saved, **{"import": False, "names": names}).items():
        assert message.startswith('ValueError: Specified `experts_implementation="moe_ops"`'), name


def test_registered_names(saved):
    names = [f"{m}-float" for m in MODEL_TYPES if m != "gpt_oss"]
    kwargs = names_of(MODEL_TYPES[0])
    assert load_elsewhere(saved, names=names, kwargs=kwargs) == dict.fromkeys(names, "same bits")


def test_quantized_while_loading(saved):
    said = load_elsewhere(saved, names=["mixtral-float as int8"])
    assert said == {"mixtral-int8": "same bits"}


IN_MEMORY = ("lm_head", *(f"model.{p}" for p in ("embed_tokens", "rotary_emb", "norm", "layers.0")))


def on_disk(folder: Path) -> dict[str, object]:
    """Returns the arguments that put the second layer on a disk, and the rest where the tests
    run."""
    device = str(torch.get_default_device())
    return {
        "device_map": {**dict.fromkeys(IN_MEMORY, device), "model.layers.1": "disk"},
        "offload_buffers": True,  # Quantized weights are buffers.
        "offload_folder": str(folder),
    }


@pytest.mark.parametrize("where", ["auto", "disk"])
def test_device_map(saved, tmp_path, where):
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("device_map needs accelerate, which is not installed.")
    names = ["qwen3_moe-int4", "gpt_oss-int8"]
    kwargs = {"device_map": "auto"} if where == "auto" else on_disk(tmp_path)
    said = load_elsewhere(saved, names=names, kwargs=kwargs)
    assert said == dict.fromkeys(names, "same bits")
