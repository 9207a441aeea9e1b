"""Tests of what is done to banks besides calling them, when their experts are shared out over
ranks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from tests.helpers.moe import build_moe
from tests.helpers.quantized import weight_config
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import moe_ops
from moe_ops import quant
from moe_ops.layers import Experts
from moe_ops.parallel.sharding import fully_shard_moe, init_moe_meshes, shard_experts
from moe_ops.quant import QuantizedExperts

from .common import EXPERTS, whole

HIDDEN = 32

pytestmark = pytest.mark.cpu_only


def make_layer(**options):
    torch.manual_seed(0)
    layer = build_moe(HIDDEN, 32, EXPERTS, 2, bias=True, num_shared_experts=1, **options)
    with torch.no_grad():
        for b in (layer.experts.b_gate_up, layer.experts.b_down):
            b.normal_(std=0.1)
    return layer


def tokens(part=0, parts=1):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(24, HIDDEN, generator=generator).chunk(parts)[part]


def results(layer, rank):
    """Tensors of the bank, whole, and this rank's part of the output."""
    with torch.no_grad():
        y = layer(tokens(rank, dist.get_world_size() if dist.is_initialized() else 1))
    return {name: whole(p) for name, p in layer.experts.named_parameters()}, y


# ---------------------------------------------------------------------------------- surgery

OPERATIONS = {
    "select": lambda layer: layer.select([5, 0, 3, 6], top_k=2),
    "append_copy": lambda layer: layer.append(4, init="copy"),
    "append_mean": lambda layer: layer.append(2, init="mean"),
    "split": lambda layer: layer.split(factor=2),
    "split_some": lambda layer: layer.split([1, 2], mode="copy"),
    "merge_mean": lambda layer: layer.merge([[0, 1], [2, 7], [4], [5, 6]]),
    "merge_concat": lambda layer: layer.merge([[0, 1], [2, 3], [4, 5], [6, 7]], mode="concat"),
}


def operate(rank, names):
    layer = shard_experts(make_layer(), init_moe_meshes(2).ep)
    found = {}
    for name in names:
        new = OPERATIONS[name](layer)
        local = isinstance(new.experts.w_down, DTensor) and new.experts.w_down.to_local().shape[0]
        found[name] = (*results(new, rank), new.experts.num_experts, local)
    return found, results(layer, rank)


def test_surgery_gives_the_bank_of_one_process(processes):
    layer = make_layer()
    wanted = {name: operation(layer) for name, operation in OPERATIONS.items()}
    before = results(layer, 0)
    found = processes.run(operate, list(OPERATIONS), world=2)
    for name, new in wanted.items():
        bank, y = results(new, 0)
        parts = [ranks[name] for ranks, _ in found]
        for got, _, experts, local in parts:
            assert experts == new.experts.num_experts and local == experts // 2, name
            assert all(torch.equal(got[key], tensor) for key, tensor in bank.items()), name
        torch.testing.assert_close(torch.cat([part[1] for part in parts]), y, msg=name)
    for _, (bank, _) in found:  # The old bank is as it was.
        assert all(torch.equal(bank[key], tensor) for key, tensor in before[0].items())


def refused_surgery(rank):
    meshes = init_moe_meshes(2)
    layer = shard_experts(make_layer(), meshes.ep)
    said = []

    def record(call):
        try:
            call()
            said.append("no error")
        except ValueError as error:
            said.append(str(error))

    record(lambda: layer.experts.select([0, 1, 2]))
    fully_shard_moe(layer, meshes.dp, meshes.efsdp)
    record(lambda: layer.experts.select([0, 1]))
    record(lambda: moe_ops.pack_weights(layer))
    record(lambda: moe_ops.quantize(layer, moe_ops.Int8WeightConfig()))
    plain = fully_shard(Experts(EXPERTS, HIDDEN, 32), mesh=meshes.dp)
    record(lambda: Experts.forward_local(plain, tokens(), None, None) if rank > 1 else None)
    record(lambda: plain.mix(tokens(), torch.ones(24, EXPERTS)))
    record(lambda: Experts.forward(plain, tokens(), torch.ones(24, 1), torch.zeros(24, 1).long()))
    return said


def test_what_cannot_be_done_is_said(processes):
    (said, *_) = processes.run(refused_surgery, world=2)
    assert said[0].startswith("shard_experts: the 2 ranks of ep_mesh must divide the experts")
    assert said[1].startswith("Experts: w_gate_up must be a plain tensor, got a DTensor")
    assert said[2].startswith("pack_weights: experts.w_gate_up must be a plain tensor")
    assert said[3].startswith("quantize: experts.w_gate_up must be a plain tensor")
    for text in said[5:]:
        assert text.startswith("Experts: w_gate_up must be a plain tensor"), text
        assert text.endswith("moe_ops.parallel.shard_experts shares it out."), text


# ----------------------------------------------------------------------- packing, quantizing


def pack(rank):
    layer = shard_experts(make_layer(), init_moe_meshes(2).ep).eval()
    plain = results(layer, rank)[1]
    whole_bytes = make_layer().eval().pack_weights()
    size = layer.pack_weights()
    kept = [moe_ops.packed_weight_bytes(layer)]
    packed = results(layer, rank)[1]
    kept.append(moe_ops.packed_weight_bytes(layer))
    with torch.no_grad():  # In-place changes end a copy.
        layer.experts.w_down.mul_(2.0)
    doubled = results(layer, rank)[1]
    kept.append(moe_ops.packed_weight_bytes(layer))
    layer.pack_weights()
    optimizer = torch.optim.SGD(layer.experts.parameters(), lr=0.5, foreach=False)
    for p in layer.experts.parameters():
        p.grad = p.detach().clone()
    optimizer.step()
    kept.append(moe_ops.packed_weight_bytes(layer))
    return plain, packed, doubled, size / whole_bytes, [size, *kept]


