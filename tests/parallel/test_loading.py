"""Checkpoints that transformers wrote: every rank reads its experts and nothing else of them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from moe_ops.layers import Experts
from moe_ops.parallel import (
    ExpertPlacement,
    fully_shard_moe,
    init_moe_meshes,
    load_sharded_experts,
    shard_experts,
)

transformers = pytest.importorskip("transformers", minversion="5.7")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.cpu_only

# Of tests/hf/models.py: experts one by one (twice), together as [in, out], together as [out, in].
KINDS = {
    "qwen3_moe": {"activation": "swiglu"},
    "mixtral": {"activation": "swiglu"},
    "gpt_oss": {"activation": "swiglu_oai", "bias": True, "interleaved": True},
    "granitemoe": {"activation": "swiglu"},
}


def save(kind, folder, **options):
    """A tiny model, its checkpoint, and its experts as a layer of ours has them."""
    from tests.hf.models import build

    torch.manual_seed(0)
    model = build(kind).float()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    model.save_pretrained(folder, **options)
    return model


def stored_prefix(folder):
    """Returns what the keys of the experts of the last layer begin with, and the layer's number."""
    keys = set()
    for path in folder.glob("*.safetensors"):
        keys |= safetensors_torch.load_file(path).keys()
    found = [
        re.match(r"(.*layers\.(\d+)\..*?)\.?(?:\d+\.(?:down_proj|w2)|down_proj|output_linear)", k)
        for k in sorted(keys)
        if "expert" in k or "block_sparse_moe" in k
    ]
    return [m for m in found if m][-1].groups()


class Recorder:
    """safe_open, with a note of what is read."""

    def __init__(self, opened, reads):
        self.opened, self.reads = opened, reads

    def keys(self):
        return self.opened.keys()

    def get_slice(self, key):
        return RecordedSlice(self.opened.get_slice(key), key, self.reads)


class RecordedSlice:
    def __init__(self, found, key, reads):
        self.found, self.key, self.reads = found, key, reads
        self.get_shape, self.get_dtype = found.get_shape, found.get_dtype

    def __getitem__(self, index):
        rows = self.found[index]
        self.reads.append((self.key, tuple(rows.shape)))
        return rows


def load(rank, folder, prefix, sizes, options, placement=None):
    import safetensors

    reads, true_open = [], safetensors.safe_open
    safetensors.safe_open = lambda path, **how: Recorder(true_open(path, **how), reads)
    try:
        bank = Experts(*sizes, device="meta", **options)
        model = nn.ModuleDict({"block": nn.ModuleDict({"experts": bank})})
        shard_experts(model, init_moe_meshes(2).ep, placement=placement)
        model.to_empty(device="cpu")
        load_sharded_experts(model, folder, {"block.experts": prefix})
        local = {name: p.detach().to_local() for name, p in bank.named_parameters()}
        return local, reads
    finally:
        safetensors.safe_open = true_open


def experts_of(model, index):
    """w_gate_up, w_down and biases of a layer, [E, out, in]."""
    block = model.model.layers[int(index)]
    for module in block.modules():
        if hasattr(module, "gate_up_proj"):
            up, down = module.gate_up_proj, module.down_proj
            if hasattr(module, "gate_up_proj_bias"):  # gpt-oss
                biases = (module.gate_up_proj_bias, module.down_proj_bias)
                return up.transpose(1, 2), down.transpose(1, 2), *biases
            return up, down
    moe = block.block_sparse_moe
    return moe.input_linear.weight, moe.output_linear.weight


@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_reads_its_experts(processes, tmp_path, kind):
    model = save(kind, tmp_path)
    prefix, index = stored_prefix(tmp_path)
    tensors = [t.detach() for t in experts_of(model, index)]
    wanted = dict(zip(("w_gate_up", "w_down", "b_gate_up", "b_down"), tensors, strict=False))
    experts, hidden, inner = wanted["w_down"].shape
    results = processes.run(load, tmp_path, prefix, (experts, hidden, inner), KINDS[kind], world=2)
    for rank, (local, reads) in enumerate(results):
        assert local.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(local[name], tensor.chunk(2)[rank]), name
        read = sum(torch.Size(shape).numel() for _, shape in reads)
        assert read == sum(t.numel() for t in wanted.values()) // 2
        assert all(key.startswith(prefix) for key, _ in reads)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_each_rank_reads_what_its_placement_says(processes, tmp_path, kind):
    model = save(kind, tmp_path)
    prefix, index = stored_prefix(tmp_path)
    wanted = [t.detach() for t in experts_of(model, index)]
    sizes = experts, *_ = wanted[1].shape
    placement = ExpertPlacement(experts, 2, (*range(experts)[::-1], experts - 1, experts - 2))
    args = (tmp_path, prefix, sizes, KINDS[kind], placement)
    for rank, (local, _) in enumerate(processes.run(load, *args, world=2)):
        mine = list(placement.local(rank))
        assert torch.equal(local["w_gate_up"], wanted[0][mine])
        assert torch.equal(local["w_down"], wanted[1][mine])


