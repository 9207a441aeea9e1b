"""Weights as published checkpoints store them, turned to what layers hold: codes, scales and zero
points, with the same bits of information and no weight as a float in between.

A weight is [O, D]: O output and D input features; g is the size of a group. Each function takes the
tensors of one weight, or of several with leading dimensions, and returns a `StoredWeight`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_ops.ops._checks import dtype_name
from moe_ops.weight_formats import WeightFormat

_SHIFTS = (0, 4, 8, 12, 16, 20, 24, 28)  # of the codes of 4 bits in a word
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of each, in AWQ's words
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# ggml's types: their number in a file, and the bytes that 32 or 256 weights take.
_GGML = {"Q4_0": (32, 18), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q6_K": (256, 210)}


class StoredWeight(NamedTuple):
    """The parts of a weight that a layer holds: `moe_ops.weight_formats.WeightFormat.tensors` has
    shapes."""

    format: WeightFormat
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None


def from_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    bits: int = 4,
    version: int = 1,
) -> StoredWeight:
    """GPTQ: ``w[o, k] = scales[k // g, o] * (code - zero)``.

    Args:
        qweight: int32 [D * bits / 32, O], codes of consecutive inputs in a word.
        qzeros: int32 [D/g, O * bits / 32], zero points of consecutive outputs, less 1 in version 1.
        scales: [D/g, O] float16 or bfloat16.
        g_idx: [D] int32, the group of each input; only groups in order are supported.
        bits: 4, or 8 with zero points of 128.
        version: of the format: 2 stores zero points as they are.

    Raises:
        ValueError: other bits, groups in another order (desc_act), other zero points of 8 bits,
            tensors of other types, or that do not belong together.
    """
    if bits not in (4, 8):
        raise ValueError(f"from_gptq: bits must be 4 or 8, got {bits}.")
    for name, words in (("qweight", qweight), ("qzeros", qzeros)):
        _check_kind("from_gptq", name, words, torch.int32)
    depth = (qweight.shape[-2] * 32 // bits) if qweight.dim() > 1 else 0
    group = _group("from_gptq", "scales", scales, -2, depth)
    _check_order("from_gptq", g_idx, depth, group)
    # Words of 8 codes along the inputs, input-major; bytes of a word are pairs, even one low.
    codes = qweight.mT.contiguous().view(torch.uint8)
    mask = (1 << bits) - 1
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=qzeros.device)
    zeros = (qzeros[..., None] >> shifts & mask).flatten(-2).mT  # [O, D/g]
    if version == 1:
        zeros = zeros + 1 & mask
    scale = scales.mT.contiguous()
    if bits == 8:
        if bool((zeros != 128).any()):
            raise ValueError("from_gptq: zero points of 8 bits must be 128, got others.")
        how = _integers("int8", group, scale)
        return StoredWeight(how, (codes ^ 128).view(torch.int8), scale)
    return _int4(codes, scale, zeros.to(torch.uint8).contiguous(), group)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> StoredWeight:
    """AWQ (gemm): ``w[o, k] = scales[k // g, o] * (code - zero)``.

    Args:
        qweight: int32 [D, O/8], eight outputs in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7.
        qzeros: int32 [D/g, O/8], likewise.
        scales: [D/g, O] float16.

    Raises:
        ValueError: tensors of other types, or that do not belong together.
    """
    for name, words in (("qweight", qweight), ("qzeros", qzeros)):
        _check_kind("from_awq", name, words, torch.int32)
    depth = qweight.shape[-2] if qweight.dim() > 1 else 0
    group = _group("from_awq", "scales", scales, -2, depth)
    codes = _pairs(_awq_columns(qweight).mT.contiguous())
    zeros = _awq_columns(qzeros).mT.contiguous()
    return _int4(codes, scales.mT.contiguous(), zeros, group)


def from_compressed_tensors(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    weight_g_idx: Tensor | None = None,
    *,
    in_features: int,
    bits: int = 4,
) -> StoredWeight:
    """compressed-tensors' pack-quantized: ``w[o, k] = scale[o, k // g] * (q - zero)``, with q and
    zero of 4 bits stored plus 8, and q of 8 bits stored plus 128.

    Args:
        weight_packed: int32 [O, D * bits / 32].
        weight_scale: [O, D/g]; [O, 1] is one scale a row.
        weight_zero_point: int32 [O/8, D/g], consecutive outputs in a word; int8 [O, D/g]; or None.
        weight_g_idx: [D], the group of each input; only groups in order are supported.
        in_features: D.
        bits: 4, or 8 without zero points.

    Raises:
        ValueError: other bits, groups in another order, tensors of other types, or that do not
            belong together.
    """
    if bits not in (4, 8) or (bits == 8 and weight_zero_point is not None):
        raise ValueError(
            "from_compressed_tensors: bits must be 4, or 8 without zero points, got "
            f"{bits} {'without' if weight_zero_point is None else 'with'} them."
        )
    _check_kind("from_compressed_tensors", "weight_packed", weight_packed, torch.int32)
    group = _group("from_compressed_tensors", "weight_scale", weight_scale, -1, in_features)
    _check_order("from_compressed_tensors", weight_g_idx, in_features, group)
    codes = weight_packed.contiguous().view(torch.uint8)
    codes = codes[..., : in_features * bits // 8].contiguous()
    if bits == 8:
        numbers = (codes ^ 128).view(torch.int8)
        if group == in_features:
            return from_int8_channels(numbers, weight_scale)
        scale = weight_scale.contiguous()
        return StoredWeight(_integers("int8", group, scale), numbers, scale)
    zeros = weight_zero_point
    if zeros is not None and zeros.dtype == torch.int32:
        shifts = torch.tensor(_SHIFTS, dtype=torch.int32, device=zeros.device)
        zeros = (zeros[..., None, :] >> shifts[:, None] & 15).flatten(-3, -2)
        zeros = zeros[..., : weight_scale.shape[-2], :].to(torch.uint8)
    elif zeros is not None:
        zeros = (zeros.to(torch.int16) + 8).to(torch.uint8)
    return _int4(codes, weight_scale.contiguous(), zeros, group)


def from_int8_channels(weight: Tensor, weight_scale: Tensor) -> StoredWeight:
    """compressed-tensors' int-quantized: int8 [O, D] with one symmetric scale a row [O, 1]."""
    return StoredWeight(WeightFormat("int8"), weight.contiguous(), weight_scale.float().squeeze(-1))


def from_mxfp4(blocks: Tensor, scales: Tensor) -> StoredWeight:
    """MXFP4 as gpt-oss is published: blocks uint8 [O, D/32, 16], scales uint8 [O, D/32]. A view."""
    return StoredWeight(WeightFormat("mxfp4"), blocks.flatten(-2), scales)


def from_nvfp4(
    packed: Tensor, scale: Tensor, factor: Tensor, *, inverse: bool = False
) -> StoredWeight:
    """NVFP4: ``w[o, k] = e2m1[o, k] * scale[o, k // 16] * factor``.

    Args:
        packed: uint8 [O, D/2], the even input in the low half: ModelOpt's `weight`,
            compressed-tensors' `weight_packed`.
        scale: float8_e4m3fn [O, D/16], `weight_scale`.
        factor: float32, one number: ModelOpt's `weight_scale_2`, compressed-tensors'
            `weight_global_scale`.
        inverse: whether `factor` is what scales were multiplied by, as compressed-tensors stores
            it.

    Raises:
        ValueError: tensors of other types, or that do not belong together.
    """
    _check_kind("from_nvfp4", "packed", packed, torch.uint8)
    _check_kind("from_nvfp4", "scale", scale, torch.float8_e4m3fn)
    if _group("from_nvfp4", "scale", scale, -1, packed.shape[-1] * 2) != 16 or factor.numel() != 1:
        raise ValueError(
            f"from_nvfp4: scale must be for 16 inputs each and factor one number, got shapes "
            f"{list(scale.shape)} and {list(factor.shape)}."
        )
    number = factor.float().reshape(())
    number = number.reciprocal() if inverse else number
    head = number.expand(*scale.shape[:-1], 1).contiguous().view(torch.uint8)
    scales = torch.cat([head, scale.contiguous().view(torch.uint8)], -1)
    return StoredWeight(WeightFormat("nvfp4"), packed.contiguous(), scales)


def from_fp8(weight: Tensor, weight_scale_inv: Tensor) -> StoredWeight:
    """fp8 in blocks of 128 x 128: weight float8_e4m3fn [O, D], weight_scale_inv [O/128, D/128]."""
    return StoredWeight(WeightFormat("fp8"), weight, weight_scale_inv.float())


def from_fp8_channels(weight: Tensor, weight_scale: Tensor) -> StoredWeight:
    """compressed-tensors' float-quantized: weight float8_e4m3fn [O, D], weight_scale [O, 1] or [O],
    or one number for all outputs.

    Raises:
        ValueError: a weight of another type, or another number of scales.
    """
    _check_kind("from_fp8_channels", "weight", weight, torch.float8_e4m3fn)
    outputs = weight.shape[:-1]
    if weight_scale.numel() not in (1, outputs.numel()):
        raise ValueError(
            "from_fp8_channels: weight_scale must be one number or one per output, got shape "
            f"{list(weight_scale.shape)} for {list(weight.shape)}."
        )
    scale = weight_scale.float().reshape(-1).expand(outputs.numel()).reshape(outputs)
    return StoredWeight(WeightFormat("e4m3"), weight.contiguous(), scale.contiguous())


def ggml_format(type_name: str) -> WeightFormat:
    """Returns the format in which weights of a ggml type are held.

    Raises:
        ValueError: another type than "Q8_0", "Q4_0", "Q4_K" and "Q6_K".
    """
    if type_name not in _GGML:
        known = ", ".join(_GGML)
        raise ValueError(f"experts of a GGUF file must be one of {known}, got {type_name}.")
    if type_name in ("Q4_K", "Q6_K"):
        return WeightFormat(type_name.lower())
    return WeightFormat("int8" if type_name == "Q8_0" else "int4", 32, "float16")


def from_ggml(data: Tensor, type_name: str) -> StoredWeight:
    """Blocks of a GGUF file.

    Args:
        data: uint8 [O, bytes of a row].
        type_name: "Q8_0", "Q4_0", "Q4_K" or "Q6_K".

    Raises:
        ValueError: another type.
    """
    how = ggml_format(type_name)
    _, size = _GGML[type_name]
    blocks = data.unflatten(-1, (-1, size))
    if type_name == "Q4_K":
        return StoredWeight(how, _rows(blocks, 16, 144), _part(blocks, 0, 16))
    if type_name == "Q6_K":
        return StoredWeight(how, _rows(blocks, 0, 192), _part(blocks, 192, 210))
    scale = _part(blocks, 0, 2).view(torch.float16).squeeze(-1)
    if type_name == "Q8_0":
        return StoredWeight(how, _rows(blocks, 2, 34).view(torch.int8), scale)
    # 16 bytes: the first 16 codes low, the others high.
    halves = blocks[..., 2:]
    codes = torch.cat([halves & 15, halves >> 4], -1).flatten(-2)
    return StoredWeight(how, _pairs(codes), scale)


def _int4(codes: Tensor, scale: Tensor, zeros: Tensor | None, group: int) -> StoredWeight:
    how = _integers("int4", group, scale, zeros is not None)
    return StoredWeight(how, codes, scale, zeros)


def adapted(weight: StoredWeight, how: WeightFormat) -> StoredWeight:
    """Returns the weight in another form of its format, exactly: with zero points of 8 or without,
    and with scales of a wider type.

    Raises:
        ValueError: where that is not exact, or another format is wanted.
    """
    of = weight.format
    scale, zero = weight.scale, weight.zero
    same = (of.name, of.group_size) == (how.name, how.group_size)
    if not same or how.scale_dtype not in ("float32", of.scale_dtype):
        raise ValueError(f"weights must be of {how.label}, got {of.label}.")
    if how.scale_dtype != of.scale_dtype:
        scale = scale.float()
    if zero is not None and not how.zero_points:
        if bool((zero != 8).any()):
            raise ValueError("zero points of symmetric weights must be 8, got others.")
        zero = None
    elif zero is None and how.zero_points:
        zero = torch.full(scale.shape, 8, dtype=torch.uint8, device=scale.device)
    return StoredWeight(how, weight.codes, scale, zero)


def _integers(name: str, group: int, scale: Tensor, zero_points: bool = False) -> WeightFormat:
    dtype = _NAMES.get(scale.dtype)
    if dtype is None:
        raise ValueError(
            f"scales must be float32, bfloat16 or float16, got {dtype_name(scale.dtype)}."
        )
    return WeightFormat(name, group, dtype, zero_points)


def _check_kind(name: str, what: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tensor.dim() < 2:
        raise ValueError(
            f"{name}: {what} must be {dtype_name(dtype)} of two dimensions or more, got "
            f"{dtype_name(tensor.dtype)} of shape {list(tensor.shape)}."
        )


def _group(name: str, what: str, scales: Tensor, dimension: int, depth: int) -> int:
    """Returns the size of the groups of `depth` inputs that have a scale each."""
    groups = scales.shape[dimension] if scales.dim() > 1 else 0
    if not groups or not depth or depth % groups:
        raise ValueError(
            f"{name}: {what} must have a number of groups that divides {depth} inputs, got shape "
            f"{list(scales.shape)}."
        )
    return depth // groups


def _check_order(name: str, g_idx: Tensor | None, depth: int, group: int) -> None:
    if g_idx is None:
        return
    wanted = torch.arange(depth, device=g_idx.device) // group
    if g_idx.shape != wanted.shape or bool((g_idx.long() != wanted).any()):
        raise ValueError(
            f"{name}: groups must be of consecutive inputs, got others (desc_act or actorder)."
        )


def _pairs(codes: Tensor) -> Tensor:
    """Codes of 4 bits [..., D], one a byte, two a byte: the even one low."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _awq_columns(words: Tensor) -> Tensor:
    """uint8 [..., O] from AWQ's words [..., O/8]."""
    shifts = torch.empty(8, dtype=torch.int32)
    for position, column in enumerate(_AWQ_ORDER):
        shifts[column] = 4 * position
    return (words[..., None] >> shifts.to(words.device) & 15).to(torch.uint8).flatten(-2)


def _part(blocks: Tensor, first: int, end: int) -> Tensor:
    return blocks[..., first:end].contiguous()


def _rows(blocks: Tensor, first: int, end: int) -> Tensor:
    return _part(blocks, first, end).flatten(-2)


def concatenated(parts: list[StoredWeight]) -> StoredWeight:
    """Weights with the same inputs, one under the other: gate and up.

    Raises:
        ValueError: other formats or inputs, or fp8 halves that share a block.
    """
    first = parts[0]
    names = {p.format for p in parts}
    if len(names) > 1:
        kinds = " and ".join(p.format.label for p in parts)
        raise ValueError(f"gate and up must have one format, got {kinds}.")
    inputs = {(p.codes.dtype, *p.codes.shape[:-2], p.codes.shape[-1]) for p in parts}
    if len(inputs) > 1 or len({(p.scale.dtype, p.scale.dim()) for p in parts}) > 1:
        shapes = " and ".join(f"{list(p.codes.shape)} with {list(p.scale.shape)}" for p in parts)
        raise ValueError(f"gate and up must have the same inputs, got {shapes}.")
    if first.format.name == "fp8" and any(p.codes.shape[-2] % 128 for p in parts[:-1]):
        raise ValueError(
            "halves of fp8 must have a multiple of 128 rows to be put together, got "
            f"{first.codes.shape[-2]}."
        )

    def joined(which: str) -> Any:
        tensors = [getattr(p, which) for p in parts]
        if tensors[0] is None:
            return None
        dim = first.codes.dim() - 2
        views = [t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in tensors]
        return torch.cat(views, dim).view(tensors[0].dtype)

    return StoredWeight(first.format, joined("codes"), joined("scale"), joined("zero"))
