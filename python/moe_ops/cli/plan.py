"""`moe-ops plan`: requirements of a model on a cluster, as tables, JSON and a picture."""

from __future__ import annotations

import dataclasses
import html
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_ops import _files
from moe_ops.cli import hub
from moe_ops.parallel import plan as plans
from moe_ops.parallel.plan.cluster import GIB
from moe_ops.parallel.plan.estimate import USABLE

PICTURES = (".svg", ".png", ".pdf", ".html")


@dataclass(frozen=True)
class PlanOptions:
    """Options of `moe-ops plan`.

    ep: None selects the best size.
    changes: attributes of `Cluster` that replace those of the preset; None is ignored.
    """

    model: str
    ranks: int
    cluster: str = "h100"
    ep: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    job: dict[str, Any] = field(default_factory=dict)
    trace: bool = False
    out: Path | None = None


def run(options: PlanOptions, console: Console) -> dict[str, Any]:
    """Prints the plan; returns it as plain values.

    Raises:
        ValueError: invalid options.
        OSError: the picture could not be written.
    """
    if options.out is not None and options.out.suffix not in PICTURES:
        raise ValueError(f"plan: --out must end in {', '.join(PICTURES)}, got {options.out.name}.")
    shape = plans.find_shape(hub.config_file("plan", options.model))
    cluster = plans.find_cluster(options.cluster, options.ranks, **options.changes)
    job = plans.ParallelJob(ep=options.ep or 1, **options.job)
    sizes = plans.alternatives(shape, cluster, job)
    if options.ep is None:
        if not sizes:
            raise ValueError(f"plan: no EP size fits {cluster.ranks} ranks and these options.")
        chosen = plans.best(sizes)
    else:
        chosen = plans.estimate_plan(shape, cluster, job)
    advice = plans.suggest_changes(chosen)
    result = chosen.to_dict()
    result["ep_sizes"] = [_summary(p) for p in sizes]
    result["advice"] = [a.text for a in advice]
    print_plan(console, chosen, sizes, advice)
    if options.trace:
        result["trace"] = _trace(chosen, console)
    if options.out is not None:
        write_picture(options.out, chosen, sizes, advice)
        console.print(f"Picture: {options.out}", markup=False, soft_wrap=True)
    return result


def _summary(plan: plans.Plan) -> dict[str, Any]:
    return {
        "ep": plan.job.ep,
        "dispatcher": plan.rows.name,
        "memory": plan.memory.total,
        "fits": plan.fits,
        "step": plan.time.step,
        "tokens_per_second": plan.tokens_per_second,
    }


# ------------------------------------------------------------------------------------------ tables


def print_plan(
    console: Console,
    plan: plans.Plan,
    sizes: list[plans.Plan],
    advice: list[plans.estimate.Advice],
) -> None:
    """Prints all tables."""
    for line in _head(plan):
        console.print(line, markup=False, soft_wrap=True)
    console.print(_memory_table(plan))
    console.print(_memory_line(plan), markup=False, soft_wrap=True)
    console.print(_time_table(plan))
    for line in _time_lines(plan):
        console.print(line, markup=False, soft_wrap=True)
    console.print(_sizes_table(plan, sizes))
    console.print("What to change", style="bold")
    for entry in advice:
        console.print(f"- {entry.text}", markup=False, soft_wrap=True)
    if not advice:
        console.print("- Nothing that would save 3 % or more.")


def _head(plan: plans.Plan) -> list[str]:
    shape, cluster, job, layout = plan.shape, plan.cluster, plan.job, plan.layout
    groups = ""
    if shape.num_groups > 1:
        groups = f" from {shape.num_topk_groups} of {shape.num_groups} groups"
    what = "training"
    if not job.training:
        what = "inference"
    elif job.recompute:
        what = "training with recomputation"
    spread = f"EP {layout.ep}, TP {layout.tp}, FSDP {layout.dense_shards} (experts "
    spread += f"{layout.expert_shards})"
    return [
        f"{shape.name}: {shape.total_weights / 1e9:.1f} billion weights, "
        f"{shape.active_weights / 1e9:.1f} a token; {shape.num_moe_layers} of {shape.num_layers} "
        f"layers have {shape.num_experts} experts, {shape.top_k} a token{groups}",
        f"{cluster.ranks} ranks on {cluster.nodes} nodes: {spread}; {what}, {job.dtype}, "
        f"{job.tokens} tokens a rank",
    ]


