"""Memory and speed of a model on one machine: experts in CPU memory, the rest on a GPU, if any.

This is what `moe_ops.hf.place` and `moe_ops.hf.optimize` do. Times are lower bounds from bytes,
operations and rates, plus the time of Python and of calls per layer. Each result has its arithmetic
as a line of text.

Letters: T tokens of a prompt, E experts, K experts per token. Sizes are in GB, 10^9 bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from moe_ops._fields import check_choice, check_least, check_types
from moe_ops.quant.config import Int4WeightConfig
from moe_ops.weight_formats import WeightFormat

from .shape import Matrix, ModelShape, count
from .stored import Stored

GB = 1e9
# Ordered from the most bits to the fewest. "stored" is the format of a checkpoint's files.
FORMATS = ("bf16", "int8", "fp8", "int4", "mxfp4")
DENSE_FORMATS = FORMATS[:4]
# Memory of a process that has loaded and run a model of no size with moe_ops.hf.optimize: Python,
# torch, transformers.
PROCESS = 0.45e9
# Seconds per layer besides kernels: Python and calls, which find the processor's caches full of
# weights. `python -m bench.whole_models.overhead --cold` measures it for twelve layers, 330 to 370
# us each on an Intel Xeon at 2.6 GHz; with warm caches it is 150 us. That launches to a GPU take as
# long is an assumption.
LAYER = 360e-6
# Seconds per token of `generate` besides the model, from that program.
STEP = 0.2e-3
LORA_RANK = 8
# Bytes per trained weight: itself, its gradient and two moments, in float32.
_TRAINED_BYTES = 16


@dataclass(frozen=True)
class Machine:
    """Sizes and rates of a machine, in bytes, bytes per second and operations per second.

    Attributes:
        vram: memory of the GPU; 0 is a machine without one.
        ram: memory of the CPU.
        bandwidth: reads of expert weights from the CPU's memory by the kernels of all threads.
        flops: GEMMs of experts on the CPU.
        overhead: seconds per layer and step besides kernels.
        gpu_bandwidth, pcie: reads of the GPU's memory, and copies from the CPU to the GPU; unused
            without a GPU.

    Raises:
        ValueError: a number is negative, or a rate that is used is 0.
    """

    vram: float
    ram: float
    bandwidth: float
    flops: float
    overhead: float = LAYER
    gpu_bandwidth: float = 0.0
    pcie: float = 0.0

    def __post_init__(self) -> None:
        check_types(self, "plan")
        for name in ("vram", "ram", "overhead"):
            check_least("plan", name, getattr(self, name), 0)
        rates = ("bandwidth", "flops", *(("gpu_bandwidth", "pcie") if self.vram else ()))
        for name in rates:
            if not getattr(self, name) > 0:
                raise ValueError(f"plan: {name} must be above 0, got {getattr(self, name):g}.")

    @property
    def dense_bandwidth(self) -> float:
        """Returns the bandwidth of the memory that has all weights but experts."""
        return self.gpu_bandwidth if self.vram else self.bandwidth


class Figure(NamedTuple):
    """A number and its arithmetic as one line."""

    value: float
    line: str


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model in a format of its experts and one of its other weights.

    Attributes:
        experts: all routed experts. layer: those of one layer.
        embedding: table of the tokens.
        others: all other weights. read: those of them that each token reads, and a tied head.
    """

    experts: float
    layer: float
    embedding: float
    others: float
    read: float

    @property
    def dense(self) -> float:
        return self.embedding + self.others


@dataclass(frozen=True)
class MachinePlan:
    """Result of `plan_machine`: sizes in bytes, rates in tokens per second.

    Attributes:
        format, dense_format: of the experts, and of all other weights.
        sizes: bytes of the weights.
        cache: keys and values of the context.
        staging: pinned memory for the tokens of a prompt and their results.
        ram, vram: bytes in CPU memory and in the GPU's, with lines of their parts.
        card_layers: layers whose experts fit on the GPU, beside all other weights.
        decode: tokens per second of all sequences together.
        prefill: of a prompt, with experts on the CPU; `streamed`: with experts copied to the GPU.
        crossover: tokens from which copying the experts is faster than computing on the CPU; None
            without a GPU.
        split: decode with the experts of `card_layers` on the GPU; None if there are none.
        cached: decode with a cache of experts on the GPU; None without one.
        lora, full: training of adapters and of all expert weights; the latter is also the rate of
            adapters with recomputation.
        adapters: bytes of adapters on all expert matrices, with their optimizer's state.
    """

    format: str
    dense_format: str
    sizes: Sizes
    cache: float
    staging: float
    ram: Figure
    vram: Figure | None
    fits_ram: bool
    fits_vram: bool
    card_layers: int
    decode: Figure
    prefill: Figure
    streamed: Figure | None
    crossover: Figure | None
    lora: Figure
    full: Figure
    adapters: Figure
    split: Figure | None
    cached: Figure | None = None

    @property
    def fits(self) -> bool:
        return self.fits_ram and self.fits_vram

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        result: dict[str, Any] = {"fits": self.fits}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Figure):
                value = value._asdict()
            elif isinstance(value, Sizes):
                value = dataclasses.asdict(value)
            result[entry.name] = value
        return result


