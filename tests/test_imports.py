"""Modules of the package import each other one way, also where an import stands in a function."""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[1] / "python"
# What must not be part of a circle, by the start of a module's name.
ONE_WAY = (
    "moe_ops._private_torch",
    "moe_ops.expert_weights",
    "moe_ops.hf",
    "moe_ops.memory",
    "moe_ops.ops",
    "moe_ops.packing",
    "moe_ops.quant",
)


@lru_cache
def modules() -> dict[str, Path]:
    paths = (ROOT / "moe_ops").rglob("*.py")
    parts = {p: p.relative_to(ROOT).with_suffix("").parts for p in paths}
    return {".".join(n[:-1] if n[-1] == "__init__" else n): p for p, n in parts.items()}


def imports(name: str) -> set[str]:
    """Modules of the package that `name` imports, and the packages around those, which run before
    them. Imports for type checkers do not count."""
    path, found = modules()[name], set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join(parts) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {n if n in modules() else base for n in names}
    for module in tuple(found):
        while module := module.rpartition(".")[0]:
            found.add(module)
    around = {name[:i] for i, letter in enumerate(name) if letter == "."}
    return {m for m in found & modules().keys() if m != "moe_ops"} - around - {name}


def reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    seen, todo = set(), [*graph[start]]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += graph[module]
    return seen


def test_no_circles():
    graph = {name: imports(name) for name in modules()}
    assert {"moe_ops.expert_weights", "moe_ops.quant.convert"} <= graph["moe_ops.layers.quantized"]
    circles = [
        name
        for name in graph
        if any(f"{name}.".startswith(f"{start}.") for start in ONE_WAY)
        and name in reachable(name, graph)
    ]
    assert not circles
