"""Attempts to fool `optimize`; tests/hf/fooled.py says what one is and what must come of it."""

from __future__ import annotations

import pytest

from . import fooled_caches, fooled_classes, fooled_settings
from .fooled import carry_out

ATTEMPTS = [*fooled_classes.ATTEMPTS, *fooled_settings.ATTEMPTS, *fooled_caches.ATTEMPTS]


@pytest.mark.cpu_only
@pytest.mark.parametrize("attempt", ATTEMPTS, ids=[a.name for a in ATTEMPTS])
def test_attempt(attempt, monkeypatch):
    carry_out(attempt, monkeypatch)


def test_names_are_unique():
    names = [attempt.name for attempt in ATTEMPTS]
    assert len(names) == len(set(names)) > 100
