"""Counts the public names: what a module that users import lists in `__all__`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import moe_ops.zoo

MOST = 300
MODULES = (
    "moe_ops",
    "moe_ops.hf",
    "moe_ops.layers",
    "moe_ops.memory",
    "moe_ops.offload",
    "moe_ops.parallel",
    "moe_ops.parallel.plan",
    "moe_ops.quant",
    "moe_ops.surgery",
    "moe_ops.surgery.rules",
    "moe_ops.upcycle",
    "moe_ops.viz",
    "moe_ops.zoo",
    *(
        f"moe_ops.zoo.{module.name}"
        for module in pkgutil.iter_modules(moe_ops.zoo.__path__)
        if not module.name.startswith("_")
    ),
)


def public(module: str) -> dict[str, object]:
    """Returns the public objects of a module by name."""
    found = importlib.import_module(module)
    return {name: getattr(found, name) for name in getattr(found, "__all__", ())}


def test_there_are_at_most_300_public_names():
    names = {module: sorted(public(module)) for module in MODULES}
    # A name that two modules export is one name.
    objects = {(name, id(value)) for module in MODULES for name, value in public(module).items()}
    counts = ", ".join(f"{module} {len(listed)}" for module, listed in names.items())
    assert len(objects) <= MOST, f"{len(objects)} public names: {counts}"


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_documented(module):
    for name, value in public(module).items():
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{module}.{name} has no docstring"
