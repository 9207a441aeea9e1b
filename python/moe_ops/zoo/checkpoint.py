"""Published checkpoints: safetensors files, sharded or not, and their key names and layouts.

A model says in a list of `Entry` how its tensors are called and laid out in the checkpoints that
were published; reading and writing both follow that list, so that they cannot drift apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    from safetensors import safe_open
    from safetensors.torch import save_file
except ModuleNotFoundError as error:
    if error.name != "safetensors":
        raise
    raise ImportError(
        "moe_ops.zoo needs safetensors, which is not installed: pip install torch-moe-ops[zoo]"
    ) from error

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LAYOUTS = ("same", "transposed", "rows", "experts")
# Companion of an fp8 weight: the factors of its 128 x 128 blocks (DeepSeek-V3).
_SCALES = "_scale_inv"
_SHOWN = 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a model and where it is in a published checkpoint.

    Attributes:
        name: in the model's state_dict().
        keys: in the checkpoint.
        layout: "same": one key, as it is; "transposed": one key, its last two dimensions swapped;
            "rows": keys of one shape, below each other along dimension 0; "experts": keys expert
            by expert, `parts` an expert, each expert's below each other, all stacked to [E, ...].
        parts: of "experts".
    """

    name: str
    keys: tuple[str, ...]
    layout: str = "same"
    parts: int = 1

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The model's tensor from those of `keys`."""
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

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of `keys` from the model's: the inverse of `join`."""
        if self.layout == "same":
            return [tensor]
        if self.layout == "transposed":
            return [tensor.transpose(-1, -2)]
        if self.layout == "rows":
            return list(tensor.chunk(len(self.keys)))
        return [part for expert in tensor for part in expert.chunk(self.parts)]


def dense_entries(ours: str, theirs: str) -> list[Entry]:
    """Of a `SharedExperts` published as gate_proj, up_proj and down_proj."""
    gate_up = (f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight")
    return [
        Entry(f"{ours}.w_gate_up", gate_up, "rows"),
        Entry(f"{ours}.w_down", (f"{theirs}.down_proj.weight",)),
    ]


def bank_entries(ours: str, theirs: str, num_experts: int) -> list[Entry]:
    """Of an `Experts` published expert by expert as gate_proj, up_proj and down_proj."""
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
    """What became of the keys of a checkpoint.

    Attributes:
        missing: keys the model needs and the checkpoint lacks.
        unexpected: keys of the checkpoint that the model does not know.
        ignored: keys that are known to be of no use here (position tables, prediction heads).
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
                lines.append(f"{len(keys)} keys {name}: {', '.join(keys[:_SHOWN])}{more}")
        return "; ".join(lines) + "."


class Reader:
    """The tensors of a checkpoint folder, each read when asked for.

    Reads the files named by model.safetensors.index.json where there is one, else all
    *.safetensors. A weight with `<key>_scale_inv` beside it is fp8 in 128 x 128 blocks and is
    given in bfloat16.

    Raises:
        FileNotFoundError: no such file.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        index = self.folder / INDEX
        if index.is_file():
            where = json.loads(index.read_text())["weight_map"]
        else:
            files = sorted(self.folder.glob("*.safetensors"))
            if not files:
                raise FileNotFoundError(
                    f"from_pretrained: {self.folder} must hold {SINGLE} or {INDEX}, got neither."
                )
            where = {}
            for path in files:
                with safe_open(path, framework="pt") as opened:
                    where |= dict.fromkeys(opened.keys(), path.name)
        self._where: dict[str, str] = where
        self._open: dict[str, Any] = {}
        scales = (key for key in where if key.endswith(_SCALES))
        self._scaled = {k for k in scales if k.removesuffix(_SCALES) in where}

    def keys(self) -> list[str]:
        """All keys but the scales of fp8 weights."""
        return [key for key in self._where if key not in self._scaled]

    def get(self, key: str) -> Tensor:
        tensor = self._raw(key)
        if key + _SCALES in self._scaled:
            from moe_ops.quant import dequantize_fp8_blocks

            tensor = dequantize_fp8_blocks(tensor, self._raw(key + _SCALES), dtype=torch.bfloat16)
        return tensor

    def _raw(self, key: str) -> Tensor:
        name = self._where[key]
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name].get_tensor(key)


def read_config(folder: Path | str) -> dict[str, Any]:
    """config.json of a checkpoint folder.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"from_pretrained: {folder} must hold {CONFIG}, got none.")
    return json.loads(path.read_text())


def compare(reader: Reader, entries: Iterable[Entry], ignored: Sequence[str]) -> LoadReport:
    """Which keys are missing, unexpected or ignored (regular expressions that match at the end)."""
    there = set(reader.keys())
    wanted = [key for entry in entries for key in entry.keys]
    known = set(wanted)
    report = LoadReport(missing=[key for key in wanted if key not in there])
    for key in sorted(there - known):
        skip = any(re.search(f"(?:{pattern})$", key) for pattern in ignored)
        (report.ignored if skip else report.unexpected).append(key)
    return report


@torch.no_grad()
def load(model: nn.Module, reader: Reader, entries: Iterable[Entry], report: LoadReport) -> None:
    """Copies every tensor whose keys are all there into the model, in the model's dtype.

    Raises:
        ValueError: a tensor of another shape than the model's.
    """
    state = model.state_dict()
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
    """Writes config.json and the tensors under their published keys, in shards when too large."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    state = model.state_dict()
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for entry in entries:
        parts = entry.split(state[entry.name].detach())
        for key, part in zip(entry.keys, parts, strict=True):
            # A copy, since safetensors refuses two tensors in one storage.
            tensor = part.clone(memory_format=torch.contiguous_format)
            if shards[-1] and size + tensor.nbytes > max_shard_bytes:
                shards.append({})
                size = 0
            shards[-1][key] = tensor
            size += tensor.nbytes
            total += tensor.nbytes
    for old in (*folder.glob("model-*-of-*.safetensors"), folder / INDEX, folder / SINGLE):
        old.unlink(missing_ok=True)
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE, metadata={"format": "pt"})
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
