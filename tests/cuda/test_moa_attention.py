"""The attention kernels under every schedule, the bytes that they move, and offsets that lead
nowhere."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.simulator import noticed_mutants

import moe_ops
from moe_ops.testing import DTYPES, short

KINDS = ("softmax", "stick_breaking")


def operands(dtype, *, batch=1, tokens=37, slots=2, heads=1, head_size=24, keys=None, grad=True):
    keys = tokens if keys is None else keys
    q = torch.randn(batch, tokens, slots, heads, head_size).to(dtype).requires_grad_(grad)
    k, v = (torch.randn(batch, keys, heads, head_size).to(dtype) for _ in range(2))
    return {"q": q, "k": k.requires_grad_(grad), "v": v.requires_grad_(grad)}


def run(call, **options):
    """Results, and gradients where they are wanted."""
    result = moe_ops.moa_attention(**call, **options)
    results = result if isinstance(result, tuple) else (result,)
    if not call["q"].requires_grad:
        return results
    grads = [torch.linspace(-1, 1, r.numel()).reshape(r.shape).to(r.dtype) for r in results]
    return (*results, *torch.autograd.grad(results, list(call.values()), grads))


@pytest.fixture
def generic(monkeypatch):
    monkeypatch.setenv("MOE_OPS_ATTENTION", "generic")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_schedules(simulator, dtype, kind, generic):
    """Blocks of rows and of keys that end early; rows of 16 bytes, and rows of odd sizes."""
    for head_size in (24, 23):
        call = operands(dtype, head_size=head_size, tokens=37 if dtype.itemsize > 2 else 71)
        simulator.check_schedules(lambda call=call: run(call, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_schedules_of_decoding(simulator, dtype, kind):
    """One token; the keys are split over blocks, a second kernel adds their parts."""
    call = operands(dtype, batch=2, tokens=1, keys=530, heads=2, head_size=32, grad=False)
    simulator.check_schedules(lambda: run(call, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "offsets", [[0, 4, 2, 9], [3, 4, 5, 6], [0, -5, 7, 13], [0, 4, 99, 13], [2**31 - 1, -1, 0]]
)
def test_sequences_that_lead_nowhere(offsets, kind, generic):
    """A device cannot refuse what it reads; the simulator reports accesses outside tensors."""
    for dtype in (torch.float32, torch.bfloat16):
        call = operands(dtype, tokens=13)
        run(call, kind=kind, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_one_load_of_keys_serves_all_slots(simulator, kind):
    """Decoding: the cache is read once for K slots, and K times if it is repeated for them."""
    slots, keys, head_size = 4, 300, 64
    call = operands(
        torch.bfloat16, tokens=1, slots=slots, keys=keys, head_size=head_size, grad=False
    )
    # Logits below zero: no stick ends, and no key is left out.
    call["q"], call["k"] = -call["q"].abs(), call["k"].abs()
    repeated = {
        "q": call["q"].transpose(2, 3).reshape(1, 1, 1, slots, head_size),
        "k": call["k"].repeat_interleave(slots, 2),
        "v": call["v"].repeat_interleave(slots, 2),
    }
    ours = simulator.counted(lambda: run(call, kind=kind, causal=True), "ld_bytes")["ld_bytes"]
    theirs = simulator.counted(lambda: run(repeated, kind=kind), "ld_bytes")["ld_bytes"]
    cache, queries = 2 * keys * head_size * 2, slots * head_size * 2
    assert ours == cache + queries
    assert theirs == slots * cache + queries


# The TMA + wgmma kernels: bfloat16 and float16, d 64 and 128, more than 16 rows per head.
WIDE = {64: {"tokens": 83, "slots": 2, "keys": 150}, 128: {"tokens": 45, "slots": 3, "keys": 270}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_size", WIDE)
def test_schedules_with_wgmma(simulator, head_size, kind):
    call = operands(torch.bfloat16, head_size=head_size, grad=False, **WIDE[head_size])
    assert simulator.counted(lambda: run(call, kind=kind), "wgmma")["wgmma"] > 0
    simulator.check_schedules(lambda: run(call, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 2.0, 50.0])
@pytest.mark.parametrize("head_size", WIDE)
def test_generic_kernels_agree(simulator, head_size, softcap, kind, monkeypatch):
    """Other tiles and other sums: equal to the rounding of weights and of the result."""
    call = operands(torch.float16, head_size=head_size, grad=False, **WIDE[head_size])
    ours: list[torch.Tensor] = []
    counted = simulator.counted(lambda: ours.extend(run(call, kind=kind, softcap=softcap)), "wgmma")
    assert counted["wgmma"] > 0
    monkeypatch.setenv("MOE_OPS_ATTENTION", "generic")
    for a, b in zip(ours, run(call, kind=kind, softcap=softcap), strict=True):
        torch.testing.assert_close(a, b, rtol=2.0**-9, atol=2.0**-9)


def test_a_softcap_that_is_too_large_for_fast_logits(simulator):
    """Their error is a part of the cap: the generic kernels take the call."""
    call = operands(torch.bfloat16, head_size=64, grad=False, **WIDE[64])
    for softcap, fast in ((1024.0, True), (1025.0, False)):
        counted = simulator.counted(lambda s=softcap: run(call, kind="softmax", softcap=s), "wgmma")
        assert (counted["wgmma"] > 0) is fast


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_size", WIDE)
def test_boxes_of_keys_serve_all_slots(simulator, head_size, kind):
    """A short prompt is one block a head: K times the bytes if keys are repeated."""
    slots, keys, tokens = 3, 150, 40
    call = operands(
        torch.bfloat16, tokens=tokens, slots=slots, keys=keys, head_size=head_size, grad=False
    )
    call["q"], call["k"] = -call["q"].abs(), call["k"].abs()  # no stick ends
    repeated = {
        "q": call["q"].transpose(2, 3).reshape(1, tokens, 1, slots, head_size),
        "k": call["k"].repeat_interleave(slots, 2),
        "v": call["v"].repeat_interleave(slots, 2),
    }
    tile = 128 if kind == "softmax" else 64
    boxes = 128 + 2 * -(-keys // tile) * tile
    for arguments, heads in ((call, 1), (repeated, slots)):
        counted = simulator.counted(lambda a=arguments: run(a, kind=kind), "tma_ld_bytes")
        assert counted["tma_ld_bytes"] == heads * boxes * head_size * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_size", WIDE)
def test_schedules_of_backward_with_wgmma(simulator, head_size, kind):
    call = operands(torch.bfloat16, head_size=head_size, **WIDE[head_size])
    simulator.check_schedules(lambda: run(call, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_size", [24, *WIDE])
def test_schedules_of_what_is_not_finite(simulator, head_size, kind):
    """Tiles of operands that not all rows see are searched and cleaned."""
    call = operands(torch.bfloat16, head_size=head_size, **WIDE.get(head_size, {"tokens": 71}))
    with torch.no_grad():
        call["k"][:, -9, ..., 3] = torch.inf
        call["v"][:, -20] = torch.nan
        call["v"][:, -2, ..., 7] = -torch.inf
        call["q"][:, 5, 0] = torch.nan
    results = run(call, kind=kind)
    assert bool(results[0][:, 6].isfinite().all())
    assert not bool(results[-1].isfinite().all())
    simulator.check_schedules(lambda: run(call, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_size", WIDE)
def test_schedules_of_long_lists(simulator, head_size, kind):
    """More tiles of rows and of keys than SMs: blocks of the forward have several, and those of the
    backward follow each other through the same rows."""
    call = operands(
        torch.bfloat16, tokens=150, slots=2, heads=2, keys=300, head_size=head_size, grad=True
    )
    if kind == "stick_breaking":  # some sticks last, some do not
        with torch.no_grad():
            call["q"].abs_()
            call["k"].abs_().mul_(-0.25)
    with simulator.options(sms=3):
        few = run(call, kind=kind)
        simulator.check_schedules(lambda: run(call, kind=kind))
    for a, b in zip(few, run(call, kind=kind), strict=True):
        assert torch.equal(a, b)


def backward(kind, call, **options):
    """The backward op alone, ready to be called."""
    arguments = (kind, options.get("causal", True), call["q"].shape[-1] ** -0.5, 0, 0.0, None)
    operands = [t.detach() for t in call.values()]
    out, state = torch.ops.moe_ops.moa_attention(*operands, *arguments)
    grad = torch.randn(out.shape).to(out.dtype)
    return lambda: torch.ops.moe_ops.moa_attention_bwd(
        grad, torch.zeros_like(state), *operands, out, state, *arguments
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_size", WIDE)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_backward_is_five_products(simulator, causal, head_size, kind):
    """A block of 128 keys is loaded once (keys twice), and 64 rows of q and of the gradient once
    for each block that they see; then five products of 64 x 128 x d."""
    tokens, slots = 192, 2
    call = operands(
        torch.bfloat16, tokens=tokens, slots=slots, head_size=head_size, keys=256, grad=False
    )
    call["q"], call["k"] = -call["q"].abs(), call["k"].abs()  # no stick ends
    steps = 2 * 6  # blocks of keys, tiles of 64 rows
    if causal:  # token i sees keys to i + 64: tokens 0 to 63 see none of the second block
        steps -= 2
    counted = simulator.counted(backward(kind, call, causal=causal), "tma_ld_bytes", "wgmma")
    assert counted["tma_ld_bytes"] == (2 * 3 * 128 + steps * 2 * 64) * head_size * 2
    of_a_warpgroup = 2 * head_size // 16 + 2 * 64 // 16 + 128 // 16
    assert counted["wgmma"] == steps * 2 * 4 * of_a_warpgroup


@pytest.mark.full
def test_mutants_are_noticed(simulator):
    """The kernels above with one wait, fence, flag or address broken at a time
    (attention_mutants.py)."""
    noticed = noticed_mutants("attention_mutants")
    assert len(noticed) > 20
    missed = [name for name, how in noticed.items() if how is None]
    assert not missed
