"""Name of the KV cache argument of models and layers of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

NAME = "cache"
OLDER_NAME = "past_key_values"  # Until transformers 5.20.


def cache_name(forward: Callable[..., Any]) -> str:
    """Returns the name of the argument in a forward."""
    return NAME if NAME in inspect.signature(forward).parameters else OLDER_NAME


def find_cache(kwargs: Mapping[str, Any]) -> Any:
    """Returns the cache among keyword arguments under either name, or None."""
    cache = kwargs.get(NAME)
    return kwargs.get(OLDER_NAME) if cache is None else cache
