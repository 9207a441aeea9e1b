"""Lookup of the formulas of transformers' modules, by the code of their class.

Each kind of module has a table: digest of the code (:mod:`moe_ops.hf.models.source`) -> an entry
with the formula and the attributes that it reads. Other classes are unknown unless `register` adds
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from torch import nn

from moe_ops.hf.models.source import Code, has_own_forward, is_of_transformers, path_of, read

KINDS = ("norm", "router", "network", "attention", "block", "layer")
_tables: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
_registered: dict[str, dict[type, Any]] = {kind: {} for kind in KINDS}
_codes: dict[type, Code | None] = {}


class Unknown(Exception):
    """Reason for which a module is not changed."""


def add_table(kind: str, entries: dict[str, Any]) -> None:
    """Adds entries by the digest of a class."""
    _tables[kind].update(entries)


def register(kind: str, cls: type, entry: Any) -> None:
    """Registers the formula of a class outside the tables. Its subclasses stay unknown."""
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_{kind}: cls must be a class of modules, got {cls!r}.")
    _registered[kind][cls] = entry


def own_class(cls: type) -> type:
    """Returns the class of a module before fusion."""
    return cls.__mro__[1] if "_moe_ops_kind" in cls.__dict__ else cls


def code_of(cls: type) -> Code | None:
    """Returns the code of the forward of a class, read again if a part of it was replaced."""
    code = _codes.get(cls)
    if code is None or not code.is_intact():
        code = _codes[cls] = read(cls)
    return code


def entry_of(kind: str, cls: type) -> Any:
    """Returns the entry of a class.

    Raises:
        Unknown: the class is neither in the table nor registered.
    """
    if cls in _registered[kind]:
        return _registered[kind][cls]
    if not is_of_transformers(cls):
        raise Unknown(
            f"{path_of(cls)} is not a class of transformers; moe_ops.hf.register_{kind} can say "
            "what it computes"
        )
    code = code_of(cls)
    entry = None if code is None else _tables[kind].get(code.digest)
    if entry is None:
        raise Unknown(
            f"moe_ops has no {kind} with the code that {path_of(cls)} has in transformers "
            f"{transformers.__version__}"
        )
    return entry


def find(kind: str, module: nn.Module) -> Any:
    """Returns the entry of a module.

    Raises:
        Unknown: its class is unknown, it has a patched forward, or it does not match the entry.
    """
    cls = own_class(type(module))
    if has_own_forward(module):
        raise Unknown(f"this {path_of(cls)} has a forward of its own")
    entry = entry_of(kind, cls)
    check: Callable[[nn.Module], str | None] = entry.why_not
    reason = check(module)
    if reason is not None:
        raise Unknown(f"{path_of(cls)}: {reason}")
    return entry


def parts_of(module: nn.Module) -> set[str]:
    """Returns the names of a module's submodules."""
    return {name for name, part in module._modules.items() if part is not None}


def unexpected_parts(module: nn.Module, expected: set[str], optional: set[str]) -> str | None:
    """Returns a sentence about a missing or unexpected submodule; None if there is none."""
    parts = parts_of(module)
    if missing := sorted(expected - parts):
        return f"it has no {missing[0]}"
    if more := sorted(parts - expected - optional):
        return f"it has a part {more[0]} that the formula does not read"
    return None
