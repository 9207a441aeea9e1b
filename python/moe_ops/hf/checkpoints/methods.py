"""Layouts of the quantization methods of published checkpoints: which tensors a weight has, and
the format in which layers of moe_ops hold it.

O and D are the output and input features of a weight.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_ops.hf.checkpoints.files import Checkpoint
from moe_ops.quant import published
from moe_ops.quant.published import StoredWeight
from moe_ops.weight_formats import WeightFormat

__all__ = ["LAYOUTS", "Method", "Mxfp4"]

_SCALES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Scales of 4-bit groups of these sizes become float32, for which CUDA has kernels: half a byte a
# group of 64, 1/18 of what such a weight takes. The CPU has kernels for all groups and scales.
_KERNEL_GROUPS = (64, 128)


class Method:
    """The layout of a method; every weight that it quantizes has the tensor `marker`."""

    marker: str

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def format(self, files: Checkpoint, name: str, in_features: int) -> WeightFormat:
        """Returns the format in which the weight called `name` is held."""
        raise NotImplementedError

    def read(self, files: Checkpoint, name: str, in_features: int) -> StoredWeight:
        raise NotImplementedError


def _scale_dtype(files: Checkpoint, scales: str) -> str:
    found = files.dtype(scales)
    if found not in _SCALES:
        raise ValueError(
            f"from_pretrained: {scales} must be one of {', '.join(_SCALES)}, got {found}."
        )
    return _SCALES[found]


def _group(files: Checkpoint, scales: str, dimension: int, in_features: int) -> int:
    """Returns the size of the groups of inputs that have a scale each."""
    shape = files.shape(scales)
    groups = shape[dimension] if len(shape) == 2 else 0
    if not groups or in_features % groups:
        raise ValueError(
            f"from_pretrained: {scales} must have two dimensions and a number of groups that "
            f"divides {in_features} inputs, got shape {shape}."
        )
    return in_features // groups


def _packed_bits(files: Checkpoint, packed: str, in_features: int) -> int:
    """Returns the bits of a code: a row of words of 32 bits has `in_features` of them."""
    words = files.shape(packed)[-1]
    bits = next((bits for bits in (4, 8) if -(-in_features * bits // 32) == words), None)
    if bits is None:
        raise ValueError(
            f"from_pretrained: {packed} must have {in_features} codes of 4 or 8 bits in a row, got "
            f"{words} words."
        )
    return bits


def _int4(files: Checkpoint, scales: str, group: int, zero_points: bool) -> WeightFormat:
    dtype = _scale_dtype(files, scales)
    kernels = not zero_points and group in _KERNEL_GROUPS
    return WeightFormat("int4", group, "float32" if kernels else dtype, zero_points)


class Gptq(Method):
    marker = "qweight"

    def format(self, files: Checkpoint, name: str, in_features: int) -> WeightFormat:
        scales = f"{name}.scales"
        group = _group(files, scales, 0, in_features)
        if self.config.get("bits", 4) == 8:
            return WeightFormat("int8", group, _scale_dtype(files, scales))
        return _int4(files, scales, group, not self.config.get("sym", True))

    def read(self, files: Checkpoint, name: str, in_features: int) -> StoredWeight:
        g_idx = files.optional(f"{name}.g_idx")
        version = 2 if self.config.get("checkpoint_format") == "gptq_v2" else 1
        qweight, qzeros, scales = (
            files.get(f"{name}.{leaf}") for leaf in ("qweight", "qzeros", "scales")
        )
        bits = self.config.get("bits", 4)
        return published.from_gptq(qweight, qzeros, scales, g_idx, bits=bits, version=version)


class Awq(Method):
    marker = "qweight"

    def format(self, files: Checkpoint, name: str, in_features: int) -> WeightFormat:
        scales = f"{name}.scales"
        group = _group(files, scales, 0, in_features)
        return _int4(files, scales, group, bool(self.config.get("zero_point", True)))

    def read(self, files: Checkpoint, name: str, in_features: int) -> StoredWeight:
        parts = (files.get(f"{name}.{leaf}") for leaf in ("qweight", "qzeros", "scales"))
        return published.from_awq(*parts)


def _read_e4m3(files: Checkpoint, name: str, blocks: bool) -> StoredWeight:
    weight, scale = files.get(f"{name}.weight"), files.get(f"{name}.weight_scale")
    return (published.from_fp8 if blocks else published.from_fp8_channels)(weight, scale)


class CompressedTensors(Method):
    marker = "weight_scale"

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        groups = (config.get("config_groups") or {}).values()
        # Scales of e4m3: one per 128 x 128 in all groups, or one per output or tensor.
        self._blocks = any((g.get("weights") or {}).get("strategy") == "block" for g in groups)

    def _has_e4m3(self, files: Checkpoint, name: str) -> bool:
        return f"{name}.weight" in files and files.dtype(f"{name}.weight") == "F8_E4M3"

    def format(self, files: Checkpoint, name: str, in_features: int) -> WeightFormat:
        scale = f"{name}.weight_scale"
        if f"{name}.weight_global_scale" in files:
            return WeightFormat("nvfp4")
        if self._has_e4m3(files, name):
            return WeightFormat("fp8" if self._blocks else "e4m3")
        if f"{name}.weight_packed" not in files:
            return WeightFormat("int8")
        group = _group(files, scale, 1, in_features)
        if _packed_bits(files, f"{name}.weight_packed", in_features) == 4:
            return _int4(files, scale, group, f"{name}.weight_zero_point" in files)
        if group == in_features:
            return WeightFormat("int8")
        return WeightFormat("int8", group, _scale_dtype(files, scale))

    def read(self, files: Checkpoint, name: str, in_features: int) -> StoredWeight:
        if self._has_e4m3(files, name):
            return _read_e4m3(files, name, self._blocks)
        scale = files.get(f"{name}.weight_scale")
        if f"{name}.weight_global_scale" in files:
            packed, factor = (files.get(f"{name}.weight_{n}") for n in ("packed", "global_scale"))
            return published.from_nvfp4(packed, scale, factor, inverse=True)
        if f"{name}.weight_packed" not in files:
            weight = files.get(f"{name}.weight")
            if weight.dtype != torch.int8 or scale.numel() != weight.shape[0]:
                raise ValueError(
                    f"from_pretrained: {name} must be int8 with one scale a row, got "
                    f"{weight.dtype} with scales {list(scale.shape)}."
                )
            return published.from_int8_channels(weight, scale)
        rest = (files.optional(f"{name}.weight_{leaf}") for leaf in ("zero_point", "g_idx"))
        packed = files.get(f"{name}.weight_packed")
        bits = _packed_bits(files, f"{name}.weight_packed", in_features)
        return published.from_compressed_tensors(
            packed, scale, *rest, in_features=in_features, bits=bits
        )


class ModelOpt(Method):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self._nvfp4 = config["quant_algo"] == "NVFP4"
        self.marker = "weight_scale_2" if self._nvfp4 else "weight_scale"

    def format(self, files: Checkpoint, name: str, in_features: int) -> WeightFormat:
        return WeightFormat("nvfp4" if self._nvfp4 else "e4m3")

    def read(self, files: Checkpoint, name: str, in_features: int) -> StoredWeight:
        if not self._nvfp4:
            return _read_e4m3(files, name, blocks=False)
        leaves = (f"{name}.{leaf}" for leaf in ("weight", "weight_scale", "weight_scale_2"))
        return published.from_nvfp4(*map(files.get, leaves))


class Fp8(Method):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        # Without blocks (AutoFP8), a weight has one scale.
        self._blocks = config.get("weight_block_size") is not None
        self.marker = "weight_scale_inv" if self._blocks else "weight_scale"

    def format(self, files: Checkpoint, name: str, in_features: int) -> WeightFormat:
        return WeightFormat("fp8" if self._blocks else "e4m3")

    def read(self, files: Checkpoint, name: str, in_features: int) -> StoredWeight:
        if not self._blocks:
            return _read_e4m3(files, name, blocks=False)
        leaves = (f"{name}.weight", f"{name}.weight_scale_inv")
        return published.from_fp8(*map(files.get, leaves))


class Mxfp4(Method):
    """All experts of a bank in one tensor; dense layers are not quantized."""

    marker = "blocks"


LAYOUTS: dict[str, type[Method]] = {
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "fp8": Fp8,
    "modelopt": ModelOpt,
    "mxfp4": Mxfp4,
}
