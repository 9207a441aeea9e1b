"""The command ``python -m bench.studies train SYSTEM --folder FOLDER``.

It trains the arms of one system of the zoo, measures them, draws what the system has to draw, and
writes report.json. An option for every field of the system's settings changes them; what is done in
the folder is not done again, and what was cut goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from moe_ops._fields import check_choice

from . import language, one_seed, registry
from .settings import parse_settings

# Trained as they are, on texts.
LANGUAGE_MODELS = ("coe", "deepseek", "jetmoe", "kolibri", "llama", "moduleformer", "topp")
# With arms, settings and a training module of their own.
WITH_SETTINGS = (
    "adamoe", "bam", "composition", "driftmoe", "dynamicdino", "factorllm", "gntmove", "mofme",
    "sentence", "thor", "widenet",
)  # fmt: skip
# One seed of a study.
BY_STUDY = tuple(name for name in registry.NAMES if name not in LANGUAGE_MODELS + WITH_SETTINGS)
SYSTEMS = LANGUAGE_MODELS + WITH_SETTINGS + BY_STUDY


def main(argv: Sequence[str]) -> int:
    name = argv[0] if argv else ""
    check_choice("train", "system", name, SYSTEMS)
    module: Any = language if name in LANGUAGE_MODELS else one_seed
    train = partial(module.train, name)
    if name in WITH_SETTINGS:
        module = importlib.import_module(f"{__package__}.{name}.training")
        train = module.train
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.studies train {name}", description=module.__doc__
    )
    settings, folder, progress = parse_settings(parser, module.Settings, argv[1:])
    for line in lines(train(folder, settings, progress=progress)):
        print(line)
    return 0


def lines(report: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Yields a line per group of numbers in a report, settings apart."""
    numbers = {k: v for k, v in report.items() if isinstance(v, int | float)}
    if numbers:
        yield f"{place:24} " + "  ".join(f"{name} {v:.4g}" for name, v in numbers.items())
    for name, found in report.items():
        if isinstance(found, Mapping) and name != "settings":
            yield from lines(found, f"{place} {name}".strip())
