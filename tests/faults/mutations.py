"""Seeded damage to files: bits, blocks, numbers, text, and other things in their place."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUMBERS = (0, -1, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
VALUES = (
    None, True, "x", "", -1, 0, 1, 3.5, 1e300, float("nan"), 2**31, 2**63, 10**30, [], [1], [[]],
    {}, {"a": 1}, "\ud800", "x" * 5000, [None] * 50, "F32", "F4", "F8_E8M0", "I64", "C64",
)  # fmt: skip
DIGEST = hashlib.sha256().digest_size


def mutate(
    path: Path, rng: random.Random, *, sealed: bool = False, json_only: bool = False
) -> tuple[str, bool]:
    """Damages a file; returns how, and whether something else than a regular file is there now.

    Args:
        sealed: half of the damage is given a right SHA-256 at its end, as somebody would who
            makes such a file on purpose; the text then says "forged".
        json_only: another value in JSON is the only damage.
    """
    if json_only:
        said, damaged = _json_value(path.read_bytes(), rng)
        path.write_bytes(damaged)
        return said, False
    if rng.random() < 0.12:
        return _other(path, rng), True
    content = path.read_bytes()
    forged = sealed and rng.random() < 0.5
    body = content[:-DIGEST] if forged else content
    said, damaged = _damaged(body, rng)
    if forged:
        said, damaged = f"forged, {said}", damaged + hashlib.sha256(damaged).digest()
    path.write_bytes(damaged)
    return said, False


def _damaged(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    kinds: list[Callable[[bytes, random.Random], tuple[str, bytes]]] = [
        *(_flip, _flip, _flip, _cut, _insert, _repeat, _swap, _erase, _number, _number, _text),
    ]
    begin = _header(content)
    if begin is not None:
        kinds += [_json_value] * 4 + [_json_digits] * 2
    return rng.choice(kinds)(content, rng)


def _header(content: bytes) -> tuple[int, int] | None:
    """Returns where JSON begins and ends in a JSON file, or in the header of safetensors."""
    if content[:1] in (b"{", b"["):
        return 0, len(content)
    length = int.from_bytes(content[:8], "little")
    if content[8:9] == b"{" and 0 < length <= len(content) - 8:
        return 8, 8 + length
    return None


def _span(content: bytes, rng: random.Random) -> int:
    """A place, in half of the cases near the beginning."""
    most = len(content) if rng.random() < 0.5 else min(len(content), 600)
    return rng.randrange(max(most, 1))


def _flip(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    damaged = bytearray(content)
    places = [_span(content, rng) for _ in range(rng.choice((1, 1, 1, 4)))]
    for place in places:
        damaged[place] ^= 1 << rng.randrange(8)
    return f"bits of bytes {places}", bytes(damaged)


def _cut(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    place = rng.choice((_span(content, rng), len(content) - 1, 0, 8))
    return f"cut at {place}", content[:place]


def _block(content: bytes, rng: random.Random) -> tuple[int, int]:
    start = _span(content, rng)
    return start, min(len(content), start + rng.choice((1, 8, 64, 512)))


def _insert(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    place, more = _span(content, rng), rng.randbytes(rng.choice((1, 8, 100)))
    return f"{len(more)} bytes put in at {place}", content[:place] + more + content[place:]


def _repeat(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    start, end = _block(content, rng)
    return f"bytes {start} to {end} twice", content[:end] + content[start:]


def _swap(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    size = rng.choice((1, 8, 64))
    damaged = bytearray(content)
    a, b = _span(content, rng), _span(content, rng)
    first, second = bytes(damaged[a : a + size]), bytes(damaged[b : b + size])
    damaged[a : a + size], damaged[b : b + size] = second, first
    return f"{size} bytes at {a} and {b} swapped", bytes(damaged)


def _erase(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    start, end = _block(content, rng)
    filler = rng.choice((b"\0", b"\xff", b"{", b"["))
    return f"{filler!r} from {start} to {end}", content[:start] + filler * (end - start) + content[
        end:
    ]


def _number(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    size, value = rng.choice((4, 8)), rng.choice((*NUMBERS, len(content), len(content) + 1))
    place = rng.choice((0, 4, 8, 16, 24, _span(content, rng), _span(content, rng) // 4 * 4))
    packed = (value & (2 ** (8 * size) - 1)).to_bytes(size, "little")
    return f"{value} at {place}", content[:place] + packed + content[place + size :]


def _text(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    words = [match.span() for match in re.finditer(rb"[A-Za-z_.]{3,}", content[:20_000])]
    if not words:
        return _flip(content, rng)
    start, end = rng.choice(words)
    other = rng.choice((b"\xff\xfe", b"\xc3(", b"", b"\0" * (end - start), b"a" * (end - start)))
    return f"{content[start:end]!r} is {other!r}", content[:start] + other + content[end:]


def _rewritten(content: bytes, text: bytes) -> bytes:
    start, end = _header(content) or (0, len(content))
    if start:
        return len(text).to_bytes(8, "little") + text + content[end:]
    return text


def _json_digits(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    start, end = _header(content) or (0, len(content))
    numbers = [match.span() for match in re.finditer(rb"\d+", content[start:end])]
    if not numbers:
        return _flip(content, rng)
    first, last = rng.choice(numbers)
    text = content[start:end]
    value = str(rng.choice((*NUMBERS, "9" * 5000, "1e999", "-0", "1.5"))).encode()
    return f"number at {first} is {value[:20]!r}", _rewritten(
        content, text[:first] + value + text[last:]
    )


def _json_value(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Another value, or none, or another name, somewhere in the JSON."""
    start, end = _header(content) or (0, len(content))
    try:
        values = json.loads(content[start:end])
    except ValueError:
        return _flip(content, rng)
    place: Any = values
    said = ""
    while isinstance(place, (dict, list)) and place:
        key = rng.choice(sorted(place)) if isinstance(place, dict) else rng.randrange(len(place))
        said += f".{key}"
        inner = place[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
            place = inner
            continue
        change = rng.random()
        if change < 0.15:
            del place[key]
            said += " removed"
        elif change < 0.25 and isinstance(place, dict):
            place[f"{key}x"] = place.pop(key)
            said += " renamed"
        elif change < 0.35 and isinstance(place, dict):
            other = rng.choice(sorted(place))
            place[key], place[other] = place[other], place[key]
            said += f" swapped with {other}"
        elif change < 0.5 and type(inner) is int:
            place[key] = inner + rng.choice((-1, 1, inner))
            said += f" is {place[key]}"
        else:
            place[key] = rng.choice(VALUES)
            said += f" is {str(place[key])[:30]!r}"
        break
    else:
        values = rng.choice(VALUES)
    return f"JSON{said}", _rewritten(content, json.dumps(values).encode())


def _other(path: Path, rng: random.Random) -> str:
    kind = rng.choice(
        ("empty", "pipe", "pipe", "folder", "socket", "device", "circle", "deep", "absent")
    )
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        here = os.open(path.parent, os.O_RDONLY)
        try:  # The name of a socket is short.
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(f"/proc/self/fd/{here}/{path.name}")
        finally:
            os.close(here)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "circle":
        path.symlink_to(path)
    elif kind == "deep":
        path.write_text("[" * 200_000)
    return kind
