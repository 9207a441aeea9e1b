"""Published checkpoints: safetensors files, sharded or not, and their key names and layouts.

A model lists an `Entry` per tensor with its name and layout in published checkpoints; reading and
writing both use that list, so that they cannot diverge.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops import _files, _reading, _tensor_file

try:
    from safetensors import safe_open
except ModuleNotFoundError as error:
    if error.name != "safetensors":
        raise
    raise ImportError(
        "moe_ops.zoo needs safetensors, which is not installed: pip install torch-moe-ops[zoo]"
    ) from error

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Companion of an fp8 weight: the scales of its 128 x 128 blocks (DeepSeek-V3).
_SCALES = "_scale_inv"
_FP8_BLOCK = 128
_FP8 = "F8_E4M3"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SHOWN = 8
_MARKS = "checksums"  # Metadata key: JSON with the checksum of each tensor of the file by its key.
# The largest size accepted if no tensor of an incomplete checkpoint confirms it. Every vocabulary
# is smaller.
_MAX_UNSEEN = 2**18


@dataclass(frozen=True)
class Entry:
    """Tensor of a model and its location in a published checkpoint.

    Attributes:
        name: in the model's state_dict().
        keys: in the checkpoint.
        layout: "same": one key, unchanged; "transposed": one key, its last two dimensions swapped;
            "rows": keys of one shape, below each other along dimension 0; "experts": keys expert by
            expert, `parts` per expert, concatenated along dimension 0 and stacked to [E, ...].
        parts: of "experts".
    """

    name: str
    keys: tuple[str, ...]
    layout: str = "same"
    parts: int = 1

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns the model's tensor from the tensors of `keys`."""
        if self.layout == "same":
            return tensors[0]
        if self.layout == "transposed":
            return tensors[0].transpose(-1, -2)
        if self.layout == "rows":
            return torch.cat(list(tensors))
        experts = [
            torch.cat(list(tensors[i : i + self.parts])) for i in range(0, len(tensors), self.parts)
        ]
        return torch.stack(experts)

    def shapes(self, shape: Sequence[int]) -> list[list[int]]:
        """Returns the shapes that `split` would give for a model tensor of this shape."""
        whole = list(shape)
        if self.layout == "transposed":
            whole[-2:] = whole[:-3:-1]
        elif self.layout == "rows":
            whole[0] //= len(self.keys)
        elif self.layout == "experts":
            whole = [whole[1] // self.parts, *whole[2:]]
        return [whole] * len(self.keys)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Returns the tensors of `keys` from the model's: the inverse of `join`."""
        if self.layout == "same":
            return [tensor]
        if self.layout == "transposed":
            return [tensor.transpose(-1, -2)]
        if self.layout == "rows":
            return list(tensor.chunk(len(self.keys)))
        return [part for expert in tensor for part in expert.chunk(self.parts)]


def renamed(ours: str, theirs: str, names: Mapping[str, str]) -> list[Entry]:
    """Returns entries of a module whose tensors have one key each, from its name, its prefix in the
    checkpoint, and a table: names in the module -> keys after the prefix."""
    return [Entry(f"{ours}.{name}", (f"{theirs}.{key}",)) for name, key in names.items()]


def dense_entries(ours: str, theirs: str) -> list[Entry]:
    """Returns entries of a `SharedExperts` published as gate_proj, up_proj and down_proj."""
    gate_up = (f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight")
    return [
        Entry(f"{ours}.w_gate_up", gate_up, "rows"),
        Entry(f"{ours}.w_down", (f"{theirs}.down_proj.weight",)),
    ]


def expert_entries(ours: str, theirs: str, num_experts: int) -> list[Entry]:
    """Returns entries of an `Experts` published expert by expert as gate_proj, up_proj and
    down_proj."""
    gate_up = [
        f"{theirs}.{e}.{name}_proj.weight" for e in range(num_experts) for name in ("gate", "up")
    ]
    down = [f"{theirs}.{e}.down_proj.weight" for e in range(num_experts)]
    return [
        Entry(f"{ours}.w_gate_up", tuple(gate_up), "experts", parts=2),
        Entry(f"{ours}.w_down", tuple(down), "experts"),
    ]


@dataclass
class LoadReport:
    """Result of loading a checkpoint's keys.

    Attributes:
        missing: keys the model needs and the checkpoint lacks.
        unexpected: keys of the checkpoint that the model lacks.
        ignored: keys known to be unused (position tables, prediction heads).
        loaded: number of the model's tensors that were read.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    loaded: int = 0

    def __str__(self) -> str:
        lines = [f"{self.loaded} tensors loaded"]
        for name in ("missing", "unexpected", "ignored"):
            keys = getattr(self, name)
            if keys:
                more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
                named = ", ".join(key if len(key) < 80 else f"{key[:80]}…" for key in keys[:_SHOWN])
                lines.append(f"{len(keys)} keys {name}: {named}{more}")
        return "; ".join(lines) + "."


@dataclass(frozen=True)
class Stored:
    """Header entry of a stored tensor: the file's name, the type, the shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class Reader:
    """Reader of a checkpoint folder's tensors, each read on demand.

    Reads the files listed in model.safetensors.index.json if it exists, otherwise all
    *.safetensors. Only files inside the folder are read; see `moe_ops._files.inside`. A weight with
    `<key>_scale_inv` is fp8 in 128 x 128 blocks and is returned as bfloat16. Tensors written by
    `save` are verified against their checksums.

    All files are opened at once and keep their contents when other files replace them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an index or a file is damaged or has another format, or an index names a file
            outside the folder or a tensor missing from its file.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._open: dict[str, Any] = {}
        self.marks: dict[str, str] = {}  # Checksums of tensors in files written by `save`.
        self.stored: dict[str, Stored] = {}
        if (self.folder / INDEX).exists():
            self._open_indexed()
        else:
            names = sorted(path.name for path in self.folder.glob("*.safetensors"))
            if not names:
                raise FileNotFoundError(
                    f"from_pretrained: {self.folder} must hold {SINGLE} or {INDEX}, got neither."
                )
            for name in names:
                for key in self._open_file(name).keys():
                    self._note(key, name)
        scales = (key for key in self.stored if key.endswith(_SCALES))
        self._scaled = {k for k in scales if k.removesuffix(_SCALES) in self.stored}

    def _open_indexed(self) -> None:
        where = _read_json(self.folder, INDEX).get("weight_map")
        if not isinstance(where, dict):
            raise ValueError(
                f"from_pretrained: weight_map of {self.folder / INDEX} must be an object, got "
                f"{_files.shown(where)}."
            )
        there: dict[str, set[str]] = {}
        for key, name in where.items():
            if not isinstance(name, str) or not name.endswith(".safetensors"):
                raise ValueError(
                    f"from_pretrained: weight_map of {self.folder / INDEX} must name safetensors "
                    f"files, got {_files.shown(name)} for {key}."
                )
            if name not in there:
                there[name] = set(self._open_file(name).keys())
            if key not in there[name]:
                raise ValueError(
                    f"from_pretrained: {self.folder / name} must hold {key} as {INDEX} says, got "
                    "no such tensor."
                )
            self._note(key, name)

    def _open_file(self, name: str) -> Any:
        if name not in self._open:
            path = _inside(self.folder, name)
            with self._reading(path):
                _reading.check_safetensors(path, "from_pretrained")
                self._open[name] = safe_open(path, framework="pt")
                self.marks |= _marks_in(self._open[name].metadata() or {})
        return self._open[name]

    def _reading(self, path: Path) -> contextlib.AbstractContextManager[None]:
        return _reading.damage("from_pretrained", path, "a whole safetensors file")

    def _note(self, key: str, name: str) -> None:
        entry = self._open[name].get_slice(key)
        self.stored[key] = Stored(name, str(entry.get_dtype()), tuple(entry.get_shape()))

    def keys(self) -> list[str]:
        """Returns all keys except scales of fp8 weights."""
        return [key for key in self.stored if key not in self._scaled]

    def largest(self) -> int:
        """Returns the largest dimension of a tensor, or the number of tensors if that is larger."""
        sizes = (size for stored in self.stored.values() for size in stored.shape)
        return max(len(self.stored), max(sizes, default=0))

    def check(self, key: str, shape: Sequence[int]) -> None:
        """Checks from the header that `get` will return a float tensor of this shape.

        Raises:
            ValueError: it would not.
        """
        stored = self.stored[key]
        if list(stored.shape) != list(shape):
            self._refuse(key, list(shape), list(stored.shape))
        if key + _SCALES not in self._scaled:
            if stored.dtype not in _FLOATS:
                self._refuse(key, f"one of {', '.join(_FLOATS)}", stored.dtype)
            return
        if stored.dtype != _FP8 or len(stored.shape) != 2:
            kind = f"{_FP8} of two dimensions, having {key}{_SCALES} beside it"
            self._refuse(key, kind, f"{stored.dtype} of {len(stored.shape)}")
        scale = self.stored[key + _SCALES]
        blocks = [math.ceil(size / _FP8_BLOCK) for size in stored.shape]
        if list(scale.shape) != blocks:
            self._refuse(key + _SCALES, blocks, list(scale.shape))
        if scale.dtype not in _FLOATS:
            self._refuse(key + _SCALES, f"one of {', '.join(_FLOATS)}", scale.dtype)

    def _refuse(self, key: str, wanted: object, got: object) -> None:
        path = self.folder / self.stored[key].file
        raise ValueError(f"from_pretrained: {key} must be {wanted}, got {got} in {path}.")

    def dtype(self, key: str) -> torch.dtype:
        """Returns the dtype of the result of `get`, once `check` has passed."""
        return _FLOATS.get(self.stored[key].dtype, torch.bfloat16)

    def get(self, key: str) -> Tensor:
        tensor = self._raw(key)
        if key + _SCALES in self._scaled:
            from moe_ops.quant import dequantize_fp8_blocks

            tensor = dequantize_fp8_blocks(tensor, self._raw(key + _SCALES), dtype=torch.bfloat16)
        return tensor

    def _raw(self, key: str) -> Tensor:
        name = self.stored[key].file
        with self._reading(self.folder / name):
            tensor: Tensor = self._open[name].get_tensor(key)
            if key in self.marks and self.marks[key] != _tensor_file.mark(tensor):
                raise ValueError(f"{key} does not match its checksum")
        return tensor


def _marks_in(metadata: Mapping[str, str]) -> dict[str, str]:
    marks = json.loads(metadata.get(_MARKS, "{}"))
    if not isinstance(marks, dict) or not all(isinstance(mark, str) for mark in marks.values()):
        raise ValueError(f"its checksums are {_files.shown(marks)}")
    return marks


def read_config(folder: Path | str) -> dict[str, Any]:
    """Reads config.json of a checkpoint folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a JSON object in a file of this folder.
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"from_pretrained: {folder} must hold {CONFIG}, got none.")
    return _read_json(folder, CONFIG)


def _inside(folder: Path, name: str) -> Path:
    try:
        return _files.inside(folder, name)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"from_pretrained: {error}.") from None


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = _inside(folder, name)
    try:
        return _files.read_json(path)
    except ValueError as error:
        raise ValueError(f"from_pretrained: {error}.") from None


