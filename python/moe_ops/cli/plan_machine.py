"""`moe-ops plan --vram`: requirements and speed of a model on one machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_ops import memory
from moe_ops.cli import hub
from moe_ops.doctor import Finding
from moe_ops.parallel.plan.machine import (
    FORMATS,
    GB,
    LAYER,
    Figure,
    Machine,
    MachinePlan,
    plan_machine,
)
from moe_ops.parallel.plan.shape import ModelShape, find_shape
from moe_ops.parallel.plan.stored import Stored, find_stored

# Rates of a GPU that is not in this machine: a card of 12 GB in a slot of PCIe 4.0 x16.
_ASSUMED = {"pcie": 25.0, "gpu_bandwidth": 360.0, "overhead": LAYER * 1e6}


@dataclass(frozen=True)
class MachineOptions:
    """Options of `moe-ops plan --vram`, in GB, GB/s, TFLOP/s and us; None measures or assumes."""

    model: str
    vram: float
    ram: float | None = None
    bandwidth: float | None = None
    tflops: float | None = None
    overhead: float | None = None
    pcie: float | None = None
    gpu_bandwidth: float | None = None
    format: str | None = None
    dense_format: str | None = None
    context: int = 4096
    batch: int = 1
    cached_experts: int = 0
    hit_rate: float | None = None


def run(options: MachineOptions, console: Console) -> dict[str, Any]:
    """Prints the plan; returns it as plain values.

    Raises:
        ValueError: invalid options.
    """
    model = hub.config_file("plan", options.model)
    shape, stored = find_shape(model), find_stored(model)
    formats = [options.format] if options.format else [*(("stored",) if stored else ()), *FORMATS]
    dense = options.dense_format or ("stored" if stored else "bf16")

    def planned(format: str, machine: Machine) -> MachinePlan:
        return plan_machine(
            shape,
            machine,
            format=format,
            dense_format=dense,
            stored=stored,
            context=options.context,
            batch=options.batch,
            cached_experts=options.cached_experts,
            hit_rate=options.hit_rate,
        )

    # Invalid options are rejected before anything is measured.
    planned(formats[0], Machine(options.vram * GB, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0))
    machine, sources = _machine(options)
    plans = [planned(format, machine) for format in formats]
    # The first of those that fit has the most bits.
    chosen = next((p for p in plans if p.fits), None) or next(
        (p for p in plans if p.split is not None and _split_fits(p, machine)), plans[-1]
    )
    _print(console, shape, stored, machine, sources, plans, chosen, options)
    return {
        "machine": {**vars(machine), "sources": sources},
        "chosen": chosen.format,
        "formats": [p.to_dict() for p in plans],
    }


def _machine(options: MachineOptions) -> tuple[Machine, dict[str, str]]:
    """Returns the machine, and the source of each of its numbers."""
    sources: dict[str, str] = {}
    values: dict[str, float] = {}
    given = {
        name: getattr(options, name)
        for name in (
            "bandwidth",
            "tflops",
            "overhead",
            *(("pcie", "gpu_bandwidth") if options.vram else ()),
        )
    }
    measured: dict[str, float] = {}
    if given["bandwidth"] is None or given["tflops"] is None:
        from moe_ops.bench.rates import measure_rates

        measured = {k.replace("-", "_"): v for k, v in measure_rates().options().items()}
    for name, value in given.items():
        if value is not None:
            values[name], sources[name] = value, "given"
        elif name in measured:
            values[name], sources[name] = measured[name], "measured here"
        else:
            values[name], sources[name] = _ASSUMED[name], "assumed"
    ram = options.ram
    sources["ram"] = "given" if ram is not None else "available here"
    if ram is None:
        ram = memory.available_memory() / GB
    machine = Machine(
        vram=options.vram * GB,
        ram=ram * GB,
        bandwidth=values["bandwidth"] * GB,
        flops=values["tflops"] * 1e12,
        overhead=values["overhead"] / 1e6,
        gpu_bandwidth=values.get("gpu_bandwidth", 0.0) * GB,
        pcie=values.get("pcie", 0.0) * GB,
    )
    return machine, sources


def rates_finding() -> Finding:
    """Measures the rates of this machine, and returns them as options for the doctor's report."""
    from moe_ops.bench.rates import measure_rates

    found = measure_rates()
    options = " ".join(f"--{name} {value:g}" for name, value in found.options().items())
    threads = "1 thread" if found.threads == 1 else f"{found.threads} threads"
    text = (
        f"{options} with {threads}; plain reads {found.read / 1e9:.1f} GB/s, grouped GEMMs "
        f"{found.bf16_flops / 1e12:.2f} TFLOP/s in bfloat16 and {found.fp32_flops / 1e12:.2f} in "
        "float32"
    )
    text += "; without CUDA, no rates of a GPU" if found.pcie is None else ""
    return Finding("rates", "info", text, "Pass these options to moe-ops plan MODEL --vram GB.")


