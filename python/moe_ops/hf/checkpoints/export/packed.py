"""Folders with quantized weights in the layouts of compressed-tensors and GPTQ, for vLLM and other
programs.

E experts, O and D output and input features of a weight.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from moe_ops import _files
from moe_ops.hf.checkpoints.files import copy_rest
from moe_ops.ops._checks import dtype_name
from moe_ops.quant import quantize_weight
from moe_ops.quant.published import StoredWeight
from moe_ops.quant.rounding import search_int4
from moe_ops.quant.to_published import decoded, is_plain_int4, to_compressed_tensors, to_gptq
from moe_ops.weight_formats import GROUP_SIZES, WeightFormat

from .source import PARTS, Source, Weight, floats_of

_DEFAULT_GROUP = 128
_SHARD_BYTES = 2**28  # Held until a file is written, beside one layer.
# What stays float: names of modules, as both methods take them.
_ROUTERS = (r".*\.gate$", r".*\.router$", r".*\.shared_expert_gate$")
_NOT_EXPERTS = (r".*\.self_attn\..*", r".*\.shared_experts?\..*", r".*\.mlp\.(gate|up|down)_proj$")
_EXPERTS = r".*\.experts\..*"


def write_packed(
    source: Source, folder: Path, method: str, weights: str, dense: str | None
) -> dict[str, str]:
    """Writes a model into a folder.

    Args:
        source: the model.
        folder: replaced as a whole.
        method: "compressed-tensors" or "gptq".
        weights: "int4", "int4 g64", ..., or, of compressed-tensors, "int8".
        dense: likewise for dense layers; None is `weights`, "none" leaves them float.

    Returns:
        Name of each weight -> its format, or its type if it is float.

    Raises:
        ValueError: formats that the method does not have, experts without weights of their own, or
            groups that do not divide the inputs of a weight.
    """
    experts = _format_of(method, "format", weights)
    assert experts is not None
    others = experts if dense is None else _format_of(method, "dense", dense)
    if method == "gptq" and others not in (None, experts):
        raise ValueError(
            f"export: dense must be {weights} or none for GPTQ, which has one format, got {dense}."
        )
    for one in source.experts:
        if one.leaves is None:
            raise ValueError(
                f"export: experts must be one tensor each for {method}, got "
                f"{source.config.model_type}, which has them in one; write a GGUF file."
            )
    report: dict[str, str] = {}
    folder = _files.make_folder(folder)
    with _files.Replacement(folder, last="config.json") as files:
        staging = files.staging()
        _write_shards(_tensors(source, method, experts, others, report), staging)
        config = _config_of(source)
        config.quantization_config = _about(method, experts, others)
        config.save_pretrained(staging)
        if source.folder is not None:
            copy_rest(source.folder, staging, {"config.json"})
        for path in staging.iterdir():
            files.adopt(path.name, path)
        files.remove("model*.safetensors", "model*.safetensors.index.json")
    return report


def _format_of(method: str, option: str, name: str) -> WeightFormat | None:
    if option == "dense" and name == "none":
        return None
    kind, _, group = name.partition(" g")
    known = {"int4": True, "int8": method == "compressed-tensors" and not group}
    sizes = [str(size) for size in GROUP_SIZES]
    if not known.get(kind) or (group or sizes[0]) not in sizes:
        wanted = "int4, int4 g32, int4 g64, int4 g128"
        wanted += " or int8" if method == "compressed-tensors" else ""
        raise ValueError(f"export: {option} must be {wanted} for {method}, got {name!r}.")
    if kind == "int8":
        return WeightFormat("int8")
    return WeightFormat("int4", int(group or _DEFAULT_GROUP))


def _tensors(
    source: Source,
    method: str,
    experts: WeightFormat,
    others: WeightFormat | None,
    report: dict[str, str],
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of the checkpoint, and enters them into the report."""
    for name, entry in source.entries.items():
        module = name.removesuffix(".weight")
        keeps = others is None or not entry.is_linear or module.endswith("lm_head")
        if keeps or any(re.match(pattern, module) for pattern in _ROUTERS):
            report[name] = dtype_name(entry.dtype)
            yield name, floats_of(entry.read()).to(entry.dtype)
        else:
            assert others is not None
            report[name] = others.label
            parts = _packed(entry.read(), method, others, source.dtype, entry.importance, name)
            yield from ((f"{module}.{leaf}", tensor) for leaf, tensor in parts.items())
    for one in source.experts:
        assert one.leaves is not None
        for e in range(one.num_experts):
            for part, leaf in zip(PARTS, one.leaves, strict=True):
                module = f"{one.prefix}.{e}.{leaf}"
                matters = one.importance.get(part)
                parts = _packed(
                    one.read(e, part),
                    method,
                    experts,
                    source.dtype,
                    None if matters is None else matters[e],
                    module,
                )
                report[f"{module}.weight"] = experts.label
                yield from ((f"{module}.{key}", tensor) for key, tensor in parts.items())