def check_sizes(sizes: Mapping[str, Any], reader: Reader, *, strict: bool) -> None:
    """Checks sizes of a config against the tensors, before a model of that size is created.

    No dimension or number of layers, experts and so on can be larger than everything in a complete
    checkpoint.

    Raises:
        ValueError: a size is larger.
    """
    most = reader.largest() if strict else max(reader.largest(), _MAX_UNSEEN)
    for name, value in sizes.items():
        if isinstance(value, int) and value > most:
            raise ValueError(
                f"from_pretrained: {name} must be at most {most} with the tensors that there are, "
                f"got {value} in {reader.folder / CONFIG}."
            )


def compare(reader: Reader, entries: Iterable[Entry], ignored: Sequence[str]) -> LoadReport:
    """Returns missing, unexpected and ignored keys (ignored: regular expressions that match at the
    end)."""
    there = set(reader.keys())
    wanted = [key for entry in entries for key in entry.keys]
    known = set(wanted)
    report = LoadReport(missing=[key for key in wanted if key not in there])
    for key in sorted(there - known):
        skip = any(re.search(f"(?:{pattern})$", key) for pattern in ignored)
        (report.ignored if skip else report.unexpected).append(key)
    return report


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers by name. Unlike a state dict, it includes offloaded
    experts."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def check(model: nn.Module, reader: Reader, entries: Iterable[Entry], report: LoadReport) -> None:
    """Checks from the headers that the tensors fit the model, which may be on the meta device.

    Raises:
        ValueError: a tensor has another shape than the model's, or is not of floats.
    """
    state = _tensors(model)
    missing = set(report.missing)
    for entry in entries:
        if not missing & set(entry.keys):
            shapes = entry.shapes(state[entry.name].shape)
            for key, shape in zip(entry.keys, shapes, strict=True):
                reader.check(key, shape)


