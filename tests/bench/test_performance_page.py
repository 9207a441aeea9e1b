"""The tables of docs/performance.md say what the recorded results say."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from bench.harness.files import RESULTS, ROOT

FILES = {
    "Zen 4, AVX-512": "epyc-zen4-2c",
    "Zen 4, AVX2": "epyc-zen4-2c-avx2",
    "Xeon, AVX-512": "xeon-sapphire-rapids-2c",
    "Xeon, AVX2": "xeon-sapphire-rapids-2c-avx2",
}
# Heading of a table -> mode of its cells, and which other ways it compares with.
TABLES: dict[str, tuple[str, Callable[[str], bool]]] = {
    "Forward, against transformers and plain torch": (
        "forward",
        lambda name: name.startswith(("HF", "per-expert", "widened")),
    ),
    "Forward, against the fastest library of all": (
        "forward",
        lambda name: not name.startswith("moe_ops"),
    ),
    "Training": ("training", lambda name: name == "HF grouped_mm"),
    "int8 and int4 weights": ("quantized", lambda name: name.startswith("ggml")),
}


def rows(heading: str) -> list[list[str]]:
    text = (ROOT / "docs" / "performance.md").read_text()
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def slowest_and_fastest(cells: list[dict], compared: Callable[[str], bool]) -> str:
    found = []
    for cell in cells:
        others = cell["contenders"].items()
        ratios = [c["ours_faster"] for name, c in others if compared(name) and "ours_faster" in c]
        found += [min(ratios)] if ratios else []
    ends = [f"{end(found):.2f}" for end in (min, max)] if found else ["–"]
    return "–".join(dict.fromkeys(ends))


@pytest.mark.parametrize("heading", TABLES)
def test_tables_are_what_the_results_say(heading):
    mode, compared = TABLES[heading]
    head, *body = rows(heading)
    tokens = [int(title.removeprefix("T = ")) for title in head[2:]]
    assert len(body) == 2 * len(FILES)
    for machine, weights, *shown in body:
        result = json.loads((RESULTS / f"{FILES[machine]}.json").read_text())
        for T, text in zip(tokens, shown, strict=True):
            cells = [
                cell
                for cell in result[mode]
                if (cell["weights"], cell["T"]) == (weights, T) and not cell.get("thp")
            ]
            assert text == slowest_and_fastest(cells, compared), (machine, weights, T)


def test_dates_and_commits_are_those_of_the_results():
    text = (ROOT / "docs" / "performance.md").read_text()
    for machine, name in FILES.items():
        result = json.loads((RESULTS / f"{name}.json").read_text())
        (line,) = [line for line in text.splitlines() if line.startswith(f"| [{machine}]")]
        assert result["date"][:10] in line and result["versions"]["commit"] in line
