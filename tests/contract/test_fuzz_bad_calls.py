"""Random wrong calls of every op: each must raise a Python exception that names the op.

A call starts right and gets one defect. None may return, read outside a tensor, or end the process.
"""

from __future__ import annotations

import inspect
import random
import zlib

import pytest
import torch
from tests.helpers.op_case import FLOATS, Sizes

import moe_ops

from .every_op import CASES, OPS

NUM_CHUNKS = 100
CALLS_A_CHUNK = 20

NOT_FLOATS = (torch.int32, torch.int64, torch.bool, torch.uint8, torch.complex64)
NOT_INDEX = (torch.float32, torch.bfloat16, torch.int16, torch.int8, torch.uint8, torch.bool)
INDEX_TENSORS = (
    "input_ids",
    "topk_ids",
    "expert_offsets",
    "row_to_slot",
    "slot_to_row",
    "physical",
)
OUT_OF_RANGE = (-2, -(2**31), 2**31 - 1, 1000)


def optional(op: str, name: str) -> bool:
    return "None" in str(inspect.signature(getattr(moe_ops, op)).parameters[name].annotation)


def defects(op: str, call: dict) -> list[tuple[str, str]]:
    case = CASES[op]
    found = [("argument", name) for name in case.bad_arguments]
    tensors = [name for name, value in call.items() if isinstance(value, torch.Tensor)]
    for name in tensors:
        found += [("dtype", name), ("rank", name), ("size", name)]
        if len(tensors) > 1:
            found.append(("device", name))
            if not optional(op, name):
                found.append(("missing", name))
        if name in ("expert_offsets", "row_to_slot", "slot_to_row"):
            found.append(("range", name))
    if case.mixed_floats is not None:
        floats = [name for name in tensors if call[name].is_floating_point()]
        found += [("float_dtype", name) for name in floats if name not in case.mixed_floats]
    return found


def spoil(op: str, call: dict, defect: tuple[str, str], rng: random.Random) -> str | None:
    """Puts one defect into `call`; what was done in words, None where this one cannot be made."""
    kind, name = defect
    t = call.get(name)
    if kind == "argument":
        value = rng.choice(CASES[op].bad_arguments[name])
        call[name] = value
        return f"{name}={value!r}"
    if kind == "dtype":
        dtypes = NOT_INDEX if name in INDEX_TENSORS else NOT_FLOATS
        dtype = rng.choice([d for d in dtypes if d != t.dtype])
        call[name] = t.to(dtype)
        return f"{name} as {dtype}"
    if kind == "float_dtype":
        dtype = rng.choice([d for d in FLOATS if d != t.dtype])
        call[name] = t.to(dtype)
        return f"{name} as {dtype}"
    if kind == "rank":
        if op == "gated_act":
            call[name] = t.sum()
        elif rng.random() < 0.5:
            call[name] = t[..., None]
        else:
            call[name] = t.flatten() if t.dim() > 1 else t.sum().to(t.dtype)
        return f"{name} of shape {list(call[name].shape)}"
    if kind == "size":
        dims = [d for d in range(t.dim()) if d not in CASES[op].free_dims.get(name, ())]
        if not dims:
            return None
        d = rng.choice(dims)
        longer = rng.random() < 0.5
        index = [*range(t.shape[d]), 0] if longer else list(range(t.shape[d] - 1))
        call[name] = t.index_select(d, torch.tensor(index, dtype=torch.int64))
        if op == "permute" and call["row_to_slot"].numel() % call["x"].shape[0] == 0:
            # Another number of tokens that divides N: a right call with another K.
            return None
        return f"{name} of shape {list(call[name].shape)}"
    if kind == "missing":
        call[name] = None
        return f"{name} is None"
    if kind == "device":
        call[name] = t.to("meta")
        return f"{name} on meta"
    if kind == "range":
        value = rng.choice(OUT_OF_RANGE)
        call[name] = t.clone()
        call[name].view(-1)[rng.randrange(t.numel())] = value
        return f"{name} with {value}"
    raise AssertionError(kind)


def bad_call(chunk: int, index: int) -> tuple[str, dict, str]:
    rng = random.Random(zlib.crc32(f"{chunk}-{index}".encode()))
    torch.manual_seed(rng.randrange(2**31))
    while True:
        op = rng.choice(OPS)
        call = CASES[op].call(Sizes(rng))
        done = spoil(op, call, rng.choice(defects(op, call)), rng)
        if done is not None:
            return op, call, done


@pytest.mark.parametrize("chunk", range(NUM_CHUNKS))
def test_bad_calls(chunk):
    # A chunk of calls is one test; all its faults are told at once.
    faults = []
    for index in range(CALLS_A_CHUNK):
        op, call, done = bad_call(chunk, index)
        try:
            getattr(moe_ops, op)(**call)
        except Exception as error:
            # Python's own sentence, where the op's function asks None for an attribute.
            python = isinstance(error, AttributeError) and "'NoneType'" in str(error)
            if op not in str(error) and not python:
                faults.append(f"{op}({done}): the message does not name the op: {error}")
        else:
            faults.append(f"{op}({done}) returned")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("op", OPS)
def test_good_calls(op):
    """The calls that the defects go into are right, or every refusal above would prove nothing."""
    rng = random.Random(op)
    for _ in range(5):
        getattr(moe_ops, op)(**CASES[op].call(Sizes(rng)))