def _memory_table(plan: plans.Plan) -> Table:
    table = _table("Memory of a rank", ("", "GiB"))
    for name, size in memory_parts(plan):
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("together", f"{plan.memory.total / GIB:.2f}")
    return table


def memory_parts(plan: plans.Plan) -> list[tuple[str, int]]:
    """Returns names and bytes of nonempty parts."""
    m = plan.memory
    kind = "float32 weights" if plan.job.training else "weights"
    parts = [
        (f"experts, {kind}", m.experts),
        (f"all others, {kind}", m.dense),
        ("gradients, float32", m.gradients),
        ("Adam's moments, float32", m.optimizer),
        ("activations", m.activations),
        ("rows of dispatch and combine", m.dispatch),
        ("FSDP: weights in use, gradients", m.sharding),
        ("workspace of the expert kernels", m.workspace),
    ]
    return [(name, size) for name, size in parts if size]


def _memory_line(plan: plans.Plan) -> str:
    all_of_it, needed = plan.cluster.memory, plan.memory.total
    fits = "That fits" if plan.fits else "That does not fit"
    line = (
        f"{fits}: a rank has {all_of_it / GIB:.0f} GiB, of which {USABLE:.0%} are for tensors, and "
        f"this is {needed / all_of_it:.0%}. Most is there during {plan.memory.moment}."
    )
    if not plan.job.training and plan.fits:
        line += f" Room for keys and values of {plan.cache_tokens} tokens is left."
    return line


def _time_table(plan: plans.Plan) -> Table:
    passes = plan.time.layer
    table = _table("A layer with experts, ms", ("", "forward", "backward")[: 1 + len(passes)])
    for name, attribute in TIMES:
        table.add_row(name, *(_ms(getattr(p, attribute)) for p in passes))
    table.add_row("hidden behind products", *(_ms(-p.hidden) for p in passes))
    table.add_section()
    table.add_row("together", *(_ms(p.total) for p in passes))
    return table


TIMES = (
    ("attention, router", "attention"),
    ("shared experts", "shared"),
    ("experts", "experts"),
    ("dispatch", "dispatch"),
    ("combine", "combine"),
    ("other collectives (FSDP, TP)", "sharding"),
)


def _ms(value: float) -> str:
    if not value:
        return "–"
    return f"{value * 1e3:.2f}" if abs(value) >= 1e-3 else f"{value * 1e3:.3f}"


def _time_lines(plan: plans.Plan) -> list[str]:
    compute = sum(p.compute for p in plan.time.layer)
    communication = sum(p.communication for p in plan.time.layer)
    if communication > compute:
        ratio = f"{communication / compute:.1f} times as long as products: links are the limit"
    else:
        ratio = f"{communication / compute:.0%} of the time of products, which are the limit"
    lines = [f"Communication takes {ratio}."]
    for phase in ("forward", "backward")[: len(plan.time.layer)]:
        sent, received = plan.bytes_per_token(phase)
        if sent or received:
            lines.append(
                f"A token of a layer, {phase}: {sent / 1024:.1f} KiB sent to other ranks, "
                f"{received / 1024:.1f} KiB received."
            )
    lines.append(f"Dispatcher: {plan.rows.name}, as {plan.reason.removeprefix('as ')}.")
    lines.append(
        f"A step takes {plan.time.step:.3g} s or more: {plan.tokens_per_second:,.0f} tokens a "
        f"second, {plan.tokens_per_second / plan.cluster.ranks:,.0f} a rank."
    )
    return lines


