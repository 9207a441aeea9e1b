"""The oldest transformers version that moe_ops.hf supports."""

from __future__ import annotations

import re

# The first version with custom experts implementations.
TRANSFORMERS_FLOOR = "5.7"


def transformers_is_too_old(version: str) -> bool:
    return _release(version) < _release(TRANSFORMERS_FLOOR)


def too_old_message(version: str) -> str:
    return (
        f"moe_ops.hf needs transformers {TRANSFORMERS_FLOOR} or newer and found {version}: "
        f'pip install --upgrade "transformers>={TRANSFORMERS_FLOOR}"'
    )


def _release(version: str) -> tuple[int, int]:
    major, minor, *_ = [*re.findall(r"\d+", version), "0", "0"]
    return int(major), int(minor)
