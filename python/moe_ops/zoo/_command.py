"""Command lines of the zoo's systems: a folder, and an option for every field of their settings."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from moe_ops import _files

Settings = TypeVar("Settings")


def parse_settings(
    parser: argparse.ArgumentParser, settings: type[Settings], argv: Sequence[str] | None = None
) -> tuple[Settings, str, bool]:
    """The settings, the folder and whether to show progress.

    Args:
        settings: a dataclass whose fields are numbers, strings or tuples of strings, with defaults.
        argv: None: of the process.
    """
    parser.add_argument("--folder", required=True, help="of models, checkpoints and report.json")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    fields: Any = dataclasses.fields(settings)  # type: ignore[arg-type]
    for field in fields:
        several = isinstance(field.default, tuple)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=str if several else type(field.default),
            nargs="+" if several else None,
            default=field.default,
            help=f"default: {field.default}",
        )
    given = vars(parser.parse_args(argv))
    values = {field.name: given[field.name] for field in fields}
    made = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return settings(**made), given["folder"], not given["quiet"]


def settle(folder: Path, settings: Any, free: Iterable[str]) -> dict[str, Any]:
    """Keeps the settings of a command in its folder, and returns them as JSON has them.

    Args:
        free: fields that may differ between two commands on one folder: the models stay the same.

    Raises:
        ValueError: the folder is of other settings.
    """
    path = folder / "settings.json"
    now = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(settings).items()
    }
    kept = _files.read_json(path) if path.is_file() else now
    left_out = dict.fromkeys(free)
    if {**kept, **left_out} != {**now, **left_out}:
        raise ValueError(
            f"train: folder must hold models of these settings, got others in {folder}; remove "
            "them, or give another folder."
        )
    _files.write_json(path, now)
    return now
