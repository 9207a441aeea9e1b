"""Runs of a model that leave its mode as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


@contextlib.contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode, and its training modules back."""
    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def call_model(model: nn.Module, batch: Any) -> Any:
    """Calls a model with a mapping of keyword arguments, a tuple of positional ones, or one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)