def _split_fits(plan: MachinePlan, machine: Machine) -> bool:
    saved = plan.card_layers * plan.sizes.layer
    return plan.fits_vram and plan.ram.value - saved <= machine.ram


def _print(
    console: Console,
    shape: ModelShape,
    stored: Stored | None,
    machine: Machine,
    sources: dict[str, str],
    plans: list[MachinePlan],
    chosen: MachinePlan,
    options: MachineOptions,
) -> None:
    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    experts = shape.num_moe_layers * shape.num_experts * shape.expert_weights
    active = experts * shape.top_k // shape.num_experts
    line(
        f"{shape.name}: {experts / 1e9:.1f} billion weights of experts, {active / 1e9:.2f} a "
        f"token; {(shape.total_weights - experts) / 1e9:.2f} billion others; "
        f"{shape.num_moe_layers} of {shape.num_layers} layers have {shape.num_experts} experts, "
        f"{shape.top_k} a token"
    )
    if stored is not None:
        bits = 8 * stored.experts / experts
        line(
            f"Files: {stored.experts / GB:.2f} GB of experts ({bits:.2f} bits a weight), "
            f"{(stored.embedding + stored.others) / GB:.2f} GB of other weights"
        )
    line(_machine_line(machine, sources))
    line(f"{options.batch} x {options.context} tokens; other weights in {chosen.dense_format}")
    console.print(_table(plans, chosen, machine))
    line(f"Experts in {chosen.format}:")
    for name, figure in _figures(chosen):
        line(f"- {name}: {figure.line}")


def _machine_line(machine: Machine, sources: dict[str, str]) -> str:
    parts = [
        f"{machine.ram / GB:.3g} GB of RAM ({sources['ram']})",
        f"{machine.bandwidth / GB:.3g} GB/s ({sources['bandwidth']})",
        f"{machine.flops / 1e12:.3g} TFLOP/s on the CPU ({sources['tflops']})",
        f"{machine.overhead * 1e6:.0f} us a layer ({sources['overhead']})",
    ]
    if not machine.vram:
        return f"Machine: {', '.join(parts)}; no GPU, all weights on the CPU"
    parts += [
        f"{machine.vram / GB:.3g} GB of VRAM",
        f"{machine.gpu_bandwidth / GB:.3g} GB/s ({sources['gpu_bandwidth']})",
        f"PCIe {machine.pcie / GB:.3g} GB/s ({sources['pcie']})",
    ]
    return f"Machine: {', '.join(parts)}"


def _table(plans: list[MachinePlan], chosen: MachinePlan, machine: Machine) -> Table:
    table = Table(title="GB of memory, tokens a second", title_justify="left")
    table.add_column("experts")
    for name in ("RAM", "VRAM", "fits", "decode", "prefill", "copied", "T*", "LoRA"):
        table.add_column(name, justify="right")
    for p in plans:
        table.add_row(
            p.format,
            f"{p.ram.value / GB:.1f}",
            "–" if p.vram is None else f"{p.vram.value / GB:.1f}",
            "yes" if p.fits else "part" if _split_fits(p, machine) else "no",
            f"{p.decode.value:.3g}",
            f"{p.prefill.value:.0f}",
            "–" if p.streamed is None else f"{p.streamed.value:.0f}",
            "–" if p.crossover is None else f"{p.crossover.value:.0f}",
            f"{p.lora.value:.0f}",
            style="bold" if p is chosen else None,
        )
    return table


def _figures(plan: MachinePlan) -> list[tuple[str, Figure]]:
    found: list[tuple[str, Figure | None]] = [
        (f"RAM, {_word(plan.fits_ram)}", plan.ram),
        (f"VRAM, {_word(plan.fits_vram)}", plan.vram),
        ("decode", plan.decode),
        ("decode", plan.split),
        ("decode with cached experts", plan.cached),
        ("prefill on the CPU", plan.prefill),
        ("prefill with experts copied to the GPU", plan.streamed),
        ("T*, from which copying is faster", plan.crossover),
        ("LoRA training", plan.lora),
        ("with recomputation, or training all experts", plan.full),
        ("LoRA parameters", plan.adapters),
    ]
    return [(name, figure) for name, figure in found if figure is not None]


def _word(fits: bool) -> str:
    return "fits" if fits else "does not fit"
