"""Presets of configs: named sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

Config = TypeVar("Config")


class preset:
    """Named values of a config's fields, used as an attribute of its class.

    Example:
        tiny = preset("Bytes, two blocks.", hidden_size=64)
        wide = tiny.but("Twice as wide.", hidden_size=128)

    `Config.tiny()` is the config with these values and the class defaults for all other fields.
    """

    def __init__(self, about: str, **values: Any) -> None:
        self.__doc__, self.values = about, values

    def but(self, about: str, **values: Any) -> preset:
        """Returns a preset with other values for some fields."""
        return preset(about, **{**self.values, **values})

    def __get__(self, config: Any, config_class: type[Config]) -> Callable[[], Config]:
        return partial(config_class, **self.values)


def presets_of(config_class: type) -> tuple[str, ...]:
    """Returns the names of a class's presets and of those that it inherits, "tiny" first."""
    found = {n: v for c in reversed(config_class.__mro__) for n, v in vars(c).items()}
    names = [name for name, value in found.items() if isinstance(value, preset)]
    return tuple(sorted(names, key=lambda name: name != "tiny"))
