from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest

from moe_ops.parallel import (
    ExpertPlacement,
    LocalDispatcher,
    make_dispatcher,
    register_dispatcher,
    registry,
)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))


def name_of(num_ranks: int, num_experts: int, **kwargs: Any) -> str:
    for name in list(registry._factories):
        registry._factories[name] = lambda *_, name=name, **__: name
    return make_dispatcher(SimpleNamespace(size=lambda: num_ranks), num_experts, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_ranks", "num_experts", "options", "name"),
    [
        (1, 8, {"top_k": 2}, "local"),
        (2, 8, {"shared_batch": True}, "shared"),
        (2, 8, {"top_k": 8, "same_bits": True}, "slots"),
        (2, 128, {"top_k": 8}, "gather"),
        (4, 128, {"top_k": 8}, "gather"),
        (8, 128, {"top_k": 8}, "tokens"),
        (64, 256, {"top_k": 8}, "slots"),
        (2, 8, {"top_k": 2}, "tokens"),
        (2, 8, {"top_k": 1}, "slots"),
        (4, 8, {}, "tokens"),
    ],
)
def test_auto(num_ranks, num_experts, options, name):
    assert name_of(num_ranks, num_experts, **options) == name


@pytest.mark.parametrize(("num_experts", "num_ranks", "top_k"), [(8, 4, 3), (8, 2, 2), (6, 6, 2)])
def test_ranks_of_a_token(num_experts, num_ranks, top_k):
    share = num_experts // num_ranks
    sets = list(itertools.combinations(range(num_experts), top_k))
    mean = sum(len({e // share for e in s}) for s in sets) / len(sets)
    found = registry.ranks_of_a_token(num_experts, num_ranks, top_k)
    assert math.isclose(found, mean, rel_tol=1e-12)


def test_own_dispatchers():
    made = {}

    def factory(group: Any, placement: ExpertPlacement, **options: Any) -> str:
        made.update(group=group, placement=placement, **options)
        return "mine"

    register_dispatcher("mine", factory)
    assert make_dispatcher(None, 4, dispatch="mine", buffer=3) == "mine"
    assert made == {"group": None, "placement": ExpertPlacement.contiguous(4, 1), "buffer": 3}


def test_bad_arguments(bad_input):
    with bad_input("register_dispatcher", "name", "'slots'"):
        register_dispatcher("slots", LocalDispatcher)
    with bad_input("register_dispatcher", "name", "'auto'"):
        register_dispatcher("auto", LocalDispatcher)
    with bad_input("make_dispatcher", "dispatch", "'nobody'"):
        make_dispatcher(None, 4, dispatch="nobody")
    with bad_input("make_dispatcher", "top_k", "5"):
        make_dispatcher(None, 4, top_k=5)
    with bad_input("make_dispatcher", "placement", "3"):
        make_dispatcher(None, 4, placement=ExpertPlacement.contiguous(3, 1))
