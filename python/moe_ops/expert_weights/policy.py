"""Policies of automatic packing, and their environment variables."""

from __future__ import annotations

import os
import warnings
from typing import NamedTuple

POLICIES = ("auto", "off", "always")


class Settings(NamedTuple):
    policy: str
    max_bytes: int | None


def settings_from_environment() -> Settings:
    policy = os.environ.get("MOE_OPS_PACKING") or "auto"
    if policy not in POLICIES:
        warnings.warn(
            f"MOE_OPS_PACKING={policy} is not one of {', '.join(POLICIES)}; using auto.",
            stacklevel=2,
        )
        policy = "auto"
    megabytes = os.environ.get("MOE_OPS_PACKING_MB")
    if not megabytes:
        return Settings(policy, None)
    if not megabytes.isdecimal():
        warnings.warn(
            f"MOE_OPS_PACKING_MB={megabytes} is not a whole number of MiB; ignored.", stacklevel=2
        )
        return Settings(policy, None)
    return Settings(policy, int(megabytes) << 20)
