"""Attempts to fool `optimize`; tests/hf/fooled.py says what one is and what must come of it."""

from __future__ import annotations

import pytest

from . import fooled_caches, fooled_classes, fooled_large, fooled_settings
from .fooled import carry_out

TABLES = (fooled_classes, fooled_large, fooled_settings, fooled_caches)
ATTEMPTS = [attempt for table in TABLES for attempt in table.ATTEMPTS]


@pytest.mark.cpu_only
@pytest.mark.parametrize("attempt", ATTEMPTS, ids=[a.name for a in ATTEMPTS])
def test_attempt(attempt, monkeypatch):
    carry_out(attempt, monkeypatch)


def test_names_are_unique():
    names = [attempt.name for attempt in ATTEMPTS]
    assert len(names) == len(set(names)) > 200