def _sizes_table(plan: plans.Plan, sizes: list[plans.Plan]) -> Table:
    columns = ("EP", "dispatcher", "GiB", "fits", "products", "rows", "others", "step, s")
    table = _table(
        "EP sizes; ms of a layer in products, rows and other collectives", columns, left=2
    )
    for p in sizes:
        passes = p.time.layer
        style = "bold" if p.job.ep == plan.job.ep else None
        table.add_row(
            str(p.job.ep),
            p.rows.name,
            f"{p.memory.total / GIB:.1f}",
            "yes" if p.fits else "no",
            _ms(sum(t.compute for t in passes)),
            _ms(sum(t.dispatch + t.combine for t in passes)),
            _ms(sum(t.sharding for t in passes)),
            f"{p.time.step:.3g}",
            style=style,
        )
    return table


def _table(title: str, columns: tuple[str, ...], left: int = 1) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return table


# ------------------------------------------------------------------------------------------- trace


def _trace(plan: plans.Plan, console: Console) -> dict[str, Any]:
    console.print("Tracing a step of rank 0 …", markup=False)
    cluster, job = plan.cluster, plan.job
    # The traced model has a separate output projection.
    shape = dataclasses.replace(plan.shape, tied=False)
    traced = plans.trace_step(shape, cluster, job)
    formula = plans.traffic.model_messages(shape, plan.layout, job)
    needed = plans.memory.memory_of(shape, cluster, job, kernels=False).total
    result: dict[str, Any] = {}
    for name, own in (("ep", True), ("others", False)):
        mine = sum(m.sent for m in formula if (m.group == "ep") is own)
        seen = sum(m.sent for m in traced.messages if (m.group == "ep") is own)
        result[name] = {"bytes": seen, "formula": mine}
        word = "dispatch and combine" if own else "FSDP"
        same = "the same as" if mine == seen else "other than"
        console.print(
            f"Trace, {word}: {seen / GIB:.3f} GiB sent in a step, {same} the formula's "
            f"{mine / GIB:.3f}.",
            markup=False,
            soft_wrap=True,
        )
    result["memory"] = {**dataclasses.asdict(traced), "formula": needed}
    del result["memory"]["messages"]
    console.print(
        f"Trace, memory without workspaces of kernels: {traced.peak / GIB:.2f} GiB at most; the "
        f"formula says {needed / GIB:.2f} ({needed / traced.peak - 1:+.1%}).",
        markup=False,
        soft_wrap=True,
    )
    return result


# ----------------------------------------------------------------------------------------- picture


def write_picture(
    path: Path, plan: plans.Plan, sizes: list[plans.Plan], advice: list[plans.estimate.Advice]
) -> None:
    """Writes an image, or a page with the image and all tables."""
    from moe_ops.viz import plot_plan

    passes = {
        phase: {name: getattr(p, attribute) for name, attribute in TIMES}
        for phase, p in zip(("forward", "backward"), plan.time.layer, strict=False)
    }
    if len(plan.time.layer) == 1:
        passes.pop("backward", None)
    drawn: dict[str, Any] = {
        "memory": dict(memory_parts(plan)),
        "available": plan.cluster.memory,
        "passes": passes,
        "sizes": [(p.job.ep, p.memory.total, p.time.step) for p in sizes],
        "chosen": plan.job.ep,
        "title": _head(plan)[0].partition(":")[0] + f", {plan.cluster.ranks} ranks",
    }
    if path.suffix != ".html":
        plot_plan(**drawn, path=path)
        return
    image = io.BytesIO()
    plot_plan(**drawn).savefig(image, format="svg")
    svg = image.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    text = Console(file=io.StringIO(), width=110, record=True)
    print_plan(text, plan, sizes, advice)
    title = html.escape(drawn["title"])
    _files.write_text(
        path,
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"</head>\n<body>\n{svg}\n<pre>{html.escape(text.export_text())}</pre>\n</body></html>\n",
    )
