"""The kernel of attention_decode: positions split over blocks, heads split over blocks, and what it
must not read."""

from __future__ import annotations

import pytest
import torch
from tests.ops.test_attention_decode import KEPT, check, operands, run

import moe_ops
from moe_ops.testing import assert_identical

# 600 cached positions are three splits of 256. 5 and 6 heads of one group are more than a block
# has; sizes that are no multiple of a lane's features are read one by one.
SHAPES = [
    {"start": 600, "size": 64},
    {"start": 600, "heads": 5, "kv_heads": 1, "size": 20, "hidden": 33},
    {"start": 255, "batch": 1, "size": 128, "sinks": True},
    {"start": 256, "length": 3, "heads": 6, "kv_heads": 1, "size": 200, "rotary_size": 64},
    {"start": 17, "heads": 3, "kv_heads": 1, "size": 258, "norms": "token", "mask": "float"},
    {"start": 5, "heads": 2, "kv_heads": 2, "size": 512, "batch": 1, "hidden": 8},
    {"start": 300, "length": 2, "mask": "bool", "sinks": True},
    {"start": 0, "size": 1, "rotary_size": 0},
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values(shape, dtype):
    check(operands(dtype, **shape))


def test_schedules(simulator):
    call = operands(torch.bfloat16, start=300, length=2, size=32, mask="bool", sinks=True)
    for name in KEPT:
        call[name].nan_to_num_()
    q, kv = torch.randn(2, 2, 6 * 32).bfloat16(), torch.randn(2, 2, 2 * 32).bfloat16()
    rest = [call[name] for name in ("cos", "sin", *KEPT, "start", "rotary_size", "scale")]
    norms = call["q_norm"], call["k_norm"]

    def attend():
        y = torch.ops.moe_ops_cuda.attend_decode(
            q, kv, kv, *rest, *norms, 1e-6, call["mask"], call["sinks"]
        )
        return y, call["keys"], call["values"]

    simulator.check_schedules(attend)


def test_launches(simulator, capfd):
    """Torch's projections run on the CPU here: three kernels are ours, whatever the length."""
    for start in (0, 600):
        call = operands(torch.bfloat16, start=start, mask="bool", sinks=True)
        names = simulator.launched(lambda call=call: run(moe_ops.attention_decode, call), capfd)
        kernels = ("place_heads", "attend_split", "combine_splits")
        assert len(names) == 3
        assert all(k in name for k, name in zip(kernels, names, strict=True)), names


def test_a_sequence_has_the_same_bits_in_any_batch_and_at_any_address():
    call = operands(torch.bfloat16, start=300, batch=3, size=32, mask="bool")
    q, kv = torch.randn(3, 1, 6 * 32).bfloat16(), torch.randn(3, 1, 2 * 32).bfloat16()

    def attend(rows, keys, values):
        return torch.ops.moe_ops_cuda.attend_decode(
            *(t[rows] for t in (q, kv, kv, call["cos"], call["sin"])),
            keys,
            values,
            *(call[name] for name in ("start", "rotary_size", "scale", "q_norm", "k_norm")),
            1e-6,
            call["mask"][rows],
            None,
        )

    y = attend(slice(0, 3), call["keys"].clone(), call["values"].clone())
    for b in range(3):
        rows = slice(b, b + 1)
        # A cache by tokens, of rows that start at odd addresses.
        keys, values = (
            torch.nn.functional.pad(call[n][rows], (1, 0)).transpose(1, 2).contiguous()[..., 1:]
            for n in KEPT
        )
        assert_identical(attend(rows, keys.transpose(1, 2), values.transpose(1, 2)), y[rows])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_masked_positions_have_no_effect(bad):
    call = operands(start=300, mask="bool")
    call["mask"][..., -1] = True
    want = run(moe_ops.attention_decode, call)[0]
    changed = dict(call)
    for name in KEPT:
        changed[name] = call[name].clone()
        hidden = ~call["mask"][:, 0, 0, :300]
        changed[name][:, :, :300][hidden[:, None].expand(2, 2, 300)] = bad
    assert_identical(run(moe_ops.attention_decode, changed)[0], want)
