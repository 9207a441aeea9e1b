"""Dense layers of decoding steps on CUDA: few rows meet quantized weights as they are stored."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.quantized import label_of, quantized
from tests.ops import test_attention_decode as heads
from tests.ops import test_gated_mlp_decode as mlp
from tests.ops import test_mla_decode as latent

import moe_ops
from moe_ops import reference
from moe_ops.quant import dequantize_weight
from moe_ops.testing import eps, poisoned


def with_codes(call, names, bits, group):
    """The call with quantized weights, and one whose weights are those numbers in float64."""
    kind = label_of(bits, group)
    coded, exact = dict(call), mlp.wide(call)
    for name in names:
        q, scale = quantized(call[name].float()[None], bits, group)
        coded |= {name: q[0], f"{name}_scale": scale[0]}
        exact[name] = dequantize_weight(q, scale, kind)[0].double()
    return coded, exact, kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 64])
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 32)])
def test_few_rows_read_codes(simulator, capfd, dtype, tokens, bits, group):
    call = mlp.operands(dtype, tokens, hidden=96, width=64, features=40)
    weights = ("w_gate", "w_up", "w_down")
    call, exact, kind = with_codes(call, weights, bits, group)
    results = []

    def run():
        with poisoned(call["x"]):
            results.append(moe_ops.gated_mlp_decode(**call, formats=kind))

    assert len(simulator.launched(run, capfd)) == len(weights)
    want = reference.gated_mlp_decode(**exact)
    # A few roundings to dtype on the way, no rounding of rows or weights.
    assert (results[0].double() - want).norm() <= 30 * eps(dtype) * want.norm()


def test_many_rows_are_multiplied_by_dequantized_weights(simulator, capfd):
    call = mlp.operands(torch.bfloat16, 65, hidden=96, width=64, features=40)
    call, _, kind = with_codes(call, ("w_gate", "w_up", "w_down"), 8, 0)
    assert simulator.launched(lambda: moe_ops.gated_mlp_decode(**call, formats=kind), capfd) == []


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_no_rows_and_weights_that_are_not_quantized(simulator, capfd, tokens):
    call = mlp.operands(torch.bfloat16, tokens, hidden=96, width=64, features=40)
    call, exact, kind = with_codes(call, ("w_down",), 4, 32)
    formats = ["float", "float", kind]
    launched = simulator.launched(lambda: moe_ops.gated_mlp_decode(**call, formats=formats), capfd)
    assert len(launched) == (tokens > 0)
    y, want = moe_ops.gated_mlp_decode(**call, formats=formats), reference.gated_mlp_decode(**exact)
    assert (y.double() - want).norm() <= 30 * eps(torch.bfloat16) * want.norm()


def test_latent_attention_reads_codes(simulator, capfd):
    call = latent.operands(torch.bfloat16, length=2, hidden=96, rank=64, heads=4, value=8)
    # w_o has a row of 4 * 8 numbers, one group.
    call, exact, kind = with_codes(call, ("w_kv_a", "w_o"), 4, 32)
    call["formats"] = ["float", kind, kind, "float"]
    kept = []

    def run():
        own = {name: call[name].clone() for name in latent.KEPT}
        kept.append(moe_ops.mla_decode(**{**call, **own}))

    assert len(simulator.launched(run, capfd)) == 2
    want = reference.mla_decode(**{**exact, **{n: exact[n].clone() for n in latent.KEPT}})
    assert (kept[0].double() - want).norm() <= 30 * eps(torch.bfloat16) * want.norm()


def test_attention_reads_codes(simulator, capfd):
    call = heads.operands(torch.bfloat16, length=2, hidden=96, heads=4, size=32, bias=True)
    floats = dict(call)
    call, exact, kind = with_codes(call, ("w_q", "w_o"), 4, 32)
    call["formats"] = [kind, "float", "float", kind]
    results = []

    def run(of):
        own = {name: of[name].clone() for name in heads.KEPT}
        results.append(moe_ops.attention_decode(**{**of, **own}))

    others = len(simulator.launched(lambda: run(floats), capfd))
    assert len(simulator.launched(lambda: run(call), capfd)) == others + 2
    want = reference.attention_decode(**{**exact, **{n: exact[n].clone() for n in heads.KEPT}})
    assert (results[1].double() - want).norm() <= 30 * eps(torch.bfloat16) * want.norm()
