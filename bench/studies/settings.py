"""Command lines of the zoo's systems: a folder, and an option for every field of their settings."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
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


def settings_folder(
    folder: Path | str, settings: Any, what: str, free: Sequence[str]
) -> tuple[Path, dict[str, Any]]:
    """The folder, made if it is not there, and the settings as JSON, which are kept in it.

    Args:
        settings: a dataclass. what: the folder holds, in the plural.
        free: fields that may differ from those of an earlier run into the folder.

    Raises:
        ValueError: the folder is of other settings.
    """
    folder = _files.make_folder(folder)
    now = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(settings).items()
    }
    path = folder / "settings.json"
    try:
        kept = _files.read_json(path)
    except FileNotFoundError:
        kept = now
    except ValueError as error:
        raise ValueError(f"train: {error}.") from None
    if any(kept.get(name) != now.get(name) for name in {*kept, *now} - set(free)):
        raise ValueError(
            f"train: folder must hold {what} of these settings, got others in {folder}; remove "
            "them, or give another folder."
        )
    _files.write_json(path, now)
    return folder, now
