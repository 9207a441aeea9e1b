"""The weights of a model, or of a folder with one, under the names of published checkpoints, each
read when it is written.

E experts, H hidden size, I intermediate size, O and D output and input features of a weight.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from moe_ops import _files, memory
from moe_ops.hf.checkpoints.files import Checkpoint
from moe_ops.quant import QuantizedExperts, QuantizedLinear
from moe_ops.quant.bank import find_banks
from moe_ops.quant.importance import Importance
from moe_ops.quant.published import StoredWeight
from moe_ops.quant.stored_linear import StoredLinear
from moe_ops.quant.to_published import decoded, select_rows
from moe_ops.weight_formats import WeightFormat

PARTS = ("gate", "up", "down")
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
_LEAVES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_FUSED = re.compile(r"^(.*\.experts)\.(gate_up_proj|down_proj)(_bias)?$")
_LINEAR = re.compile(r"(_proj|_proj_with_mqa|lm_head|\.w[123])\.weight$")
_RELEASE_BYTES = 64 * 2**20  # Read of mapped files before their pages are released.

Weight = Tensor | StoredWeight


@dataclass(frozen=True)
class Entry:
    """One tensor that is not an expert's.

    format: that of a quantized weight. importance: [D] of a linear layer, or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Weight]
    format: WeightFormat | None = None
    importance: Tensor | None = None

    @property
    def is_linear(self) -> bool:
        return len(self.shape) == 2 and _LINEAR.search(self.name) is not None


@dataclass(frozen=True)
class Experts:
    """The experts of one layer.

    prefix: ends with "experts". leaves: names of gate, up and down behind an expert's number; None
    where the checkpoint has all experts in one tensor. read: (expert, part) -> [O, D].
    biases: [E, O] by part. importance: [E, D] by part. formats: of gate and up, and of down.
    """

    prefix: str
    leaves: tuple[str, str, str] | None
    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    read: Callable[[int, str], Weight]
    biases: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    formats: Mapping[str, WeightFormat] = field(default_factory=dict)
    importance: Mapping[str, Tensor] = field(default_factory=dict)

    def shape(self, part: str) -> tuple[int, int]:
        h, i = self.hidden_size, self.intermediate_size
        return (h, i) if part == "down" else (i, h)

    @property
    def layer(self) -> int:
        return int(re.findall(r"\d+", self.prefix)[0])


@dataclass(frozen=True)
class Source:
    """Everything that an exporter writes.

    folder: of tokenizer files, or None. architecture: the name of the class, None where config.json
    has it.
    """

    config: Any
    folder: Path | None
    entries: dict[str, Entry]
    experts: list[Experts]
    dtype: torch.dtype
    architecture: str | None = None


def floats_of(weight: Weight) -> Tensor:
    """Returns a weight as numbers: decoded if it is quantized."""
    return decoded(weight) if isinstance(weight, StoredWeight) else weight


def open_source(source: PreTrainedModel | Path | str, importance: Importance | None) -> Source:
    """Returns the weights of a model or a folder.

    Tensors of a float checkpoint are read from its files one at a time. A quantized checkpoint is
    loaded, which keeps its codes.

    Raises:
        ValueError: neither a model nor a folder with a checkpoint.
    """
    if isinstance(source, PreTrainedModel):
        folder = Path(source.name_or_path or ".")
        here = source.name_or_path and (folder / "config.json").is_file()
        return _of_model(source, folder if here else None, importance)
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"export: source must be a model or a folder with a config.json, got {source}."
        )
    _files.check_folder(folder, SAFE_WEIGHTS_INDEX_NAME)
    config = AutoConfig.from_pretrained(folder)
    files = sorted(str(path) for path in folder.glob("*.safetensors"))
    if files and importance is None and getattr(config, "quantization_config", None) is None:
        return _of_files(config, folder, files)
    return _of_model(load_model(folder), folder, importance)


def load_model(folder: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", experts_implementation="moe_ops"
    )


# ------------------------------------------------------------------------------------- of files


class _Reader:
    """Reads tensors of files and releases the pages of those that have been read."""

    def __init__(self, files: list[str]) -> None:
        self.files = Checkpoint(files)
        self.read_bytes = 0

    def __call__(self, name: str, index: Any = None) -> Tensor:
        with self.files.reading(name):
            part = self.files.slice_of(name)
            # A copy: the pages of the file go.
            tensor: Tensor = part[:] if index is None else part[index]
            tensor = tensor.clone()
        self.read_bytes += tensor.nbytes
        if self.read_bytes >= _RELEASE_BYTES:
            self.read_bytes = 0
            memory.release_file_pages()
        return tensor


