"""Imports inside the package point one way: between its parts, and between any two files.

Imports of all kinds count: those at the top of a file, those inside functions, and those for type
checkers only. One that is deferred into a function to hide a circle is still a circle.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

import moe_ops

PACKAGE = Path(moe_ops.__file__).parent

FRONT = "moe_ops"  # The names that `import moe_ops` gives, in __init__.py.
BASE = "base"  # Files at the top of the package that are no part of their own.

# The parts of the package from the lowest on: a part may import from those of earlier lines.
ORDER = (
    (BASE, "reference"),
    ("numerics",),
    ("formulas",),
    ("ops",),
    ("memory",),
    ("expert_weights",),
    ("packing",),
    ("layers",),
    ("quant",),
    (FRONT,),
    ("offload", "parallel", "lora", "upcycle", "onnx", "torchtitan"),
    ("hf",),
    ("testing", "viz", "self_test"),
    ("doctor",),
    ("zoo",),
    ("surgery",),
    ("bench",),
    ("demo",),
    ("cli",),
)
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}


@lru_cache
def modules() -> dict[str, Path]:
    """All modules by their dotted names; a folder goes by its own name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str) -> set[str]:
    """Modules of the package that a module imports anywhere in its text."""
    path = modules()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join((above if node.level else []) + [node.module] * bool(node.module))
            names = {f"{base}.{alias.name}" for alias in node.names}
            # `from package import name` reads a module of that name, or what the package has.
            found |= {n if n in modules() else base for n in names}
    return {n for n in found if n in modules() and n != name}


@lru_cache
def graph() -> dict[str, set[str]]:
    return {name: imports_of(name) for name in modules()}


def part_of(name: str) -> str:
    parts = name.split(".")
    if len(parts) == 1:
        return FRONT
    if parts[-1] == "__main__":  # python -m moe_ops.PART is a command
        return "cli"
    return parts[1] if parts[1] in LEVEL else BASE


def circles() -> list[set[str]]:
    """Strongly connected components of more than one module, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph()[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            start = stack.index(name)
            if len(stack) - start > 1:
                found.append(set(stack[start:]))
            del stack[start:]

    for name in sorted(graph()):
        if name not in index:
            visit(name)
    return found


def wrong_way() -> set[tuple[str, str]]:
    return {
        (name, other)
        for name, others in graph().items()
        for other in others
        if part_of(name) != part_of(other) and LEVEL[part_of(other)] >= LEVEL[part_of(name)]
    }


def test_every_part_has_its_place():
    folders = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert folders <= set(LEVEL), f"give {sorted(folders - set(LEVEL))} a place in ORDER"


def test_imports_point_one_way():
    wrong = sorted(f"{name} imports {other}" for name, other in wrong_way())
    assert not wrong, "; ".join(wrong)


def test_there_are_no_circles():
    found = circles()
    assert not found, f"these import each other: {[sorted(circle) for circle in found]}"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("import moe_ops.layers.moe", {"moe_ops.layers.moe"}),
        ("from . import moe", {"moe_ops.layers.moe"}),
        ("from .moe import MoE", {"moe_ops.layers.moe"}),
        ("from ..ops import topk_router", {"moe_ops.ops.topk_router"}),
        ("from moe_ops.numerics import is_batch_invariant_enabled", {"moe_ops.numerics"}),
        ("def f():\n    from .moe import MoE", {"moe_ops.layers.moe"}),
        ("if TYPE_CHECKING:\n    from .moe import MoE", {"moe_ops.layers.moe"}),
        ("import torch\nfrom torch import nn", set()),
    ],
)
def test_what_counts_as_an_import(text, wanted, tmp_path, monkeypatch):
    path = tmp_path / "probe.py"
    path.write_text(text)
    monkeypatch.setitem(modules(), "moe_ops.layers.probe", path)
    assert imports_of("moe_ops.layers.probe") == wanted


def reached(name: str) -> set[str]:
    """Returns the modules that importing a module reads, at any depth, deferred imports too."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        module = waiting.pop()
        if module not in found and module != FRONT:  # It imports quantization when asked.
            found.add(module)
            waiting += [*graph()[module], module.rpartition(".")[0] or module]
    return found


def test_layers_reach_few_files():
    """Above the ops and their formulas, which `import moe_ops` reads, and the reference."""
    below = ("ops", "formulas", "reference")
    above = {name for name in reached("moe_ops.layers") if part_of(name) not in below}
    assert len(above) <= 70, f"{len(above)} files: {sorted(above)}"


def test_the_picture_of_the_packages_is_current():
    path = Path(__file__).parents[1] / "docs" / "draw_packages.py"
    spec = importlib.util.spec_from_file_location("draw_packages", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    current = script.drawing()
    assert script.PICTURE.read_text() == current, "run python docs/draw_packages.py"


# Modules that compare the library with the reference, and the front, whose attribute it is.
COMPARE = {f"{FRONT}.self_test", f"{FRONT}.doctor", f"{FRONT}.testing", FRONT}
ORACLE = f"{FRONT}.reference"


def is_oracle(name: str) -> bool:
    return name == ORACLE or name.startswith(f"{ORACLE}.")


def test_only_comparisons_import_the_reference():
    found = {n for n, others in graph().items() if not is_oracle(n) and any(map(is_oracle, others))}
    assert found <= COMPARE, f"{sorted(found - COMPARE)} import the reference"
    testing = {n for n, others in graph().items() if f"{FRONT}.testing" in others}
    assert not testing, f"{sorted(testing)} import moe_ops.testing, and the reference with it"


def test_the_reference_imports_nothing_of_the_package():
    """It shares no text with what is compared with it."""
    wrong = {
        f"{n} imports {o}" for n in graph() if is_oracle(n) for o in graph()[n] if not is_oracle(o)
    }
    assert not wrong, "; ".join(sorted(wrong))


def test_the_front_imports_the_reference_when_it_is_read():
    code = (
        "import sys, moe_ops, moe_ops.layers, moe_ops.hf, moe_ops.quant, moe_ops.surgery\n"
        "assert not [m for m in sys.modules if m.startswith('moe_ops.reference')]\n"
        "assert moe_ops.reference.topk_router.__module__ == 'moe_ops.reference.topk_router'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
