"""A query of attention_decode and mla_decode depends only on the positions that it may
see.

In the batch-invariant mode its bits are those that it has alone, whatever the sequences beside it,
the tokens of the call, and the hidden positions before and after those that it sees. In any mode,
infinities and NaN in positions that it may not see do not reach it.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from tests.helpers.attention_block import Call, run
from tests.helpers.isas import ISAS, has_own_kernels, run_python_at
from tests.helpers.quantized import label_of, quantized
from tests.ops import test_attention_decode, test_mla_decode
from torch import Tensor

import moe_ops
from moe_ops import _library
from moe_ops.testing import DTYPES, assert_identical, seed_from, short

pytestmark = pytest.mark.cpu_only

FILES = {
    "attention_decode": test_attention_decode,
    "mla_decode": test_mla_decode,
}
BY_TOKEN = ("x", "cos", "sin")
WEIGHTS = {
    "attention_decode": ("q", "k", "v", "o"),
    "mla_decode": ("q", "q_a", "kv_a", "o"),
}
ROUNDS = 12

every_call = pytest.mark.parametrize(
    ("op", "dtype"),
    [pytest.param(op, dtype, id=f"{op}-{short(dtype)}") for op in FILES for dtype in DTYPES],
)


def sizes(op: str, rng: random.Random, codes: bool) -> dict[str, int]:
    """Sizes on both sides of those at which products change; rows of codes have whole groups."""
    unit = 32 if codes else 1

    def some(*numbers: int) -> int:
        return unit * max(1, rng.choice(numbers) // unit)

    if op == "attention_decode":
        kv_heads, group = rng.choice((1, 2, 3)), rng.choice((1, 2, 5))
        size = some(2, 8, 16, 20, 64, 96)
        rotary = 2 * rng.randint(0, size // 2)
        return {
            "hidden": some(7, 40, 64, 130),
            "heads": kv_heads * group,
            "kv_heads": kv_heads,
            "size": size,
            "rotary_size": rotary,
        }
    return {
        "hidden": some(7, 40, 64, 130),
        "heads": rng.choice((1, 3, 8)),
        "rank": rng.choice((5, 24, 64, 130)),
        "nope": rng.choice((3, 16)),
        "rope": rng.choice((2, 8)),
        "value": some(4, 12, 32),
        "query_rank": some(6, 20, 64),
    }


def mask_of(call: Call, kind: str, rng: random.Random) -> Tensor:
    """Returns a mask that hides the first positions of some sequences, those before a window from
    some queries, and here and there one of the others."""
    batch, length, _ = call["x"].shape
    end = call["start"] + length
    sees = torch.ones(length, end, dtype=torch.bool).tril(call["start"])
    if rng.random() < 0.5:
        sees &= ~torch.ones(length, end, dtype=torch.bool).tril(call["start"] - rng.randint(0, end))
    sees = sees.expand(batch, 1, length, end).clone()
    for b in range(batch):
        sees[b, ..., : rng.choice((0, 1, 5, call["start"]))] = False
    if rng.random() < 0.5:
        sees &= torch.rand(batch, 1, length, end) < 0.8
    if kind == "bool":
        return sees
    if kind == "lowest":  # A query that sees nothing would see all positions alike.
        sees[..., call["start"] :] |= torch.eye(length, dtype=torch.bool)
    lowest = -math.inf if kind == "float" else torch.finfo(call["x"].dtype).min
    return torch.zeros(sees.shape, dtype=call["x"].dtype).masked_fill(~sees, lowest)


def random_call(op: str, dtype: torch.dtype, rng: random.Random, masks: tuple[Any, ...]) -> Call:
    file = FILES[op]
    codes = dtype != torch.float64 and rng.random() < 0.4
    options: dict[str, Any] = sizes(op, rng, codes)
    if op == "attention_decode":
        options |= {"sinks": rng.random() < 0.5, "norms": rng.choice((None, "head"))}
    else:
        options |= {"interleaved": rng.random() < 0.5}
    call = file.operands(
        dtype,
        batch=rng.choice((1, 2, 4)),
        length=rng.choice((1, 1, 2, 3, 9, 40)),
        start=rng.choice((0, 1, 9, 60, 200)),
        **options,
    )
    kinds = {}
    for name in WEIGHTS[op] if codes else ():
        bits = rng.choice((0, 8, 4))
        if bits:
            weight, scale = quantized(call[f"w_{name}"].float()[None], bits)
            call |= {f"w_{name}": weight[0], f"w_{name}_scale": scale[0]}
            kinds[name] = label_of(bits)
    order = ("q", "kv_a", "o", "q_a") if op == "mla_decode" else "qkvo"
    call["formats"] = [kinds.get(name, "float") for name in order]
    kind = rng.choice(masks)
    if kind is not None:
        call["mask"] = mask_of(call, kind, rng)
    return call


def may_see(call: Call) -> Tensor:
    """[B, S, start + S], whatever says it in the call."""
    batch, length, _ = call["x"].shape
    end = call["start"] + length
    mask = call.get("mask")
    if mask is None:
        return torch.ones(length, end, dtype=torch.bool).tril(call["start"]).expand(batch, -1, -1)
    sees = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    return sees.expand(batch, 1, -1, -1)[:, 0]


def only(call: Call, kept: tuple[str, str], sequences: slice, first: int, last: int) -> Call:
    """Tokens first .. last - 1 of some sequences. In `call` the cache has all of its tokens."""
    part = {name: call[name][sequences, first:last] for name in BY_TOKEN}
    part |= {name: call[name][sequences] for name in kept}
    if call.get("mask") is not None:
        part["mask"] = call["mask"][sequences, :, first:last, : call["start"] + last]
    return {**call, **part, "start": call["start"] + first}


def moved(call: Call, kept: tuple[str, str], by: int) -> Call:
    """The call with `by` positions before all others, which no query sees; with by < 0 without so
    many of them."""
    mask = call.get("mask")
    if mask is None:
        mask = may_see(call)[:, None]
    if by < 0:
        cut = {name: call[name][:, :, -by:] for name in kept}
        return {**call, **cut, "mask": mask[..., -by:], "start": call["start"] + by}
    hidden = mask.new_zeros(*mask.shape[:3], by)
    if mask.dtype != torch.bool:
        hidden.fill_(mask.min() if mask.min() < 0 else -math.inf)
    more = {
        name: torch.cat((torch.randn_like(call[name][:, :, :1]).repeat(1, 1, by, 1), call[name]), 2)
        for name in kept
    }
    return {**call, **more, "mask": torch.cat((hidden, mask), -1), "start": call["start"] + by}


def check_invariant(op: str, call: Call, rng: random.Random) -> None:
    kept, function = FILES[op].KEPT, getattr(moe_ops, op)
    batch, length, _ = call["x"].shape
    y, *after = run(function, call, kept)
    whole = {**call, **dict(zip(kept, after, strict=True))}
    for _ in range(4):
        b, first = rng.randrange(batch), rng.randrange(length)
        last = rng.choice((first + 1, rng.randint(first + 1, length)))
        sequences = slice(b, b + 1) if rng.random() < 0.7 else slice(batch)
        part = only(whole, kept, sequences, first, last)
        want, kept_want = y[sequences, first:last], [part[name] for name in kept]
        hidden = int(may_see(part).any(1).any(0).int().argmax())
        by = rng.choice((0, 1, 3, 17, 64, -min(hidden, part["start"])))
        got, *kept_got = run(function, moved(part, kept, by) if by else part, kept)
        sizes = (op, *call["x"].shape, call["start"], sequences, first, last, by)
        assert_identical(got, want, f"{sizes}")
        for ours, theirs in zip(kept_got, kept_want, strict=True):
            assert_identical(ours[:, :, max(by, 0) :], theirs[:, :, max(-by, 0) :])


def check_all_invariant(op: str, dtype: torch.dtype, rng: random.Random) -> None:
    with moe_ops.batch_invariant():
        for _ in range(ROUNDS):
            call = random_call(op, dtype, rng, (None, "bool", "float", "lowest"))
            check_invariant(op, call, rng)


@every_call
def test_the_same_bits_alone_and_among_others(op, dtype, seed):
    check_all_invariant(op, dtype, random.Random(seed))


@every_call
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_with_the_sizes_of_a_model(op, dtype, threads, set_threads, seed):
    """Large enough for several threads, and for products of many rows."""
    set_threads(threads)
    options = {"sinks": True, "kv_heads": 2} if op == "attention_decode" else {"rank": 512}
    call = FILES[op].operands(dtype, batch=2, length=33, start=300, hidden=256, heads=16, **options)
    with moe_ops.batch_invariant():
        check_invariant(op, call, random.Random(seed))


def check_isolated(op: str, call: Call, value: float, rng: random.Random) -> None:
    """Queries that may not see a position do not notice what is in it."""
    kept, function = FILES[op].KEPT, getattr(moe_ops, op)
    batch, length, _ = call["x"].shape
    clean = run(function, call, kept)[0]
    b, place = rng.randrange(batch), rng.choice((*kept, "x"))
    own = place == "x" or call["start"] == 0
    position = rng.randrange(call["start"], call["start"] + length) if own else 0
    if not own:
        position = rng.randrange(call["start"])
    changed = dict(call)
    if own:
        changed["x"] = call["x"].clone()
        changed["x"][b, position - call["start"], rng.randrange(call["x"].shape[2])] = value
    else:
        changed[place] = call[place].clone()
        heads, _, features = call[place].shape[1:]
        at = rng.randrange(features) if rng.random() < 0.5 else slice(None)
        changed[place][b, rng.randrange(heads), position, at] = value
    got = run(function, changed, kept)[0]
    reached = may_see(call)[:, :, position].clone()
    reached[:b], reached[b + 1 :] = False, False
    if value != value and place != kept[0]:
        assert bool(got[reached].isnan().any(-1).all())
    if own:
        reached[b, position - call["start"]] = True  # the residual
    what = (op, *call["x"].shape, call["start"], place, b, position, value)
    assert_identical(got[~reached], clean[~reached], f"{what}")


def check_all_isolated(op: str, dtype: torch.dtype, rng: random.Random) -> None:
    for _ in range(ROUNDS):
        call = random_call(op, dtype, rng, (None, "bool", "float"))
        for value in (math.nan, math.inf, -math.inf):
            check_isolated(op, call, value, rng)


@every_call
@pytest.mark.parametrize("mode", [False, True])
def test_numbers_that_a_query_may_not_see(op, dtype, mode, seed):
    with moe_ops.batch_invariant(mode):
        check_all_isolated(op, dtype, random.Random(seed))


@pytest.mark.parametrize("op", FILES)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_padding_of_numbers_that_are_not_finite(op, value):
    """Left padding and the tokens after a query, all at once, beside a sequence without padding."""
    options = {"sinks": True} if op == "attention_decode" else {}
    call = FILES[op].operands(batch=2, length=4, start=20, **options)
    call["mask"] = may_see(call)[:, None].clone()
    call["mask"][0, ..., :7] = False
    want = run(getattr(moe_ops, op), call, FILES[op].KEPT)[0]
    for name in FILES[op].KEPT:
        call[name][0, :, :7] = value
    call["x"][:, 3] = value
    got = run(getattr(moe_ops, op), call, FILES[op].KEPT)[0]
    assert_identical(got[:, :3], want[:, :3])
    assert bool(got[:, 3].isnan().all())


@pytest.mark.parametrize("op", FILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_a_query_from_which_numbers_hide_all_keys_alike(op, dtype):
    """A number that is not -inf hides a key beside others only, as in torch."""
    call = FILES[op].operands(dtype, batch=2, length=3, start=20)
    lowest = torch.finfo(dtype).min
    mask = torch.zeros(2, 1, 3, 23, dtype=dtype).masked_fill(~may_see(call)[:, None], lowest)
    mask[0, :, :2] = lowest
    FILES[op].check({**call, "mask": mask})


def run_all(every: bool) -> None:
    """All random cases, in a process of its own, at the level of instructions of its start;
    without `every`, those for which that level has kernels of its own."""
    for op in FILES:
        for dtype in DTYPES:
            stored = dtype != torch.float64  # Some weights are stored as integers.
            if not every and not has_own_kernels(_library.cpu_isa(), dtype, stored):
                continue
            torch.manual_seed(seed_from(f"{op} {dtype}"))
            rng = random.Random(seed_from(f"{op} {dtype}"))
            check_all_invariant(op, dtype, rng)
            check_all_isolated(op, dtype, rng)


@pytest.mark.parametrize("isa", ISAS)
def test_isa(isa, request):
    if isa == _library.cpu_isa():
        pytest.skip("the level of this process, at which the other tests run")
    every = request.config.getoption("--full")
    code = f"from tests.contract.test_attention_steps import run_all; run_all({every})"
    run = run_python_at(isa, "-c", code)
    assert run.returncode == 0, run.stderr[-4000:]