def sizes_of(
    shape: ModelShape, format: str, dense_format: str, stored: Stored | None = None
) -> Sizes:
    """Returns the bytes of a model's weights.

    Args:
        shape: of the model.
        format, dense_format: one of `FORMATS`, or "stored" for the sizes in files.
        stored: those sizes, if there are files.

    Raises:
        ValueError: an unknown format, "stored" without files, or sizes that the format does not
            have.
    """
    known = ("stored",) if stored is not None else ()
    check_choice("plan", "format", format, (*known, *FORMATS))
    check_choice("plan", "dense_format", dense_format, (*known, *DENSE_FORMATS))
    if format == "stored" and stored is not None:
        layer = stored.experts / shape.num_moe_layers
    else:
        biases = 2 * (shape.width + shape.hidden_size) if shape.bias else 0
        expert = _bytes(shape.network(shape.intermediate_size), format) + biases
        layer = shape.num_experts * expert
    head = Matrix(shape.vocab_size, shape.hidden_size)
    if dense_format == "stored" and stored is not None:
        embedding, others = float(stored.embedding), float(stored.others)
    else:
        embedding = _bytes([head], "bf16")
        others = _bytes([Matrix(shape.hidden_size, 1)], "bf16")
        if not shape.tied:
            others += _bytes([head], dense_format)
        for layers, moe in ((shape.num_moe_layers, True), (shape.num_dense_layers, False)):
            others += layers * _layer_bytes(shape, moe, dense_format)
    read = others + (embedding if shape.tied else 0.0)
    return Sizes(shape.num_moe_layers * layer, layer, embedding, others, read)


def _layer_bytes(shape: ModelShape, moe: bool, format: str) -> float:
    """Returns the bytes of a layer without its experts. Norms and routers stay bfloat16."""
    router = Matrix(shape.num_experts, shape.hidden_size)
    parts = shape.dense_parts(moe)
    floats = [m for m in parts if m.columns == 1 or (moe and m == router)]
    return _bytes(floats, "bf16") + _bytes((m for m in parts if m not in floats), format)


def _bytes(weights: Iterable[Matrix], format: str) -> float:
    """Returns the bytes of weights in a format, with scales."""
    if format == "bf16":
        return 2.0 * count(weights)
    total = 0
    for rows, columns in weights:
        how = WeightFormat("int4", 64) if format == "int4" else WeightFormat(format)
        if format == "int4":
            config = Int4WeightConfig().fitting(columns)
            how = how if config is None else config.format
        for size, dtype in how.tensors(rows, columns).values():
            elements = 1
            for n in size:
                elements *= n
            total += elements * dtype.itemsize
    return float(total)


