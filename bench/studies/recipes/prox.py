"""ProX: each document is refined by a small program of its own, which a model or rules write.

A program has an operation a line. Of a document: ``keep_doc()``, ``drop_doc()``. Of a chunk:
``keep_all()``, ``remove_lines(first, last)`` (numbers from 0, both included, of the chunk as it
was) and ``normalize("from", "to")``. Programs are read, and never run as Python.

Source: Zhou et al. 2024 (Programming Every Example: Lifting Pre-training Data Quality Like Experts
at Scale, arXiv 2409.17115).
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

# A document whose program has this many wrong operations stays as it is.
MAX_ERRORS = 2
# What is left of a chunk is dropped at this share of its words, or at so many words.
MIN_SHARE, MIN_WORDS = 0.05, 10
CHUNK_WORDS = 1500
Operation = tuple[str, tuple[Any, ...]]
_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "keep_doc": (), "drop_doc": (), "keep_all": (), "remove_lines": (int, int),
    "normalize": (str, str),
}  # fmt: skip


class Refined(NamedTuple):
    """text: None where it is dropped. errors: operations that could not be read or done. kept: the
    text is the original because of them."""

    text: str | None
    errors: int
    kept: bool


def parse(program: str) -> tuple[list[Operation], int]:
    """The operations of a program, and the number of lines that are none."""
    found, errors = [], 0
    for line in program.splitlines():
        if line.strip():
            operation = _operation(line.strip())
            errors += operation is None
            found += [] if operation is None else [operation]
    return found, errors


def _operation(line: str) -> Operation | None:
    try:
        call: Any = ast.parse(line, mode="eval").body
        name = call.func.id
        arguments = tuple(ast.literal_eval(a) for a in call.args)
        wanted = _ARGUMENTS[name]
    except (AttributeError, KeyError, MemoryError, RecursionError, SyntaxError, ValueError):
        return None
    kinds = tuple(type(a) for a in arguments)
    return None if call.keywords or kinds != wanted else (name, arguments)


def execute(text: str, program: str) -> Refined:
    """Runs a program on a document or a chunk.

    An operation that cannot be done (lines that are not there, a text that does not occur) is an
    error and does nothing. With two errors or more the text stays as it was. Otherwise it is
    dropped where `drop_doc` says so, and where ten words or a twentieth of its words are left, or
    fewer.
    """
    operations, errors = parse(program)
    lines: list[str] = text.split("\n")
    alive = [True] * len(lines)
    replaced, drop = [], False
    for name, arguments in operations:
        if name == "drop_doc":
            drop = True
        elif name == "remove_lines":
            first, last = arguments
            if 0 <= first <= last < len(lines):
                alive[first : last + 1] = [False] * (last + 1 - first)
            else:
                errors += 1
        elif name == "normalize":
            if arguments[0] and arguments[0] in text:
                replaced.append(arguments)
            else:
                errors += 1
    if errors >= MAX_ERRORS:
        return Refined(text, errors, True)
    if drop:
        return Refined(None, errors, False)
    if all(alive) and not replaced:
        return Refined(text, errors, False)
    refined = "\n".join(line for line, there in zip(lines, alive, strict=True) if there)
    for old, new in replaced:
        refined = refined.replace(old, new)
    left = len(refined.split())
    if left <= MIN_WORDS or left <= MIN_SHARE * len(text.split()):
        return Refined(None, errors, False)
    return Refined(refined, errors, False)


def chunks(text: str, words: int = CHUNK_WORDS) -> list[str]:
    """The text in pieces of whole lines with at most so many words, a longer line by itself; joined
    by line ends they are the text."""
    pieces: list[list[str]] = [[]]
    count = 0
    for line in text.split("\n"):
        length = len(line.split())
        if pieces[-1] and count + length > words:
            pieces.append([])
            count = 0
        pieces[-1].append(line)
        count += length
    return ["\n".join(piece) for piece in pieces]


def numbered(text: str) -> str:
    """Returns the text that a model that writes programs reads: each line behind its number in
    brackets."""
    return "\n".join(f"[{i:03d}] {line}" for i, line in enumerate(text.split("\n")))


def refine(
    documents: Iterable[str],
    of_document: Callable[[str], str] | None = None,
    of_chunk: Callable[[str], str] | None = None,
    *,
    words: int = CHUNK_WORDS,
) -> list[str]:
    """Documents that are left, refined.

    Args:
        of_document, of_chunk: text -> program: a model, or the rules below; None: keep all.
        words: of a chunk.
    """
    left = []
    for document in documents:
        if of_document is not None and execute(document, of_document(document)).text is None:
            continue
        pieces: list[str | None] = list(chunks(document, words))
        if of_chunk is not None:
            pieces = [execute(piece, of_chunk(piece)).text for piece in pieces if piece is not None]
        there = [piece for piece in pieces if piece is not None]
        if there:
            left.append("\n".join(there))
    return left


# ------------------------------------------------------------------------------- rules as refiners

_LINK = re.compile(r"https?://\S+|www\.\S+")
_RULE = re.compile(r"([=\-*_#~.])\1{4,}")
_MENU = re.compile(r"(\S+( \S+)? [|>»] ){2,}|click here|cookie|all rights reserved|subscribe", re.I)


def letters(text: str) -> float:
    """Share of letters among what is no space; 0 of nothing."""
    solid = [c for c in text if not c.isspace()]
    return sum(c.isalpha() for c in solid) / len(solid) if solid else 0.0


def document_program(text: str, least: float = 0.5) -> str:
    """Drops a document with a smaller share of letters."""
    return "keep_doc()" if letters(text) >= least else "drop_doc()"


def chunk_program(text: str, least: float = 0.5) -> str:
    """Removes lines that are mostly no letters, that look like menus and notices, or that occur
    three times and more; takes out links and long rules of one sign."""
    lines = text.split("\n")
    often = Counter(line.strip() for line in lines if line.strip())
    program = []
    for i, line in enumerate(lines):
        if line.strip() and (
            letters(line) < least or often[line.strip()] >= 3 or _MENU.search(line)
        ):
            program.append(f"remove_lines({i}, {i})")
    for pattern in (_LINK, _RULE):
        for found in sorted({match.group() for match in pattern.finditer(text)}, key=len)[::-1]:
            program.append(f"normalize({found!r}, '')")
    return "\n".join(program) or "keep_all()"
