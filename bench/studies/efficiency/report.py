"""The table and the picture of docs/zoo/efficiency.md, made from the stored results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.studies.page import PAGES, fill
from bench.studies.picture import write_svg

from .claims import CLAIMS, FLOPS, PARAMETERS, TIME, Claim

PAGE = PAGES / "efficiency.md"
PICTURE = PAGES / "efficiency-ratios.svg"
DASH = "–"


def write(result: Mapping[str, Any], page: Path = PAGE, picture: Path = PICTURE) -> list[Path]:
    """Writes the page's tables and the picture; returns the paths."""
    draw(result, picture)
    return [fill(page, body(result)), picture]


def body(result: Mapping[str, Any]) -> str:
    """Returns the text between the marks of the page."""
    machine, claims = result["machine"], result["claims"]
    missing = [f"`{name}`" for name in CLAIMS if not claims.get(name, {}).get("measured")]
    parts = [
        f"Measured on {machine['cores']} cores of {machine['cpu']}. Counted and measured values "
        "are ratios to the baseline; below 1, the arm is cheaper.",
        "\n".join(table(claims)),
        f"![Published, counted and measured ratios to the baseline]({PICTURE.name})",
        "\n".join(f"- {CLAIMS[n].system} (`{n}`): {CLAIMS[n].why}" for n in claims),
    ]
    if missing:
        parts.append(f"Counted, but not measured so far: {', '.join(missing)}.")
    details = "\n".join(values(claims))
    summary = "<summary>Sizes, and the values that the ratios are of</summary>"
    return "\n\n".join([*parts, f"<details>\n{summary}\n\n{details}\n\n</details>"])


def counted_ratio(claim: Claim, counted: Mapping[str, Any], arm: str) -> float:
    """Returns the ratio that stands beside the published one."""

    def value(name: str) -> float:
        of = counted[name]
        if claim.counted_by == FLOPS:
            return float(of["flops"][claim.counted_scene])
        return float(of["parameters" if claim.counted_by == PARAMETERS else "weights"])

    return value(arm) / value(claim.baseline)


def peak_ratio(claim: Claim, found: Mapping[str, Any], arm: str) -> float | None:
    peaks = found["peak"]
    return peaks[arm] / peaks[claim.baseline] if arm in peaks else None


def arms(claims: Mapping[str, Any]) -> Iterator[tuple[Claim, Mapping[str, Any], str]]:
    """Yields each claim with its result and each arm that is compared with the baseline."""
    for name, found in claims.items():
        for arm in CLAIMS[name].others:
            yield CLAIMS[name], found, arm


def table(claims: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "| model | published | arm / baseline | published | counted | measured time | "
        "measured peak memory |"
    )
    yield "|---" * 7 + "|"
    before = None
    for claim, found, arm in arms(claims):
        first = claim is not before
        before = claim
        published = claim.arms[arm].published
        peak = peak_ratio(claim, found, arm)
        cells = (
            f"[{claim.system}]({claim.system}.md)" if first else "",
            f"{claim.published} ({claim.source})" if first else "",
            f"{arm} / {claim.baseline}",
            DASH if published is None else f"{published:.2f} ({claim.quantity})",
            f"{counted_ratio(claim, found['counted'], arm):.3f} ({counted_name(claim)})",
            "<br>".join(time_cell(s, of["ratio"][arm]) for s, of in measured(found)) or DASH,
            DASH if peak is None else f"{peak:.2f}",
        )
        yield f"| {' | '.join(cells)} |"


def measured(found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from found["measured"].items()


def counted_name(claim: Claim) -> str:
    of = f", {claim.counted_scene}" if claim.counted_by == FLOPS else ""
    return f"{claim.counted_by}{of}"


def time_cell(scene: str, ratio: list[float]) -> str:
    middle, low, high = ratio
    return f"{scene}: {middle:.2f} ({low:.2f} to {high:.2f})"


def values(claims: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines of the table of absolute values, baselines included."""
    yield (
        "| claim | sizes | arm | parameters, million | weights, MB | GFLOPs | saved for backward, "
        "MB | ms | peak memory, MB |"
    )
    yield "|---" * 9 + "|"
    for name, found in claims.items():
        claim = CLAIMS[name]
        for arm, counted in found["counted"].items():
            peak = found["peak"].get(arm)
            cells = (
                f"`{name}`",
                claim.sizes,
                arm,
                f"{counted['parameters'] / 1e6:,.1f}",
                f"{counted['weights'] / 1e6:,.0f}",
                by_scene(counted["flops"], 1e9),
                by_scene(counted["saved"], 1e6),
                by_scene({s: of["seconds"][arm] for s, of in measured(found)}, 1e-3) or DASH,
                DASH if peak is None else f"{peak / 1e6:,.0f}",
            )
            yield f"| {' | '.join(cells)} |"


def by_scene(values: Mapping[str, float], unit: float) -> str:
    return "<br>".join(f"{scene}: {value / unit:,.4g}" for scene, value in values.items())


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draws the published, counted and measured ratio of each arm on a logarithmic axis.

    The measured ratio is that of time in the claim's first scene, with its interval of 95 %; where
    the claim is about memory or parameters, that of peak memory.
    """
    from moe_ops.viz._canvas import import_matplotlib

    import_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    rows = list(arms(result["claims"]))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure = Figure(figsize=(7.2, 1.2 + 0.28 * len(rows)), layout="constrained")
        figure.set_facecolor("white")
        axes = figure.add_subplot()
        for place, (claim, found, arm) in enumerate(rows):
            published = claim.arms[arm].published
            if published is not None:
                axes.plot(published, place, "D", color="#222222", ms=6, label="published")
            counted = counted_ratio(claim, found["counted"], arm)
            axes.plot(counted, place, "o", color="#0072B2", ms=6, label="counted")
            peak = peak_ratio(claim, found, arm)
            if not found["measured"]:
                continue
            if claim.quantity in (FLOPS, TIME) or peak is None:
                middle, low, high = next(measured(found))[1]["ratio"][arm]
                error = [[middle - low], [high - middle]]
                axes.errorbar(
                    middle, place, xerr=error, fmt="s", color="#D55E00", ms=4, label="measured time"
                )
            else:
                axes.plot(peak, place, "s", color="#009E73", ms=4, label="measured peak memory")
        axes.set_xscale("log")
        ticks = (0.05, 0.1, 0.2, 0.5, 1, 2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.axvline(1, color="#999999", linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(rows)), [f"{c.system}: {arm}" for c, _, arm in rows], fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="x", color="#eeeeee")
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.set_xlabel("ratio to the baseline; below 1, the arm is cheaper")
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(
            unique.values(), unique.keys(), loc="outside upper center", ncols=4, frameon=False
        )
        write_svg(figure, path)