def plan_machine(
    shape: ModelShape,
    machine: Machine,
    *,
    format: str,
    dense_format: str = "bf16",
    stored: Stored | None = None,
    context: int = 4096,
    batch: int = 1,
    cached_experts: int = 0,
    hit_rate: float | None = None,
) -> MachinePlan:
    """Computes memory and speed of a model on a machine.

    Args:
        shape: of the model.
        machine: its sizes and rates.
        format, dense_format, stored: see `sizes_of`.
        context: tokens of a sequence: of its prompt for prefill, and in the cache for decode.
        batch: sequences.
        cached_experts: experts per layer with a slot on the GPU, at most E; see `moe_ops.hf.place`.
        hit_rate: fraction of the experts used in a step that have a slot, from 0 to 1; required
            with `cached_experts`, because it depends on model and text.

    Raises:
        ValueError: an invalid argument.
    """
    check_least("plan", "context", context, 1)
    check_least("plan", "batch", batch, 1)
    _check_cache(shape, machine, cached_experts, hit_rate)
    sizes = sizes_of(shape, format, dense_format, stored)
    tokens = context * batch
    cache = 2.0 * shape.cache_elements * tokens
    staging = _staging(shape, tokens) if machine.vram else 0.0
    on_cpu = [("experts", sizes.experts)]
    dense = [("other weights", sizes.dense), ("cache", cache)]
    ram = _total(
        [*on_cpu, *(() if machine.vram else dense), ("staging", staging), ("process", PROCESS)]
    )
    layer = sizes.layer
    slots = shape.num_moe_layers * layer * cached_experts / shape.num_experts
    vram = _total([*dense, ("cached experts", slots)]) if machine.vram else None
    free = machine.vram - (0.0 if vram is None else vram.value)
    card = max(0, min(shape.num_moe_layers, int(free // layer))) if machine.vram else 0
    decode = _decode(shape, machine, sizes, cache, batch, 0)
    split = None
    if card:
        rate = _decode(shape, machine, sizes, cache, batch, card)
        rest = (ram.value - card * layer) / GB
        split = Figure(
            rate.value,
            f"experts of {card} of {shape.num_moe_layers} layers on the GPU: "
            f"{card * layer / GB:.1f} GB of VRAM, {rest:.1f} GB of RAM, {rate.line}",
        )
    cached = None
    if cached_experts and hit_rate is not None:
        cached = _decode(shape, machine, sizes, cache, batch, 0, hit_rate)
    return MachinePlan(
        format=format,
        dense_format=dense_format,
        sizes=sizes,
        cache=cache,
        staging=staging,
        ram=ram,
        vram=vram,
        fits_ram=ram.value <= machine.ram,
        fits_vram=vram is None or vram.value <= machine.vram,
        card_layers=card,
        decode=decode,
        prefill=_prefill(shape, machine, sizes, tokens),
        streamed=_streamed(machine, sizes, tokens),
        crossover=_crossover(shape, machine, sizes),
        lora=_training(shape, machine, 4, "forward and the gradients of tokens"),
        full=_training(shape, machine, 6, "one more GEMM: weights' gradients or recomputation"),
        adapters=_adapters(shape),
        split=split,
        cached=cached,
    )


def _check_cache(
    shape: ModelShape, machine: Machine, cached_experts: int, hit_rate: float | None
) -> None:
    """Raises ValueError for a cache that the machine or the model cannot have."""
    if not 0 <= cached_experts <= shape.num_experts:
        raise ValueError(
            f"plan: cached_experts must be from 0 to {shape.num_experts}, the experts of a layer, "
            f"got {cached_experts}."
        )
    if cached_experts and not machine.vram:
        raise ValueError(
            f"plan: cached_experts must be 0 without a GPU, got {cached_experts} and vram 0."
        )
    if (hit_rate is None) is not (cached_experts == 0):
        raise ValueError(
            "plan: hit_rate must be given with cached_experts and not without, got "
            f"{hit_rate} and {cached_experts}."
        )
    if hit_rate is not None and not 0 <= hit_rate <= 1:
        raise ValueError(f"plan: hit_rate must be from 0 to 1, got {hit_rate}.")


def _total(parts: list[tuple[str, float]]) -> Figure:
    total = sum(size for _, size in parts)
    line = " + ".join(f"{name} {size / GB:.2f}" for name, size in parts if size)
    return Figure(total, f"{line} = {total / GB:.1f} GB")


def _staging(shape: ModelShape, tokens: int) -> float:
    """Returns pinned bytes for tokens, routing weights, ids, and results, each rounded up to a
    power of two by torch's allocator."""
    rows = tokens * shape.hidden_size * 2
    slots = tokens * shape.top_k
    return float(sum(1 << (size - 1).bit_length() for size in (rows, slots * 4, slots * 8, rows)))


def _active(shape: ModelShape) -> int:
    """Returns the number of expert weights per token."""
    return shape.num_moe_layers * shape.top_k * shape.expert_weights


def _dense_weights(shape: ModelShape) -> int:
    """Returns the number of other weights that multiply each token of a prompt: all but the
    embedding and the head, which runs on the last one."""
    layers = shape.num_moe_layers * count(shape.dense_parts(True))
    return layers + shape.num_dense_layers * count(shape.dense_parts(False))


def _decode(
    shape: ModelShape,
    machine: Machine,
    sizes: Sizes,
    cache: float,
    batch: int,
    card: int,
    hit_rate: float = 0.0,
) -> Figure:
    # With cached experts, the CPU and the GPU compute a layer at the same time. The sum of their
    # times gives a lower bound of the speed.
    # Experts that a batch uses in a layer, if each token chooses K of E by chance.
    used = shape.num_experts * (1 - (1 - shape.top_k / shape.num_experts) ** batch)
    layer = used / shape.num_experts * sizes.layer
    hits = shape.num_moe_layers * layer * hit_rate
    cpu = (shape.num_moe_layers - card) * layer - hits
    gpu = card * layer + hits
    terms = [
        (cpu / machine.bandwidth, f"experts {_gb(cpu)} / {_rate(machine.bandwidth)}"),
        (
            (sizes.read + gpu) / machine.dense_bandwidth,
            f"other weights {_gb(sizes.read)} / {_rate(machine.dense_bandwidth)}",
        ),
        (cache / machine.dense_bandwidth, f"cache {_gb(cache)} / {_rate(machine.dense_bandwidth)}"),
    ]
    if gpu:
        terms[1] = (
            terms[1][0],
            f"weights on the GPU {_gb(sizes.read + gpu)} / {_rate(machine.gpu_bandwidth)}",
        )
    weights = _active(shape) * (1 - hit_rate)
    compute = 2.0 * batch * weights / machine.flops
    if compute > terms[0][0] and not card:
        terms[0] = (
            compute,
            f"experts 2 x {batch} x {weights / 1e9:.2f}e9 / {_ops(machine)}",
        )
    calls = f"{shape.num_layers} layers x {machine.overhead * 1e6:.0f} us"
    terms.append((shape.num_layers * machine.overhead, calls))
    terms.append((STEP, f"{STEP * 1e3:.1f} ms"))
    seconds = sum(value for value, _ in terms)
    top = "1" if batch == 1 else str(batch)
    line = f"{top} / ({' + '.join(text for _, text in terms)}) = {_speed(batch / seconds)}"
    return Figure(batch / seconds, line)


def _prefill(shape: ModelShape, machine: Machine, sizes: Sizes, tokens: int) -> Figure:
    weights = _active(shape) + (0 if machine.vram else _dense_weights(shape))
    seconds = 2.0 * tokens * weights / machine.flops
    read = sizes.experts / machine.bandwidth
    if read > seconds:
        line = f"{tokens} tokens / (experts {_gb(sizes.experts)} / {_rate(machine.bandwidth)})"
        return Figure(tokens / read, f"{line} = {_speed(tokens / read)}")
    line = f"{_ops(machine)} / (2 x {weights / 1e9:.2f}e9 weights)"
    return Figure(tokens / seconds, f"{line} = {_speed(tokens / seconds)}")


def _streamed(machine: Machine, sizes: Sizes, tokens: int) -> Figure | None:
    if not machine.vram:
        return None
    rate = tokens * machine.pcie / sizes.experts
    line = f"{tokens} tokens x {_rate(machine.pcie)} / experts {_gb(sizes.experts)}"
    return Figure(rate, f"{line} = {_speed(rate)}")


def _crossover(shape: ModelShape, machine: Machine, sizes: Sizes) -> Figure | None:
    if not machine.vram:
        return None
    each = sizes.layer / shape.num_experts / shape.expert_weights
    ratio = shape.num_experts / shape.top_k
    value = ratio * each / 2 * machine.flops / machine.pcie
    line = (
        f"({shape.num_experts} / {shape.top_k}) x ({each:.3g} bytes a weight / 2) x "
        f"({_ops(machine)} / {_rate(machine.pcie)}) = {value:.0f} tokens"
    )
    return Figure(value, line)


def _training(shape: ModelShape, machine: Machine, factor: int, what: str) -> Figure:
    weights = _active(shape) + (0 if machine.vram else _dense_weights(shape))
    rate = machine.flops / (factor * weights)
    line = f"{_ops(machine)} / ({factor} x {weights / 1e9:.2f}e9 weights) = {_speed(rate)}"
    return Figure(rate, f"{line} ({what})")


def _adapters(shape: ModelShape) -> Figure:
    h, i, width = shape.hidden_size, shape.intermediate_size, shape.width
    banks = shape.num_moe_layers * shape.num_experts
    number = banks * LORA_RANK * ((h + width) + (i + h))
    size = number * _TRAINED_BYTES
    line = (
        f"rank {LORA_RANK} on all expert matrices: {number / 1e6:.0f} million parameters x "
        f"{_TRAINED_BYTES} bytes = {size / GB:.1f} GB of RAM"
    )
    return Figure(float(size), line)


def _speed(rate: float) -> str:
    return f"{rate:.3g} tokens/s" if rate < 1000 else f"{rate:.0f} tokens/s"


def _gb(size: float) -> str:
    return f"{size / GB:.2f} GB"


def _rate(rate: float) -> str:
    return f"{rate / GB:.3g} GB/s"


def _ops(machine: Machine) -> str:
    return f"{machine.flops / 1e12:.3g} TFLOP/s"
