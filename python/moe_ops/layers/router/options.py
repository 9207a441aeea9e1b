"""Checks of router arguments, and the options of a router class."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from moe_ops.formulas.scores import SCORE_FUNCS


def check(ok: bool, message: str) -> None:
    """Raises ValueError with the message unless `ok`."""
    if not ok:
        raise ValueError(f"Router: {message}.")


def check_score_func(score_func: str) -> None:
    check(
        score_func in SCORE_FUNCS,
        f"score_func must be one of {', '.join(SCORE_FUNCS)}, got {score_func!r}",
    )


def options_of(router: type[nn.Module]) -> dict[str, Any]:
    """Returns the keyword arguments of the constructors of a class and its bases, with defaults."""
    found: dict[str, Any] = {}
    for base in router.__mro__:
        if issubclass(base, nn.Module) and base is not nn.Module and "__init__" in vars(base):
            for parameter in inspect.signature(base.__init__).parameters.values():
                if parameter.kind is parameter.KEYWORD_ONLY:
                    found.setdefault(parameter.name, parameter.default)
    return found
