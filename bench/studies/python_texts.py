"""Domains of text that every Python carries or that are generated, for the zoo's own commands.

reference: the topics of Python's language reference. code: top-level modules of the standard
library. maths: generated word problems with their solutions. names: the names of characters in the
Unicode table. Their bytes depend on the version of Python.
"""

from __future__ import annotations

import random
import sysconfig
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moe_ops import _reading

DOMAINS = ("reference", "code", "maths", "names")
# Of each text's bytes; the held-out part is its end.
HELD_OUT = 0.1
_THINGS = ("pens", "eggs", "nuts", "cups", "maps", "keys", "hats", "figs")
_PEOPLE = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")
_PROBLEMS = 10_000


@dataclass(frozen=True)
class Text:
    """Bytes of a domain: train and held_out, uint8, 1-D."""

    train: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, text: bytes) -> Text:
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        end = int(len(data) * (1 - HELD_OUT))
        return cls(data[:end], data[end:])

    def draw(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """[count, length] from random places of `train`."""
        starts = torch.randint(len(self.train) - length + 1, (count,), generator=generator)
        return _rows(self.train, starts, length)

    def spread(self, count: int, length: int) -> Tensor:
        """[count, length] at even distances over `held_out`."""
        last = len(self.held_out) - length
        return _rows(self.held_out, torch.linspace(0, last, count).long(), length)


def _rows(data: Tensor, starts: Tensor, length: int) -> Tensor:
    return data[starts[:, None] + torch.arange(length)].long()


def load(names: Sequence[str] = DOMAINS, files: Mapping[str, str] | None = None) -> dict[str, Text]:
    """Texts by name; `files` gives further names their files.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown name, something that is no regular file, or a file of less than
            10,000 bytes.
    """
    readers: dict[str, Callable[[], bytes]] = {
        "reference": _reference,
        "code": _code,
        "maths": _maths,
        "names": _names,
    }
    for name, path in (files or {}).items():
        readers[name] = partial(_reading.read_bytes, path, "load")
    unknown = [name for name in names if name not in readers]
    if unknown:
        raise ValueError(
            f"load: names must be among {', '.join(readers)}, got {', '.join(unknown)}."
        )
    texts = {}
    for name in names:
        content = readers[name]()
        if len(content) < 10_000:
            where = f" ({files[name]})" if files and name in files else ""
            raise ValueError(
                f"load: {name}{where} must have 10000 bytes or more, got {len(content)}."
            )
        texts[name] = Text.of(content)
    return texts


def _reference() -> bytes:
    import pydoc_data.topics

    return "\n".join(pydoc_data.topics.topics.values()).encode()


def _code() -> bytes:
    folder = Path(sysconfig.get_path("stdlib"))
    return b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))


def _maths() -> bytes:
    draw = random.Random(0)
    lines = []
    for _ in range(_PROBLEMS):
        who, thing = draw.choice(_PEOPLE), draw.choice(_THINGS)
        a, b, c = draw.randint(2, 60), draw.randint(2, 30), draw.randint(2, 9)
        total = a + b
        lines.append(
            f"{who} had {a} {thing}, found {b} and gets {c} times as many. How many now? "
            f"{a}+{b}={total} {total}*{c}={total * c} #{total * c}"
        )
    return "\n".join(lines).encode()


def _names() -> bytes:
    found = (unicodedata.name(chr(i), "") for i in range(0x3000))
    lines = [name for name in found if name]
    # Neighbors stay together, but not whole scripts, of which the last would all be held out.
    blocks = [lines[i : i + 16] for i in range(0, len(lines), 16)]
    random.Random(0).shuffle(blocks)
    lines = [name for block in blocks for name in block]
    return "\n".join(lines).encode()
