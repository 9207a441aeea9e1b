"""Docstrings are sentences, and their examples are code: none opens with a word that leaves out its
subject or verb."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "moe_ops"
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


# A paragraph that is indented more than the one before it, which reStructuredText quotes as prose.
# The line before code ends with "::", or is "Example:", which docs/conf.py completes.
QUOTATION = re.compile(r"^( *)(\S.*)(?<!::)\n\n+\1 +\S", re.MULTILINE)


def quotations(path: Path) -> list[str]:
    """Returns the line before each indented paragraph that the site would show as prose."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for match in QUOTATION.finditer(ast.get_docstring(node) or ""):
                found.append(f"{path}:{getattr(node, 'lineno', 1)}: {match[2]!r}")
    return found


def test_examples_in_docstrings_are_code():
    found = [line for path in sorted(PACKAGE.rglob("*.py")) for line in quotations(path)]
    assert not found, 'These need "::" or "Example:" before the example:\n' + "\n".join(found)


def test_the_check_finds_examples(tmp_path):
    path = tmp_path / "probe.py"
    for lead, count in (("Adds.", 1), ("Adds::", 0)):
        path.write_text(f'"""{lead}\n\n    add(1, 2)\n\nMore.\n"""\n')
        assert len(quotations(path)) == count
