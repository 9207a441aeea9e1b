"""The argument by which models and layers of transformers take a cache of keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

NAME = "cache"
OLDER_NAME = "past_key_values"  # Until transformers 5.20.


def cache_name(forward: Callable[..., Any]) -> str:
    """Returns the name that a forward has for it."""
    return NAME if NAME in inspect.signature(forward).parameters else OLDER_NAME


def find_cache(kwargs: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments under either name, or None."""
    cache = kwargs.get(NAME)
    return kwargs.get(OLDER_NAME) if cache is None else cache
