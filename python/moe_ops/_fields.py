"""Validation of values from untrusted files and of configs."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from moe_ops._files import shown

# No dimension of a tensor is larger; larger values only overflow products of sizes.
MAX_SIZE = 2**31 - 1
_NEEDED: Any = object()


class Fields:
    """Reads the entries of a config.json by type.

    A null entry counts as missing. Each method takes several names, uses the first that exists, and
    raises ValueError with a sentence that starts with `reader`.

    Args:
        values: contents of the file.
        reader: name of the reader: "JetMoEConfig".
        where: name of the source.
    """

    def __init__(self, values: Mapping[str, Any], reader: str, where: str = "config.json") -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"{reader}: {where} must hold an object, got {shown(values)}.")
        self.values = values
        self.reader = reader
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def size(self, *names: str, default: Any = _NEEDED, least: int = 1) -> Any:
        """Returns an integer of at least `least`."""
        name, value = self._find(names, default)
        if name is None:
            return value
        if not _is_whole(value) or not least <= value <= MAX_SIZE:
            self._refuse(name, f"a whole number from {least} to {MAX_SIZE}", value)
        return value

    def number(
        self,
        *names: str,
        default: Any = _NEEDED,
        above: float = -math.inf,
        least: float = -math.inf,
    ) -> Any:
        """Returns a finite number greater than `above` and not less than `least`."""
        name, value = self._find(names, default)
        if name is None:
            return value
        if not _is_finite(value) or value <= above or value < least:
            bound = f" above {above:g}" if above > -math.inf else ""
            bound = bound or (f" of at least {least:g}" if least > -math.inf else "")
            self._refuse(name, f"a finite number{bound}", value)
        return float(value)

    def flag(self, *names: str, default: Any = _NEEDED) -> Any:
        """Returns true or false."""
        name, value = self._find(names, default)
        if name is not None and not isinstance(value, bool):
            self._refuse(name, "true or false", value)
        return value

    def choice(self, *names: str, of: typing.Iterable[str], default: Any = _NEEDED) -> Any:
        """Returns one of the given words."""
        name, value = self._find(names, default)
        words = tuple(of)
        if name is not None and not (isinstance(value, str) and value in words):
            self._refuse(name, f"one of {', '.join(words)}", value)
        return value

    def section(self, name: str) -> Fields:
        """Returns a nested object, empty if it is missing."""
        value = self.values.get(name)
        return Fields({} if value is None else value, self.reader, name)

    def must_be(self, name: str, wanted: Any) -> None:
        """Raises ValueError if the entry exists with another value."""
        value = self.values.get(name, wanted)
        if type(value) is not type(wanted) or value != wanted:
            self._refuse(name, repr(wanted), value)

    def _find(self, names: tuple[str, ...], default: Any) -> tuple[str | None, Any]:
        for name in names:
            if self.values.get(name) is not None:
                return name, self.values[name]
        if default is _NEEDED:
            raise ValueError(f"{self.reader}: {self.where} must have {names[0]}, got none.")
        return None, default

    def _refuse(self, name: str, wanted: str, value: Any) -> typing.NoReturn:
        raise ValueError(f"{self.reader}: {name} must be {wanted}, got {shown(value)}.")


def check_names(kind: type, names: typing.Iterable[str], reader: str) -> None:
    """Raises ValueError if a dataclass has no fields of these names."""
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(
            f"{reader}: fields must be among {', '.join(sorted(known))}, got "
            f"{', '.join(map(shown, unknown))}."
        )


def check_choice(reader: str, name: str, value: Any, of: typing.Iterable[str]) -> None:
    """Raises ValueError if an argument or a field is not one of the given words."""
    words = tuple(of)
    if value not in words:
        raise ValueError(f"{reader}: {name} must be one of {', '.join(words)}, got {value!r}.")


def check_least(reader: str, name: str, value: float, least: float) -> None:
    """ValueError where a number is below the least that it may be, or is none."""
    if not value >= least:
        raise ValueError(f"{reader}: {name} must be at least {least}, got {value}.")


def check_divides(reader: str, name: str, value: int, of: str, whole: float) -> None:
    """ValueError where `name` does not divide what `of` calls a whole."""
    if value < 1 or whole % value:
        raise ValueError(f"{reader}: {name} must divide {of} = {whole:g}, got {value}.")


def check_types(values: Any, reader: str) -> None:
    """Raises ValueError if a field of a dataclass has another type than declared.

    Integers are accepted as floats; numbers must be finite, and integers neither negative nor
    larger than the maximum size.
    """
    hints = typing.get_type_hints(type(values))
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if not _fits(value, hints[field.name], reader):
            wanted = str(field.type).replace("|", "or").replace("int", "whole number")
            raise ValueError(f"{reader}: {field.name} must be {wanted}, got {shown(value)}.")


Config = typing.TypeVar("Config")


def overridden(config: Config, overrides: dict[str, Any]) -> Config:
    """Returns a dataclass with some fields replaced, checked with `check_names` and `check_types`
    under the name of its class."""
    reader = type(config).__name__
    check_names(type(config), overrides, reader)
    changed = dataclasses.replace(config, **overrides)  # type: ignore[type-var]
    check_types(changed, reader)
    return changed


def _fits(value: Any, hint: Any, reader: str) -> bool:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option, reader) for option in typing.get_args(hint))
    if origin is tuple:
        inner = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        if len(inner) == 2 and inner[1] is Ellipsis:
            return all(_fits(entry, inner[0], reader) for entry in value)
        return len(value) == len(inner) and all(
            _fits(entry, kind, reader) for entry, kind in zip(value, inner, strict=True)
        )
    if hint is int:
        return _is_whole(value) and 0 <= value <= MAX_SIZE
    if hint is float:
        return _is_finite(value)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, typing.cast(type, hint)):
            return False
        check_types(value, f"{reader}.{typing.cast(type, hint).__name__}")
        return True
    return isinstance(value, hint)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # An integer beyond the range of floats.
        return False
