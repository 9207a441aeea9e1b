"""Draws docs/packages.svg: the packages of moe_ops and what they import. In the source tree:

    python docs/draw_packages.py

Floors and imports are those of tests/test_imports.py, which also tests that the picture is current.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "packages.svg"
WIDTH, ROW, HEIGHT, GAP, MARGIN = 860, 58, 26, 22, 14
NAMES = {"moe_ops": "import moe_ops"}
LEFT_OUT = {"base"}  # Files beside the packages, which most of them import.


def package_imports() -> dict[str, set[str]]:
    """Returns the packages that each package imports, at any depth of its files."""
    from tests.test_imports import graph, part_of

    found: dict[str, set[str]] = {}
    for name, others in graph().items():
        if part_of(name) in LEFT_OUT:
            continue
        wanted = {part_of(other) for other in others} - {part_of(name)} - LEFT_OUT
        found.setdefault(part_of(name), set()).update(wanted)
    return found


def reduced(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """Returns the imports that do not follow from others: a -> c goes where a -> b -> c is."""

    def reach(name: str) -> set[str]:
        below: set[str] = set()
        for other in imports.get(name, set()):
            below |= {other} | reach(other)
        return below

    return {
        name: {other for other in others if not any(other in reach(o) for o in others)}
        for name, others in imports.items()
    }


def drawing() -> str:
    """Returns the SVG: a box per package, the lowest floor at the bottom, and lines to imports."""
    from tests.test_imports import ORDER

    boxes: dict[str, tuple[float, float, float]] = {}
    height = MARGIN * 2 + ROW * (len(ORDER) - 1) + HEIGHT
    # Floors of one package alternate between columns, so that lines do not hide behind boxes.
    shift = (0, 230, -230)
    for level, floor in enumerate(ORDER):
        packages = [name for name in floor if name not in LEFT_OUT]
        widths = [16 + 7.4 * len(NAMES.get(name, name)) for name in packages]
        total = sum(widths) + GAP * (len(packages) - 1)
        x = (WIDTH - total) / 2 + (shift[level % 3] if len(packages) == 1 else 0)
        y = height - MARGIN - HEIGHT - level * ROW
        for name, width in zip(packages, widths, strict=True):
            boxes[name] = (x, y, width)
            x += width + GAP
    lines = []
    for name, others in sorted(reduced(package_imports()).items()):
        x, y, width = boxes[name]
        for other in sorted(others):
            x2, y2, width2 = boxes[other]
            start, end = x + width / 2, x2 + width2 / 2
            middle = (y + HEIGHT + y2) / 2
            lines.append(
                f'<path d="M{start:.0f} {y + HEIGHT:.0f}C{start:.0f} {middle:.0f} {end:.0f} '
                f'{middle:.0f} {end:.0f} {y2:.0f}"/>'
            )
    shapes = [
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{w:.0f}" height="{HEIGHT}" rx="4"/>'
        f'<text x="{x + w / 2:.0f}" y="{y + 17:.0f}">{escape(NAMES.get(name, name))}</text>'
        for name, (x, y, w) in boxes.items()
    ]
    style = (
        "path{fill:none;stroke:#8a8f98}rect{fill:#eef2f7;stroke:#4a5568}"
        "text{font:13px monospace;text-anchor:middle;fill:#1a202c}"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">',
            f"<style>{style}</style>",
            '<rect width="100%" height="100%" style="fill:#fff;stroke:none"/>',
            *lines,
            *shapes,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PICTURE.write_text(drawing())
    print(f"Wrote {PICTURE.relative_to(ROOT)}.")
