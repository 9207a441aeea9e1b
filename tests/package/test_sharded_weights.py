"""Tests that what reads whole weights refuses sharded ones in one sentence that names the
parameter.

The mesh of one process is set up in a process of its own; it takes all cases, and a test each reads
what happened to one.
"""

from __future__ import annotations

import importlib.util
import json

import pytest
from tests.helpers.fresh_python import run_python

pytestmark = pytest.mark.cpu_only

CODE = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import moe_ops
from moe_ops import quant
from moe_ops.layers import AttentionExperts, MoE, MoEConfig, TopKRouter
from moe_ops.memory import use_huge_pages

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
said = {}

def record(case, call):
    try:
        call()
        said[case] = "no error"
    except Exception as error:
        said[case] = f"{type(error).__name__}: {error}"

def shard(modules):
    for owner in modules:
        for name, p in list(owner.named_parameters(recurse=False)):
            sharded = distribute_tensor(p.detach(), mesh, [Shard(0)])
            owner.register_parameter(name, torch.nn.Parameter(sharded))

model = torch.nn.Sequential(MoE.from_config(MoEConfig(32, 32, 4, 2))).eval()
fully_shard(model[0], mesh=mesh)
experts, router = model[0].experts, model[0].router
record("quantize", lambda: moe_ops.quantize(model, moe_ops.Int8WeightConfig()))
record("pack_weights", lambda: moe_ops.pack_weights(model))
record("use_huge_pages", lambda: use_huge_pages(model))
record("use_huge_pages of a tensor", lambda: use_huge_pages(experts.w_down))
record("collect_calibration", lambda: quant.collect_calibration(model, [torch.randn(3, 32)]))
record("select", lambda: experts.select([0, 1]))
record("append", lambda: experts.append(1))
record("split", lambda: experts.split([0]))
record("merge", lambda: experts.merge([[0, 1], [2, 3]]))
record("router", lambda: router.select([0, 1]))
attention = AttentionExperts(TopKRouter(32, 4, 2), 1, 8)
shard([attention])
record("attention", lambda: attention.select([0, 1]))
if "hf" in sys.argv:
    from tests.hf.models import build
    import moe_ops.hf

    for name in ("mixtral", "dbrx", "jetmoe", "llama4_text"):
        model = build(name)
        shard(model.modules())
        moe_ops.hf.enable(model)
        record(f"quantize {name}", lambda: moe_ops.quantize(model, moe_ops.Int8WeightConfig()))
        if name != "dbrx":
            record(f"pack_weights {name}", lambda: moe_ops.pack_weights(model))
print(json.dumps(said))
dist.destroy_process_group()
"""

FIRST = {
    "mixtral": "model.layers.0.mlp.experts.gate_up_proj",
    "dbrx": "transformer.blocks.0.ffn.experts.mlp.w1",
    "jetmoe": "model.layers.0.mlp.input_linear.weight",
    "llama4_text": "model.layers.1.feed_forward.experts.gate_up_proj",
}
CASES = {
    "quantize": "quantize: 0.experts.w_gate_up",
    "pack_weights": "pack_weights: 0.experts.w_gate_up",
    "use_huge_pages": "use_huge_pages: 0.router.weight",
    "use_huge_pages of a tensor": "use_huge_pages: the tensor",
    "collect_calibration": "collect_calibration: 0.experts.w_gate_up",
    **dict.fromkeys(("select", "append", "split", "merge"), "Experts: w_gate_up"),
    "router": "Router: weight",
    "attention": "AttentionExperts: w_query",
}
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
if HAS_TRANSFORMERS:
    CASES |= {f"quantize {m}": f"quantize: {name}" for m, name in FIRST.items()}
    CASES |= {
        f"pack_weights {m}": f"pack_weights: {name}" for m, name in FIRST.items() if m != "dbrx"
    }


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    arguments = ["hf"] if HAS_TRANSFORMERS else []
    result = run_python("-c", CODE, *arguments, transformers=HAS_TRANSFORMERS)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_sharded_weights_are_refused_by_name(said, case):
    start = f"ValueError: {CASES[case]} must be a plain tensor, got a DTensor (Shard(dim=0) on a "
    assert said[case].startswith(start), said[case]
    assert said[case].endswith(".") and said[case].count("\n") == 0


def test_every_case_ran(said):
    assert said.keys() == CASES.keys()
