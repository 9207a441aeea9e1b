"""Docstrings are sentences: none opens with a word that leaves out its subject or verb."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# "Of each row, ...", "What ... returns", "Whether ...", "As on the CPU." A reader must guess.
FRAGMENT = re.compile(r"(Of|What|Whether|How|As|The same|Like what|Which|Where|When)\b")
FOLDERS = ("python/moe_ops", "bench", "examples", "docs", "tests", "integrations")


def fragments(path: Path) -> list[str]:
    """Returns line and first words of each docstring that is a fragment."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and FRAGMENT.match(text):
                found.append(f"{path}:{getattr(node, 'lineno', 1)}: {text[:60]!r}")
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_are_sentences(folder):
    found = [line for path in sorted((ROOT / folder).rglob("*.py")) for line in fragments(path)]
    assert not found, f"{len(found)} docstrings are fragments:\n" + "\n".join(found)


def test_the_check_finds_fragments(tmp_path):
    path = tmp_path / "probe.py"
    path.write_text('def f():\n    """Of `x`, without."""\n\ndef g():\n    """Returns x."""\n')
    assert len(fragments(path)) == 1