def _packed(
    weight: Weight,
    method: str,
    how: WeightFormat,
    dtype: torch.dtype,
    importance: Tensor | None,
    name: str,
) -> dict[str, Tensor]:
    stored = _stored(weight, how, dtype, importance, name)
    if method == "gptq":
        return to_gptq(stored, how.group_size or 0)
    return to_compressed_tensors(stored, how.group_size)


def _stored(
    weight: Weight, how: WeightFormat, dtype: torch.dtype, importance: Tensor | None, name: str
) -> StoredWeight:
    """Returns a weight in a format: with the same codes where it has them."""
    group = how.group_size
    if isinstance(weight, StoredWeight):
        if weight.format == how or (group is not None and is_plain_int4(weight.format, group)):
            return weight
        weight = decoded(weight)
    if weight.shape[-1] % (group or 1):
        raise ValueError(
            f"export: groups must divide the {weight.shape[-1]} inputs of {name}, got {group}."
        )
    if group is not None and importance is not None:
        return search_int4(weight, group, importance, dtype)
    codes, scale = quantize_weight(weight, how.label)
    if group is None or dtype == torch.float32:
        return StoredWeight(how, codes, scale)
    return StoredWeight(WeightFormat("int4", group, dtype_name(dtype)), codes, scale.to(dtype))


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Writes safetensors files as soon as each is full, and their index."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal size
        shards.append(list(held))
        save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        held.clear()
        size = 0

    for name, tensor in tensors:
        held[name] = tensor.contiguous()
        total += tensor.nbytes
        size += tensor.nbytes
        if size >= _SHARD_BYTES:
            flush()
    if held:
        flush()
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = ["model.safetensors"] if len(shards) == 1 else names
    for i, name in enumerate(names, start=1):
        (folder / f"shard-{i}").rename(folder / name)
    if len(names) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _config_of(source: Source) -> Any:
    config = copy.deepcopy(source.config)
    for name in ("quantization_config", "experts_implementation"):
        config.__dict__.pop(name, None)
    if source.architecture is not None:
        config.architectures = [source.architecture]
    config.dtype = source.dtype
    return config


def _about(method: str, experts: WeightFormat, others: WeightFormat | None) -> dict[str, Any]:
    """Returns the quantization_config of config.json."""
    floats = _ROUTERS if others is not None else (*_ROUTERS, *_NOT_EXPERTS)
    if method == "gptq":
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": experts.group_size,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "checkpoint_format": "gptq",
            "dynamic": {f"-:{pattern}": {} for pattern in floats},
        }
    groups = {"group_0": _group(experts, ["Linear"])}
    if others not in (None, experts):
        assert others is not None
        dense = [f"re:{pattern}" for pattern in _NOT_EXPERTS]
        groups = {"group_0": _group(experts, [f"re:{_EXPERTS}"]), "group_1": _group(others, dense)}
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *(f"re:{pattern}" for pattern in floats)],
    }


def _group(how: WeightFormat, targets: list[str]) -> dict[str, Any]:
    common = {"type": "int", "symmetric": True}
    if how.name == "int4":
        strategy = {"num_bits": 4, "strategy": "group", "group_size": how.group_size}
        return {
            "targets": targets,
            "weights": {**common, **strategy, "dynamic": False},
            "input_activations": None,
            "format": "pack-quantized",
        }
    return {
        "targets": targets,
        "weights": {**common, "num_bits": 8, "strategy": "channel", "dynamic": False},
        "input_activations": {**common, "num_bits": 8, "strategy": "token", "dynamic": True},
        "format": "int-quantized",
    }
