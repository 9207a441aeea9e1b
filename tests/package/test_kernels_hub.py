"""The repository for the `kernels` package of Hugging Face needs no package but torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from release import kernels_hub

import moe_ops

# Imports the folder as `kernels` does, by its file and under another name.
LOAD = """
import importlib.util, sys
for name in list(sys.modules):
    assert not name.startswith("moe_ops"), name
sys.meta_path.insert(0, type("No", (), {"find_spec": staticmethod(
    lambda name, *_: (_ for _ in ()).throw(ImportError(name)) if name == "moe_ops" else None)}))
folder = sys.argv[1]
spec = importlib.util.spec_from_file_location("hub_build", folder + "/__init__.py")
module = sys.modules["hub_build"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import torch
x = torch.randn(5, 16)
layer = module.layers.MoE.from_config(module.layers.MoEConfig(16, 32, 4, 2))
reference = module.reference.topk_router(torch.randn(5, 4), 2)
module.quantize(layer, module.Int8WeightConfig())
assert layer(x).shape == (5, 16) and reference[0].shape == (5, 2)
assert not [name for name in sys.modules if name.partition(".")[0] == "moe_ops"]
print(module.layers.MoE.__module__)
"""


def test_repository_needs_only_torch(tmp_path):
    library = Path(moe_ops.__file__).with_name("libmoe_ops.so")
    build = kernels_hub.write_repository(tmp_path, library, "moe_ops", "0.1.0")
    facts = json.loads((build / "metadata.json").read_text())
    assert facts["python-depends"] == [] and build.name.startswith("torch-stable-abi210-cpu-")
    command = [sys.executable, "-c", LOAD, str(build)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "hub_build.layers.moe"


def test_ops_move_to_their_namespace():
    for name, path in kernels_hub.modules_of_package().items():
        depth = len(path.relative_to(kernels_hub.PACKAGE).parts) - 1
        text = kernels_hub.rewritten(path.read_text(), depth, "moe_ops_1a2b")
        assert "torch.ops.moe_ops." not in text and '"moe_ops::' not in text, name
    with pytest.raises(ValueError, match=r"must be `from moe_ops... import ...`, got moe_ops.x"):
        kernels_hub.rewritten("import moe_ops.x\n", 0, "n")
