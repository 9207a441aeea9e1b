"""Code that computes does not lean on torch's default device and dtype, which callers may change:
from_pretrained builds models with "meta" and bfloat16 as defaults, GPU users often set "cuda"."""

from __future__ import annotations

import contextlib

import pytest
import torch
from tests.helpers.moe import build_moe

import moe_ops
from moe_ops import quant
from moe_ops.layers import ExpertLoadStats, Experts
from moe_ops.zoo.home import layers as multitask


@contextlib.contextmanager
def other_defaults():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("router", ["mixtral", "glm4_moe", "phimoe", "gpt_oss"])
def test_layers(router):
    layer = build_moe(16, 8, 4, 2, router=router).eval()
    x = torch.randn(3, 16)
    want = layer(x)
    with other_defaults():
        y = layer(x)
        y.sum().backward()
    assert torch.equal(y, want)
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


def test_merging():
    bank = Experts(4, 8, 8)
    want = bank.merge([[0, 1], [2, 3]], weights=[0.1, 0.2, 0.3, 0.4])
    order = torch.arange(8).expand(4, 8)
    with other_defaults():
        got = bank.merge([[0, 1], [2, 3]], weights=[0.1, 0.2, 0.3, 0.4])
        bank.merge([[0, 1], [2, 3]], neuron_order=order)
    assert torch.equal(got.w_gate_up, want.w_gate_up)


def test_dense_banks():
    bank = Experts(4, 8, 8, output_size=1, activation="relu", bias=True)
    x = torch.randn(5, 4, 8)
    want = bank.outputs(x)
    with other_defaults():
        assert torch.equal(bank.outputs(x), want)


def test_sum_of_rows():
    rows = torch.randn(6, 3, requires_grad=True)
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    with other_defaults():
        moe_ops.grouped_sum(rows, offsets).sum().backward()
    assert rows.grad[:, 0].tolist() == [1, 1, 1, 1, 1, 0]


def test_statistics():
    stats = ExpertLoadStats()
    stats.update(torch.tensor([[0, 1], [0, 1]]), 4)
    want = stats.as_dict()
    with other_defaults():
        assert stats.as_dict() == want


def test_quantizing():
    x, weights = torch.randn(9, 32), torch.rand(9, 2)
    ids = torch.randint(4, (9, 2))
    results = []
    for context in (contextlib.nullcontext, other_defaults):
        torch.manual_seed(0)
        bank = Experts(4, 32, 32)
        with context():
            baseline = quant.collect_calibration(bank, [(x, weights, ids)])
            quantized = moe_ops.quantize(bank, moe_ops.Int4WeightConfig(32), calibration=baseline)
            error = quant.compare_quality(quantized, baseline).banks[0].error
        results.append((error, quantized.x_scale, baseline.banks[""].y))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(*(r[1:] for r in results), strict=True))
    assert results[1][2].dtype == torch.float32


def test_masks_of_the_zoo():
    with other_defaults():
        mask = multitask.ownership(["a", "b"], [{"a"}, {"a", "b"}])
    assert mask.tolist() == [[True, False], [True, True]]


def test_norms_of_transformers():
    pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

    from moe_ops.hf.decode.agreement import why_not
    from moe_ops.hf.models.known import find

    norm = MixtralRMSNorm(8)
    with other_defaults():
        assert why_not("norm", norm, find("norm", norm)) is None