def test_files_with_an_index_and_banks_that_are_whole(tmp_path):
    model = save("qwen3_moe", tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    prefix, index = stored_prefix(tmp_path)
    wanted = [t.detach() for t in experts_of(model, index)]
    sizes = wanted[1].shape
    bank = Experts(*sizes, dtype=torch.bfloat16)
    load_sharded_experts(bank, tmp_path, prefix)
    assert torch.equal(bank.w_gate_up.detach(), wanted[0].bfloat16())
    assert torch.equal(bank.w_down.detach(), wanted[1].bfloat16())
    layers = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": Experts(*sizes)})})
    load_sharded_experts(layers, tmp_path, lambda name: prefix.replace("mlp.experts", name))
    assert torch.equal(layers["mlp"]["experts"].w_down.detach(), wanted[1])


def test_bad_checkpoints(processes, tmp_path, bad_input):
    said = processes.run(load_after_fsdp, tmp_path, world=2)[0]
    assert said.startswith(
        "load_sharded_experts: the bank must be whole or sharded by shard_experts alone"
    )
    bank = Experts(4, 8, 4)
    words = r"load_sharded_experts: .* must hold safetensors files"
    with pytest.raises(FileNotFoundError, match=words):
        load_sharded_experts(bank, tmp_path / "none", "experts")
    with bad_input("load_sharded_experts", "prefixes", "'layer'"):
        load_sharded_experts(bank, tmp_path, {"layer": "experts"})
    with bad_input("load_sharded_experts", "prefixes", "none"):
        load_sharded_experts(nn.Linear(2, 2), tmp_path, lambda name: name)
    with bad_input("load_sharded_experts", "'other'", "no key"):
        load_sharded_experts(bank, tmp_path, "other")
    with bad_input("load_sharded_experts", "experts.down_proj must be [4, 8, 4]", "[4, 8, 8]"):
        load_sharded_experts(bank, tmp_path, "experts")
    with bad_input("load_sharded_experts", "codes.gate_up_proj", "I8"):
        load_sharded_experts(bank, tmp_path, "codes")
    with bad_input("load_sharded_experts", "lone.gate_up_proj", "no such tensor"):
        load_sharded_experts(bank, tmp_path, "lone")
    with bad_input("load_sharded_experts", "gate_up_proj_bias", "no such tensor"):
        load_sharded_experts(Experts(4, 8, 4, bias=True), tmp_path, "good")
    load_sharded_experts(bank, tmp_path, "good")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x.down_proj": "../model.safetensors", "x.gate_up_proj": 3}})
    )
    with bad_input("load_sharded_experts", "x.gate_up_proj", "not a file name"):
        load_sharded_experts(bank, tmp_path, "x")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(("x.down_proj", "x.gate_up_proj"), "../x")})
    )
    with bad_input("load_sharded_experts", "x.gate_up_proj", "leads to"):
        load_sharded_experts(bank, tmp_path, "x")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with bad_input("load_sharded_experts", "weight_map", "3"):
        load_sharded_experts(bank, tmp_path, "x")


def load_after_fsdp(rank, folder):
    if rank == 0:
        tensors = {
            "experts.gate_up_proj": torch.zeros(4, 8, 8),
            "experts.down_proj": torch.zeros(4, 8, 8),
            "codes.gate_up_proj": torch.zeros(4, 8, 8, dtype=torch.int8),
            "codes.down_proj": torch.zeros(4, 8, 4, dtype=torch.int8),
            "lone.down_proj": torch.zeros(4, 8, 4),
            "good.gate_up_proj": torch.zeros(4, 8, 8),
            "good.down_proj": torch.zeros(4, 4, 8),
        }
        safetensors_torch.save_file(tensors, folder / "model.safetensors")
    torch.distributed.barrier()
    meshes = init_moe_meshes(2)
    bank = shard_experts(Experts(4, 8, 4), meshes.ep)
    fully_shard_moe(bank, meshes.dp, meshes.efsdp)
    with pytest.raises(ValueError) as caught:
        load_sharded_experts(bank, folder, "good")
    return str(caught.value)