@torch.no_grad()
def load(model: nn.Module, reader: Reader, entries: Iterable[Entry], report: LoadReport) -> None:
    """Copies every tensor whose keys all exist into the model, in the model's dtype.

    Raises:
        ValueError: a tensor of another shape than the model's.
    """
    state = _tensors(model)
    missing = set(report.missing)
    for entry in entries:
        if missing & set(entry.keys):
            continue
        target = state[entry.name]
        tensor = entry.join([reader.get(key) for key in entry.keys])
        if tensor.shape != target.shape:
            raise ValueError(
                f"from_pretrained: {entry.name} must be {list(target.shape)}, got "
                f"{list(tensor.shape)} from {entry.keys[0]}."
            )
        target.copy_(tensor)
        report.loaded += 1


@torch.no_grad()
def save(
    model: nn.Module,
    folder: Path | str,
    entries: Iterable[Entry],
    config: dict[str, Any],
    *,
    max_shard_bytes: int,
) -> None:
    """Writes config.json and the tensors under their published keys, sharded above a size limit.

    Raises:
        ValueError: a tensor that is not of floats, of quantized experts: published layouts have no
            scales.
    """
    state, entries = model.state_dict(), list(entries)
    for entry in entries:
        if not state[entry.name].is_floating_point():
            raise ValueError(
                f"save_pretrained: {entry.name} must be of floats, got {state[entry.name].dtype}; "
                "save the state dict of a model with quantized experts."
            )
    folder = _files.make_folder(folder)
    text = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for entry in entries:
        parts = entry.split(state[entry.name].detach())
        for key, part in zip(entry.keys, parts, strict=True):
            if shards[-1] and size + part.nbytes > max_shard_bytes:
                shards.append({})
                size = 0
            shards[-1][key] = part
            size += part.nbytes
            total += part.nbytes
    single = len(shards) == 1
    names = [
        SINGLE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    with _files.Replacement(folder, last=CONFIG) as files:
        for name, shard in zip(names, shards, strict=True):
            marks = {key: _tensor_file.mark(part) for key, part in shard.items()}
            about = {"format": "pt", _MARKS: json.dumps(marks)}
            files.add(name, *_tensor_file.safetensors_parts(shard, about))
        if not single:
            where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            files.add(INDEX, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
        files.add(CONFIG, text)
        files.remove("model-*-of-*.safetensors", INDEX, SINGLE)