def _of_files(config: Any, folder: Path, files: list[str]) -> Source:
    read = _Reader(files)
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    entries: dict[str, Entry] = {}
    banks: dict[str, Counter[str]] = {}  # prefix -> how many tensors of each kind
    for name in sorted(read.files.keys()):
        match = _EXPERT.match(name) or _FUSED.match(name)
        if match is not None:
            kind = match[3] if match.re is _EXPERT else match[2] + (match[3] or "")
            banks.setdefault(match[1], Counter())[kind] += 1
            continue
        dtype = dtypes.get(read.files.dtype(name))
        if dtype is None:
            raise ValueError(
                f"export: {name} must be float32, bfloat16 or float16, got "
                f"{read.files.dtype(name)}."
            )
        shape = tuple(read.files.shape(name))
        entries[name] = Entry(name, shape, dtype, functools.partial(read, name))
    experts = [_experts_of_files(prefix, names, read, dtypes) for prefix, names in banks.items()]
    widest = max(
        (e.dtype for e in entries.values() if e.is_linear), default=torch.float32, key=_width
    )
    return Source(config, folder, entries, _in_order(experts), widest)


def _width(dtype: torch.dtype) -> int:
    return dtype.itemsize


def _experts_of_files(
    prefix: str, names: Counter[str], read: _Reader, dtypes: dict[str, torch.dtype]
) -> Experts:
    if "gate_up_proj" in names:
        return _fused_experts(prefix, names, read, dtypes)
    leaves = _LEAVES["w1" in names]
    first = f"{prefix}.0.{leaves[2]}.weight"
    hidden, width = read.files.shape(first)
    of = dict(zip(PARTS, leaves, strict=True))
    return Experts(
        prefix,
        leaves,
        names[leaves[2]],
        hidden,
        width,
        dtypes[read.files.dtype(first)],
        lambda e, part: read(f"{prefix}.{e}.{of[part]}.weight"),
    )


def _fused_experts(
    prefix: str, names: Counter[str], read: _Reader, dtypes: dict[str, torch.dtype]
) -> Experts:
    """Experts of gpt-oss: [E, H, 2I] with gate and up by turns, and [E, I, H]."""
    down = f"{prefix}.down_proj"
    count, width, hidden = read.files.shape(down)
    gate_up = f"{prefix}.gate_up_proj"

    def one(e: int, part: str) -> Tensor:
        if part == "down":
            return read(down, e).mT
        return read(gate_up, e).mT[PARTS.index(part) :: 2]

    def bias(part: str) -> Tensor:
        if part == "down":
            return read(f"{down}_bias")
        return read(f"{gate_up}_bias")[:, PARTS.index(part) :: 2]

    if read.files.shape(gate_up) != [count, hidden, 2 * width]:
        raise ValueError(
            f"export: {gate_up} must be [experts, inputs, 2 * width] as gpt-oss stores it, got "
            f"{read.files.shape(gate_up)}."
        )
    biases = {part: functools.partial(bias, part) for part in PARTS}
    has_bias = "down_proj_bias" in names
    kind = dtypes[read.files.dtype(down)]
    return Experts(prefix, None, count, hidden, width, kind, one, biases if has_bias else {})


# ------------------------------------------------------------------------------------- of models


def _of_model(model: Any, folder: Path | None, importance: Importance | None) -> Source:
    found: list[tuple[str, Any, Any]] = []  # name, float weights, quantized experts
    for bank in find_banks(model, op="export"):
        found.append((bank.name, bank.bank, None))
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            found.append((name, None, module))
    hidden = tuple(f"{name}." for name, *_ in found)
    tensors: dict[str, tuple[Any, WeightFormat | None]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear | StoredLinear):
            how = module.how if isinstance(module, QuantizedLinear) else module.format
            tensors[f"{name}.weight"] = (module, how)
    seen = {id(p) for n, p in model.named_parameters() if f"{n}" in tensors}
    for name, tensor in [*model.named_parameters(), *_persistent_buffers(model)]:
        if not name.startswith(hidden) and id(tensor) not in seen:
            tensors.setdefault(name, (tensor, None))
    meta = {name: torch.empty(0, device="meta") for name in tensors}
    own = {id(value): name for name, value in meta.items()}
    entries = {}
    for name, value in revert_weight_conversion(model, meta).items():
        ours = own[id(value)]
        entries[name] = _entry(name, ours, *tensors[ours], importance)
    experts = [_experts_of_model(model, *one, importance) for one in found]
    ordered = _in_order(experts)
    return Source(model.config, folder, entries, ordered, model.dtype, type(model).__name__)


