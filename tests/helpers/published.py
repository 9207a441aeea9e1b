"""Published formats of quantized weights written down element by element, apart from the code that
reads them: what a checkpoint has on disk, and the weight that it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def random_codes(rows: int, columns: int, group: int, zeros: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [O, D] of 0 to 15, zero points [O, D/g] (8 where `zeros` is False), scales in fp16."""
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    zero = torch.randint(0, 16, (rows, columns // group), dtype=torch.int32)
    if not zeros:
        zero.fill_(8)
    scale = (torch.rand(rows, columns // group) + 0.5) / (8 * columns**0.5)
    return codes, zero, scale.half()


def meaning(codes: Tensor, zero: Tensor, scale: Tensor) -> Tensor:
    """The weight in fp32."""
    group = codes.shape[1] // scale.shape[1]
    offset = zero.repeat_interleave(group, 1)
    return (codes - offset).float() * scale.float().repeat_interleave(group, 1)


def words(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """int32 [..., N/8]: code `order[i]` of eight in bits 4i to 4i + 3."""
    result = torch.zeros(*codes.shape[:-1], codes.shape[-1] // 8, dtype=torch.int64)
    for position, place in enumerate(order):
        result |= codes[..., place::8].long() << 4 * position
    result = torch.where(result >= 2**31, result - 2**32, result)
    return result.to(torch.int32)


def gptq(codes: Tensor, zero: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """AutoGPTQ's first format, whose zero points are stored less 1."""
    depth = codes.shape[1]
    return {
        "qweight": words(codes).T.contiguous(),
        "qzeros": words((zero.T - 1) & 15),
        "scales": scale.T.contiguous(),
        "g_idx": torch.arange(depth, dtype=torch.int32) // (depth // scale.shape[1]),
    }


def awq(codes: Tensor, zero: Tensor, scale: Tensor) -> dict[str, Tensor]:
    return {
        "qweight": words(codes.T.contiguous(), AWQ_ORDER),
        "qzeros": words(zero.T.contiguous(), AWQ_ORDER),
        "scales": scale.T.contiguous(),
    }


def compressed_tensors(codes: Tensor, zero: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """pack-quantized: with zero points where one is not 8."""
    result = {
        "weight_packed": words(codes),
        "weight_scale": scale,
        "weight_shape": torch.tensor(codes.shape),
    }
    if bool((zero != 8).any()):
        result["weight_zero_point"] = words(zero.T.contiguous()).T.contiguous()
    return result


def e2m1(codes: Tensor) -> Tensor:
    """Sign, two bits of exponent, one of mantissa."""
    exponent, mantissa = codes >> 1 & 3, (codes & 1).double()
    size = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    return torch.where(codes < 8, size, -size)


def ggml_block(kind: str, block: bytes) -> list[float]:
    """One block of a type of ggml, as its C code reads it."""
    import struct

    def half(at: int) -> float:
        return struct.unpack_from("<e", block, at)[0]

    if kind == "Q8_0":
        return [half(0) * q for q in struct.unpack_from("<32b", block, 2)]
    if kind == "Q4_0":
        codes = [b & 15 for b in block[2:]] + [b >> 4 for b in block[2:]]
        return [half(0) * (q - 8) for q in codes]
    if kind == "Q4_K":
        d, dmin, s, values = half(0), half(2), block[4:16], []
        for j in range(8):
            if j < 4:
                scale, low = s[j] & 63, s[j + 4] & 63
            else:
                scale = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4
                low = (s[j + 4] >> 4) | (s[j] >> 6) << 4
            run = block[16 + j // 2 * 32 : 48 + j // 2 * 32]
            values += [d * scale * (b >> j % 2 * 4 & 15) - dmin * low for b in run]
        return values
    values = [0.0] * 256
    d, scales = half(208), struct.unpack_from("<16b", block, 192)
    for part in range(2):
        low, high = block[64 * part : 64 * part + 64], block[128 + 32 * part : 160 + 32 * part]
        for i in range(32):
            for quarter in range(4):
                nibble = low[i + 32 * (quarter % 2)] >> 4 * (quarter // 2) & 15
                q = (nibble | (high[i] >> 2 * quarter & 3) << 4) - 32
                place = 128 * part + 32 * quarter + i
                values[place] = d * scales[place // 16] * q
    return values


GGML_BYTES = {"Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_K": (256, 144), "Q6_K": (256, 210)}


def random_ggml(kind: str, rows: int, columns: int) -> Tensor:
    """uint8 [O, bytes of a row] of random codes and small scales."""
    length, size = GGML_BYTES[kind]
    data = torch.randint(0, 256, (rows, columns // length, size), dtype=torch.uint8)
    halves = {"Q4_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,))
    for at in halves:
        step = (torch.rand(rows, columns // length, 1) + 0.5) / (64 * columns**0.5)
        step = step / (64 if kind in ("Q4_K", "Q6_K") else 8)
        data[..., at : at + 2] = step.half().view(torch.uint8)
    return data.flatten(1)


def ggml_meaning(kind: str, data: Tensor) -> Tensor:
    _, size = GGML_BYTES[kind]
    blocks = data.reshape(-1, size)
    values = [ggml_block(kind, bytes(block.tolist())) for block in blocks]
    return torch.tensor(values, dtype=torch.float64).view(data.shape[0], -1)


def nvfp4(codes: Tensor, scale: Tensor, factor: float, library: str) -> dict[str, Tensor]:
    """NVFP4 of compressed-tensors or ModelOpt: codes [O, D] of e2m1, scales of e4m3 [O, D/16]."""
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    if library == "modelopt":
        return {"weight": packed, "weight_scale": scale, "weight_scale_2": torch.tensor(factor)}
    return {
        "weight_packed": packed,
        "weight_scale": scale,
        "weight_global_scale": torch.tensor([1 / factor]),
    }


def nvfp4_meaning(codes: Tensor, scale: Tensor, factor: float) -> Tensor:
    """The weight in fp32 (a product of fp32 numbers)."""
    steps = scale.float() * torch.tensor(factor)
    return (e2m1(codes).double() * steps.double().repeat_interleave(16, 1)).float()
