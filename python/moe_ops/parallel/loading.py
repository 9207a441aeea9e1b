"""Loading of expert weights from the safetensors files of a Hugging Face checkpoint, by each rank
its own.

Letters: E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_ops import _files, _reading
from moe_ops._sharded import is_sharded, local_part
from moe_ops.expert_weights.packing import invalidate
from moe_ops.layers import Experts

_INDEX = "model.safetensors.index.json"
# Key suffixes of w_gate_up and w_down if all experts are in one tensor.
_TOGETHER = (
    ("gate_up_proj", "down_proj"),
    ("input_linear.weight", "output_linear.weight"),
    ("w_gate_up", "w_down"),
)
# Key suffixes of gate, up and down, after a prefix and an expert number, if each expert has its own
# tensors.
_APART = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_FLOATS = ("F64", "F32", "BF16", "F16")


def load_sharded_experts(
    model: nn.Module,
    folder: Path | str,
    prefixes: Mapping[str, str] | Callable[[str], str] | str,
) -> None:
    """Loads sharded experts from a checkpoint; each rank reads only its own experts.

    Call it after `shard_experts` (and ``to_empty``), before `fully_shard_moe`.

    Example:
        shard_experts(model, meshes.ep)
        load_sharded_experts(model, folder, lambda name: f"model.{name}")

    Under the prefix of a module of experts, a checkpoint has one of

    - <e>.gate_proj.weight, <e>.up_proj.weight, <e>.down_proj.weight for each expert e, or w1, w3
      and w2 in their place (most models);
    - gate_up_proj, down_proj [E, 2I, H] and [E, H, I], or with the last two dimensions swapped
      (gpt-oss, Llama 4), and gate_up_proj_bias, down_proj_bias;
    - input_linear.weight, output_linear.weight (Granite, JetMoE).

    The order of gate and up rows is not changed; `Experts` defines whether they are interleaved
    (gpt-oss).

    Args:
        model: a module with `Experts`, sharded by `shard_experts` or unsharded.
        folder: folder with the safetensors files, and their index if there are several.
        prefixes: prefix of the keys of each module of experts, by its name in `model`: a mapping,
            with the modules to fill; a function of the name; or one prefix, if `model` is an
            `Experts`.

    Raises:
        FileNotFoundError: no files.
        ValueError: no experts of a name, missing keys, tensors with another shape or dtype than the
            parameters, or weights that FSDP2 has sharded. Earlier modules are already filled.
        ImportError: safetensors is not installed.
    """
    named = {n: m for n, m in model.named_modules() if isinstance(m, Experts)}
    if isinstance(prefixes, str):
        prefixes = {"": prefixes}
    wanted = prefixes if isinstance(prefixes, Mapping) else {n: prefixes(n) for n in named}
    unknown = [name for name in wanted if name not in named]
    if unknown or not wanted:
        raise ValueError(
            "load_sharded_experts: prefixes must name banks of the model "
            f"({', '.join(named) or 'none'}), got {', '.join(map(repr, unknown)) or 'none'}."
        )
    files = _Files(Path(folder))
    for name, prefix in wanted.items():
        _fill(named[name], name or "the bank", files, prefix)


class _Files:
    """Tensors of a folder of safetensors files, which are opened on first use."""

    def __init__(self, folder: Path) -> None:
        try:
            from safetensors import safe_open
        except ModuleNotFoundError as error:
            raise ImportError(
                "load_experts needs safetensors, which is not installed: pip install "
                "torch-moe-ops[hf]"
            ) from error
        self.folder = folder
        self._safe_open: Any = safe_open
        self._open: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        if (folder / _INDEX).exists():
            with _reading.damage(
                "load_sharded_experts", folder / _INDEX, "an index of safetensors files"
            ):
                where = _files.read_json(_files.inside(folder, _INDEX)).get("weight_map")
            if not isinstance(where, dict):
                raise ValueError(
                    f"load_sharded_experts: weight_map of {folder / _INDEX} must be an object, got "
                    f"{_files.shown(where)}."
                )
            self._file_of = where
            return
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        if not names:
            raise FileNotFoundError(
                f"load_sharded_experts: {folder} must hold safetensors files, got none."
            )
        for name in names:
            with self._reading(name):
                self._file_of |= dict.fromkeys(self._opened(name).keys(), name)

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def slice(self, key: str) -> Any:
        """Returns a lazy tensor, of which only type and shape are read until it is indexed."""
        if key not in self:
            raise ValueError(
                f"load_sharded_experts: {self.folder} must hold {key}, got no such tensor."
            )
        name = self._file_of[key]
        with self._reading(name, f" with {key}"):
            found = self._opened(name).get_slice(key)
        if found.get_dtype() not in _FLOATS:
            raise ValueError(
                f"load_sharded_experts: {key} must be one of {', '.join(_FLOATS)}, got "
                f"{found.get_dtype()} in {self.folder / name}."
            )
        return found

    def read(self, key: str, first: int = 0, end: int | None = None) -> Tensor:
        """Returns rows of a tensor, all of them by default."""
        with self._reading(self._file_of[key]):
            found: Tensor = self._opened(self._file_of[key]).get_slice(key)[first:end]
            return found

    def _reading(self, name: Any, key: str = "") -> contextlib.AbstractContextManager[None]:
        where = self.folder / (name if isinstance(name, str) else _files.shown(name))
        return _reading.damage("load_sharded_experts", where, f"a whole safetensors file{key}")

    def _opened(self, name: str) -> Any:
        if name not in self._open:
            path = _files.inside(self.folder, name)
            _reading.check_safetensors(path, "")
            self._open[name] = self._safe_open(path, framework="pt")
        return self._open[name]


class _Rows(NamedTuple):
    """Expert indices to read, out of E, and their files."""

    files: _Files
    experts: Sequence[int]
    num_experts: int

    def apart(self, prefix: str, names: tuple[str, ...], wanted: Tensor, target: str) -> Tensor:
        """Reads experts stored in separate tensors, concatenating the named parts."""
        rows = torch.empty(wanted.shape, dtype=wanted.dtype)
        size = wanted.shape[1] // len(names)
        shape = [size, *wanted.shape[2:]]
        for row, expert in enumerate(self.experts):
            for part, name in enumerate(names):
                key = f"{prefix}.{expert}.{name}.weight"
                tensor = self.files.slice(key)
                _check_shape(key, tensor.get_shape(), shape, target)
                rows[row, part * size : (part + 1) * size] = self.files.read(key)
        return rows

    def together(self, key: str, wanted: Tensor, target: str, swapped: bool = False) -> Tensor:
        """Reads rows of a tensor with all experts."""
        tensor = self.files.slice(key)
        shape = [self.num_experts, *wanted.shape[1:]]
        if swapped:
            shape[1:] = shape[:0:-1]
        _check_shape(key, tensor.get_shape(), shape, target)
        first, num = self.experts[0], len(self.experts)
        rows: Tensor
        if list(self.experts) == list(range(first, first + num)):
            rows = self.files.read(key, first, first + num)
        else:
            rows = torch.cat([self.files.read(key, e, e + 1) for e in self.experts])
        return rows.transpose(1, 2) if swapped else rows


@torch.no_grad()
def _fill(bank: Experts, name: str, files: _Files, prefix: str) -> None:
    experts: Sequence[int] = range(bank.num_experts)
    w_down: Any = bank.w_down
    if is_sharded(w_down):
        mesh = w_down.device_mesh
        if bank.sharding is None or mesh.ndim != 1:
            raise ValueError(
                f"load_sharded_experts: {name} must be whole or sharded by shard_experts alone, "
                f"got weights on a mesh of shape {tuple(mesh.shape)}; load before fully_shard_moe."
            )
        experts = bank.sharding.placement.local(mesh.get_local_rank())
    weights = local_part(bank.w_gate_up), local_part(bank.w_down)
    rows = _Rows(files, experts, bank.num_experts)
    gate_up, down = _read(rows, prefix, bank, weights, name)
    weights[0].copy_(gate_up)
    weights[1].copy_(down)
    for bias, key in ((bank.b_gate_up, "gate_up_proj_bias"), (bank.b_down, "down_proj_bias")):
        if bias is not None:
            own = local_part(bias)
            own.copy_(rows.together(f"{prefix}.{key}", own, name))
    invalidate(bank)


def _read(
    rows: _Rows, prefix: str, bank: Experts, wanted: tuple[Tensor, Tensor], name: str
) -> tuple[Tensor, Tensor]:
    files = rows.files
    for gate, up, down in _APART:
        if f"{prefix}.{rows.experts[0]}.{down}.weight" in files:
            parts = (gate, up) if bank.gated else (up,)
            return (
                rows.apart(prefix, parts, wanted[0], name),
                rows.apart(prefix, (down,), wanted[1], name),
            )
    for pair in _TOGETHER:
        keys = f"{prefix}.{pair[0]}", f"{prefix}.{pair[1]}"
        if keys[1] in files:
            # One of the two matrices is not square and shows whether both are transposed.
            stored = [tuple(files.slice(key).get_shape()[1:]) for key in keys]
            straight = [tuple(w.shape[1:]) for w in wanted]
            swapped = stored != straight and stored == [shape[::-1] for shape in straight]
            gate_up = rows.together(keys[0], wanted[0], name, swapped)
            return gate_up, rows.together(keys[1], wanted[1], name, swapped)
    raise ValueError(
        f"load_sharded_experts: {files.folder} must hold experts under {prefix!r} for {name}, got "
        f"no key such as {prefix}.{rows.experts[0]}.down_proj.weight or {prefix}.down_proj."
    )


def _check_shape(key: str, got: Any, wanted: list[int], target: str) -> None:
    if list(got) != wanted:
        raise ValueError(
            f"load_sharded_experts: {key} must be {wanted} for {target}, got {list(got)}."
        )