def _persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    found = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts | QuantizedLinear | StoredLinear):
            continue
        for leaf, buffer in module.named_buffers(name, recurse=False):
            if leaf.rpartition(".")[2] not in module._non_persistent_buffers_set:
                found.append((leaf, buffer))
    return found


def _entry(
    name: str, ours: str, held: Any, how: WeightFormat | None, importance: Importance | None
) -> Entry:
    module = ours.removesuffix(".weight")
    matters = None if importance is None else importance.linears.get(module)
    if how is None:
        shape = tuple(held.shape)
        return Entry(name, shape, held.dtype, held.detach, None, matters)

    def read() -> StoredWeight:
        if isinstance(held, QuantizedLinear):
            return StoredWeight(how, held.q, held.scale)
        return StoredWeight(how, held.codes, held.scale, held.zero)

    shape = (held.out_features, held.in_features)
    return Entry(name, shape, held.weight_dtype, read, how, matters)


def _experts_of_model(
    model: Any, name: str, bank: Any, quantized: Any, importance: Importance | None
) -> Experts:
    held = quantized if bank is None else bank
    count, hidden, width = held.num_experts, held.hidden_size, held.intermediate_size
    options = bank.activation if bank is not None else {"interleaved": quantized.interleaved}
    by_turns = bool(options.get("interleaved"))
    if bank is None:
        gated = quantized.gated
    else:
        gated = sum(w.shape[1] for w in bank.gate_up) == 2 * width
    if not gated:
        raise ValueError(f"export: {name} must have gates, got experts without.")

    def rows(part: str) -> slice:
        place = PARTS.index(part)
        return slice(place, None, 2) if by_turns else slice(place * width, (place + 1) * width)

    def of_floats(e: int, part: str) -> Tensor:
        return bank.down_of(e) if part == "down" else bank.gate_up_of(e)[rows(part)]

    def of_codes(e: int, part: str) -> Weight:
        weight = "w_down" if part == "down" else "w_gate_up"
        codes, scale, zero = (getattr(quantized, weight + leaf) for leaf in ("", "_scale", "_zero"))
        how = quantized.formats[weight]
        zero = None if zero is None else zero[e]
        stored = StoredWeight(how, codes[e], scale[e], zero)
        if part == "down":
            return stored
        scaled = quantized.x_scale is not None
        if how.name == "fp8" or scaled:  # Blocks of fp8 may hold rows of both.
            whole = decoded(stored)
            return (whole * quantized.x_scale if scaled else whole)[rows(part)]
        return select_rows(stored, rows(part))

    def bias(part: str) -> Tensor:
        both: Tensor = held.b_down if part == "down" else held.b_gate_up
        return both.detach() if part == "down" else both.detach()[:, rows(part)]

    formats = {}
    if bank is None:
        exact = quantized.x_scale is None and quantized.formats["w_gate_up"].name != "fp8"
        formats = {"down": quantized.formats["w_down"]}
        formats |= dict.fromkeys(PARTS[:2], quantized.formats["w_gate_up"]) if exact else {}
    biases: dict[str, Callable[[], Tensor]] = {}
    if held.b_down is not None:
        biases = {part: functools.partial(bias, part) for part in PARTS}
    matters = {} if importance is None else importance.experts.get(name, {})
    prefix, leaves = _names_of(model, name, count, hidden, width)
    read = of_codes if bank is None else of_floats
    return Experts(
        prefix, leaves, count, hidden, width, model.dtype, read, biases, formats, matters
    )


def _names_of(
    model: Any, name: str, count: int, hidden: int, width: int
) -> tuple[str, tuple[str, str, str] | None]:
    """Returns what a checkpoint calls experts, see `Experts`."""
    meta = {
        f"{name}.gate_up_proj": torch.empty(count, 2 * width, hidden, device="meta"),
        f"{name}.down_proj": torch.empty(count, hidden, width, device="meta"),
    }
    for key in revert_weight_conversion(model, meta):
        match = _EXPERT.match(key)
        if match is not None:
            return match[1], _LEAVES[match[3].startswith("w")]
    return name, None


def _in_order(experts: list[Experts]) -> list[Experts]:
    return sorted(experts, key=lambda one: one.layer)