def test_each_rank_packs_its_experts(processes):
    for plain, packed, doubled, share, kept in processes.run(pack, world=2):
        torch.testing.assert_close(packed, plain)
        assert not torch.equal(doubled, packed)
        assert share == 0.5
        assert kept == [kept[0], kept[0], kept[0], 0, 0]


GROUPS = {"int8": None, "int4": 32}


def with_zero_points():
    """A layer whose bank is as a checkpoint of GPTQ or AWQ has one."""
    layer = make_layer()
    bank = QuantizedExperts(EXPERTS, HIDDEN, 32, format="int4 g32 float16 zero", bias=True)
    generator = torch.Generator().manual_seed(3)
    for name, buffer in bank.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=generator) * 0.02)
        else:
            high = 16 if name.endswith("_zero") else 256
            buffer.copy_(torch.randint(high, buffer.shape, generator=generator))
    layer.experts = bank
    return layer


def quantize(rank, format):
    ep_mesh = init_moe_meshes(2).ep
    layer = shard_experts(make_layer(), ep_mesh)
    try:
        moe_ops.quantize(layer, weight_config(format, GROUPS[format]), calibration=[tokens()])
        said = "no error"
    except ValueError as error:
        said = str(error)
    moe_ops.quantize(layer, weight_config(format, GROUPS[format]))
    bank = layer.experts
    assert isinstance(bank, QuantizedExperts)
    y = results(layer, rank)[1]
    # The other way round: first quantized, then shared out.
    other = moe_ops.quantize(make_layer(), weight_config(format, GROUPS[format]))
    shard_experts(other, ep_mesh)
    buffers = {name: whole(b) for name, b in bank.named_buffers()}
    same = all(torch.equal(whole(b), buffers[name]) for name, b in other.experts.named_buffers())
    x = tokens().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and 0 < x.grad.norm().item() < float("inf")
    refused = []
    for call in (bank.dequantize, lambda: bank.select([0, 1])):
        with pytest.raises(ValueError) as caught:
            call()
        refused.append(str(caught.value))
    zeros = shard_experts(with_zero_points(), ep_mesh)
    return {
        "said": said,
        "y": y,
        "zeros": results(zeros, rank)[1],
        "other": results(other, rank)[1],
        "same": same,
        "buffers": buffers,
        "experts": bank.num_experts,
        "local": bank.w_down.to_local().shape[0],
        "refused": refused,
    }


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_each_rank_quantizes_its_experts(processes, format):
    layer = moe_ops.quantize(make_layer(), weight_config(format, GROUPS[format]))
    _, y = results(layer, 0)
    parts = processes.run(quantize, format, world=2)
    for got in parts:
        assert got["experts"] == EXPERTS and got["local"] == EXPERTS // 2
        assert got["same"]
        for name, buffer in layer.experts.named_buffers():
            assert torch.equal(got["buffers"][name], buffer), name
        assert got["said"].startswith("quantize: calibration must be None where experts")
        assert got["refused"][0].startswith("QuantizedExperts.dequantize: w_gate_up must be a")
        assert got["refused"][1].startswith("QuantizedExperts.select: w_gate_up must be a plain")
    for key in ("y", "other"):
        torch.testing.assert_close(torch.cat([got[key] for got in parts]), y)
    _, y = results(with_zero_points(), 0)
    torch.testing.assert_close(torch.cat([got["zeros"] for got in parts]), y)


# ------------------------------------------------------------------------------------ others


def others(rank):
    layer = shard_experts(make_layer(), init_moe_meshes(2).ep)
    state = layer.state_dict()
    twin = copy.deepcopy(layer)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    fresh = shard_experts(make_layer(), init_moe_meshes(2).ep)
    with torch.no_grad():
        fresh.experts.w_down.zero_()
    fresh.load_state_dict(state)
    one = shard_experts(make_layer(), init_moe_meshes(1).ep)
    y = results(layer, rank)[1]
    with torch.no_grad():
        ids = torch.zeros(12, 1).long()
        mixed = one.experts.outputs(tokens(rank, 2))
        same = one(tokens(rank, 2))
        call = one.experts(tokens(rank, 2), torch.ones(12, 1), ids)
        rounded = half(tokens(rank, 2).bfloat16())
    return {
        "names": {name: tuple(t.shape) for name, t in state.items()},
        "equal": [torch.equal(results(m, rank)[1], y) for m in (twin, fresh)],
        "close": [torch.allclose(same, y, atol=1e-5), torch.allclose(mixed[:, 0], call, atol=1e-5)],
        "half": (rounded.dtype, float((rounded.float() - y).abs().max())),
        "y": y,
        "repr": repr(layer.experts),
    }


def test_state_copies_and_types(processes):
    layer = make_layer()
    _, y = results(layer, 0)
    parts = processes.run(others, world=2)
    torch.testing.assert_close(torch.cat([got["y"] for got in parts]), y)
    for got in parts:
        assert got["names"] == {name: tuple(t.shape) for name, t in layer.state_dict().items()}
        assert got["equal"] == [True, True]
        assert got["close"] == [True, True]
        assert got["half"][0] == torch.bfloat16 and got["half"][1] < 0.1
        assert got["repr"].startswith("Experts(num_experts=8")


def baseline(rank):
    layer = shard_experts(make_layer(), init_moe_meshes(2).ep)
    with pytest.raises(ValueError) as caught:
        quant.collect_calibration(layer, [tokens()])
    return str(caught.value)


def test_a_baseline_needs_the_whole_bank(processes):
    (said, _) = processes.run(baseline, world=2)
    assert said.startswith("collect_calibration: experts.w_gate_up must be a plain tensor")
